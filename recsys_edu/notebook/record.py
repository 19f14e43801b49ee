"""Numbers that a notebook stands for, stored in its outputs so that a program can read them back.

`record("auc", 0.79)` shows the number to the reader and adds an output of its own MIME type, which
papermill and nbformat keep and which `read_records` finds. The CI asserts ranges on them: a notebook
that runs but learns nothing fails.
"""

from __future__ import annotations

import html
import math
from typing import Any

from recsys_edu.notebook.style import ACCENTS, show

RECORD_MIME = "application/vnd.recsys_edu.record+json"


def record(name: str, value: Any, unit: str = "") -> None:
    """Show a headline number and store it in the notebook's outputs.

    >>> record("auc", 0.79)
    auc = 0.79

    `value` is a number, a bool, a string, or a one-element tensor or array.

    Raises:
        ValueError: an empty name, or a value that is NaN or infinite (a run that diverged has no result).
        TypeError: a value of any other type.
    """
    show(record_bundle(name, value, unit))


def record_bundle(name: str, value: Any, unit: str = "") -> dict[str, Any]:
    """The MIME bundle that `record` displays: for the reader as text, for programs as data."""
    if not name:
        raise ValueError("record() needs a name, such as 'auc'")
    plain = _plain(name, value)
    text = f"{plain:.6g}" if isinstance(plain, float) else str(plain)
    label = f"{name} = {text}{' ' + unit if unit else ''}"
    return {
        RECORD_MIME: {"name": name, "value": plain, "unit": unit},
        "text/html": f'<span style="border-bottom:2px solid {ACCENTS["good"]}">{html.escape(label)}</span>',
        "text/plain": label,
    }


def read_records(notebook: Any) -> dict[str, Any]:
    """The recorded numbers of an executed notebook (an nbformat node), by name; the last one of a name wins."""
    records = {}
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            entry = output.get("data", {}).get(RECORD_MIME)
            if entry is not None:
                records[entry["name"]] = entry["value"]
    return records


def _plain(name: str, value: Any) -> float | int | bool | str:
    if hasattr(value, "item"):
        try:
            value = value.item()  # one-element tensors and arrays, numpy scalars
        except (RuntimeError, ValueError) as error:
            raise TypeError(f"record({name!r}): expected one number, got {type(value).__name__}: {error}") from error
    if not isinstance(value, (bool, int, float, str)):
        raise TypeError(f"record({name!r}): expected a number, bool or string, got {type(value).__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"record({name!r}): the value is {value}; a finite number was expected")
    return value
