"""A trainer for click-through models, on one process or many: read trainer.py first.

launch.py joins the ranks that torchrun started, run_folder.py keeps metrics and checkpoints, reports.py shows progress.
"""

from __future__ import annotations

from recsys_edu.training.launch import process_group
from recsys_edu.training.run_folder import RunFolder
from recsys_edu.training.trainer import PIPELINES, Schedule, Trainer, click_scores

__all__ = ["PIPELINES", "RunFolder", "Schedule", "Trainer", "click_scores", "process_group"]
