"""What the notebooks are made of: profiles, recorded numbers, predictions, exercises, sliders, and the runner.

    from recsys_edu.notebook import by_profile, check, exercise, explore, hint, predict, record

Nothing here keeps state in notebook files: a check compares with a reference on fresh inputs every time,
and how many hints were shown is forgotten when the kernel restarts.
"""

from recsys_edu.notebook.doctor import doctor
from recsys_edu.notebook.exercise import CheckFailed, Exercise, check, exercise, hint
from recsys_edu.notebook.explore import explore
from recsys_edu.notebook.magics import register_without_cluster
from recsys_edu.notebook.predict import predict
from recsys_edu.notebook.profiles import PROFILES, by_profile
from recsys_edu.notebook.record import read_records, record

register_without_cluster()

__all__ = [
    "PROFILES",
    "CheckFailed",
    "Exercise",
    "by_profile",
    "check",
    "doctor",
    "exercise",
    "explore",
    "hint",
    "predict",
    "read_records",
    "record",
]
