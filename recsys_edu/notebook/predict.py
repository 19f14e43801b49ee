"""Think first, look afterwards: a question whose answer stays folded until the reader opens it."""

from __future__ import annotations

import html
from typing import Any

from recsys_edu.notebook.style import ACCENTS, inline_code, show


def predict(question: str, answer: Any, why: str = "") -> None:
    """Show `question` with its answer folded away; works without a kernel, in an exported page too.

    >>> predict("How many values are in the batch?", 6)
    Predict: How many values are in the batch?
    Answer: 6

    `answer` is whatever the cell computed; text between backticks in `question` and `why` is set as code.
    """
    answer_text = answer if isinstance(answer, str) else str(answer)
    reason = f'<div style="margin-top:.3em">{inline_code(why)}</div>' if why else ""
    shown = (
        f'<details style="border-left:4px solid {ACCENTS["info"]};padding:.4em .9em;max-width:62em">'
        f'<summary style="cursor:pointer"><strong>Predict:</strong> {inline_code(question)} '
        f'<em style="opacity:.7">(open when you have a guess)</em></summary>'
        f'<pre style="margin:.5em 0 0;background:transparent">{html.escape(answer_text)}</pre>{reason}</details>'
    )
    plain = f"Predict: {question}\nAnswer: {answer_text}" + (f"\n{why}" if why else "")
    show({"text/html": shown, "text/plain": plain})
