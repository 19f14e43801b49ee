"""Exercises: a header, a check to run against your answer, and hints that come one at a time.

    exercise("01.1")              the task, its difficulty, its importance and the minutes it takes
    check("01.1", my_function)    compares with a reference on fresh random inputs
    hint("01.1")                  one more hint each time it is called

The exercises of one notebook live in one file of `recsys_edu/notebook/exercises/`: title, task, hints and
the check, which is a plain function that raises `CheckFailed` with what was expected and what was got.
"""

from __future__ import annotations

import importlib
import linecache
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from recsys_edu.notebook.record import record_bundle
from recsys_edu.notebook.style import card, inline_code, preformatted, show

HINTS_SHOWN = "_recsys_edu_hints_shown"


class CheckFailed(AssertionError):
    """An answer differs from the reference; the message says on which input, what was expected, what was got."""

    def _render_traceback_(self) -> list[str]:
        """IPython asks for this: one line, for the message stands above it in a card of its own."""
        return ["CheckFailed: see above"]


@dataclass(frozen=True)
class Exercise:
    """One exercise. `difficulty` and `importance` run from 1 to 5; `check` raises CheckFailed or returns."""

    number: str
    title: str
    task: str
    difficulty: int
    importance: int
    minutes: int
    hints: tuple[str, ...]
    check: Callable[..., None]

    def __post_init__(self) -> None:
        for name, value in (("difficulty", self.difficulty), ("importance", self.importance)):
            if not 1 <= value <= 5:
                raise ValueError(f"exercise {self.number}: {name} is {value}, expected 1 to 5")


def find_exercise(number: str) -> Exercise:
    """The exercise called `number` ("01.1": notebook 01, first exercise).

    Raises:
        KeyError: no such exercise; the message lists those the notebook has.
    """
    chapter = number.split(".")[0]
    try:
        module = importlib.import_module(f"recsys_edu.notebook.exercises.nb{chapter}")
    except ModuleNotFoundError:
        raise KeyError(f"no exercise {number!r}: notebook {chapter!r} has none; numbers look like '01.1'") from None
    by_number = {each.number: each for each in module.EXERCISES}
    if number not in by_number:
        raise KeyError(f"no exercise {number!r}: notebook {chapter} has {', '.join(by_number)}")
    return by_number[number]


def exercise(number: str) -> None:
    """Show an exercise's header and task."""
    found = find_exercise(number)
    hints = f"{len(found.hints)} hints: <code>hint({number!r})</code>" if found.hints else "hints are with your teacher"
    facts = (
        f"difficulty {_dots(found.difficulty)} &nbsp; importance {_dots(found.importance)} "
        f"&nbsp; about {found.minutes} minutes &nbsp; {hints}"
    )
    body = f'<div style="opacity:.8">{facts}</div><div style="margin-top:.4em">{inline_code(found.task)}</div>'
    plain = (
        f"Exercise {number}: {found.title} (difficulty {found.difficulty}/5, importance {found.importance}/5, "
        f"{found.minutes} minutes)\n{found.task}"
    )
    show({"text/html": card(f"Exercise {number}: {inline_code(found.title)}", body), "text/plain": plain})


def check(number: str, answer: Callable[..., Any] | Any) -> None:
    """Compare an answer with the reference and show the outcome; the empty stub is "not attempted yet".

    The outcome is recorded as "exercise <number>" (1 passed, 0 not attempted), which is how CI knows that
    every solution passes.

    Raises:
        CheckFailed: the answer is wrong, or raised; the message names the input, what was expected and what was got.
    """
    found = find_exercise(number)
    if answer is None or answer is ...:
        _show_outcome(number, passed=False)
        return
    try:
        found.check(answer)
    except NotImplementedError:
        _show_outcome(number, passed=False)
        return
    except CheckFailed as failure:
        _show_failure(number, str(failure))
        raise
    except Exception as failure:
        text = _what_raised(answer, failure)
        _show_failure(number, text)
        raise CheckFailed(text) from failure
    _show_outcome(number, passed=True)


def _what_raised(answer: Any, failure: Exception) -> str:
    """Which line of the answer raised; or that the check could not use the answer, or what it returned."""
    code = getattr(answer, "__code__", None)
    frames = list(traceback.walk_tb(failure.__traceback__))
    if not any(frame.f_code is code for frame, _ in frames):
        return f"your answer does not fit the task: {type(failure).__name__}: {failure}"
    line = [line for frame, line in frames if frame.f_code.co_filename == code.co_filename][-1]
    source = linecache.getline(code.co_filename, line).strip()
    return f"your answer raised {type(failure).__name__}: {failure}" + (f"\nin line {line}: {source}" if source else "")


def hint(number: str, upto: int | None = None) -> None:
    """Show the hints given so far and one more; `upto` shows that many instead.

    How many were shown is kept in the kernel's own memory and nowhere else.

    Raises:
        ValueError: `upto` is less than 1.
    """
    found = find_exercise(number)
    if upto is not None and upto < 1:
        raise ValueError(f"hint({number!r}, upto={upto}): ask for 1 to {len(found.hints)} hints")
    if not found.hints:  # the student edition
        text = f"Exercise {number}: hints are not in this edition; ask your teacher"
        show({"text/html": card(text, "", "idle"), "text/plain": text})
        return
    shown = _shown_in_this_kernel()
    count = upto if upto is not None else shown.get(number, 0) + 1
    count = min(count, len(found.hints))
    shown[number] = count
    items = "".join(f"<li>{inline_code(text)}</li>" for text in found.hints[:count])
    left = len(found.hints) - count
    ending = f"{left} more: run this cell again" if left else "that was the last one; the solution is in solutions/"
    plain = "\n".join(f"{index}. {text}" for index, text in enumerate(found.hints[:count], 1))
    title = f"Exercise {number}: hint {count} of {len(found.hints)}"
    body = f'<ol style="margin:.2em 0">{items}</ol><em>{ending}</em>'
    show({"text/html": card(title, body), "text/plain": f"{title}\n{plain}\n({ending})"})


def _shown_in_this_kernel() -> dict[str, int]:
    try:
        from IPython import get_ipython
    except ImportError:
        return {}
    shell = get_ipython()
    return {} if shell is None else shell.user_ns.setdefault(HINTS_SHOWN, {})


def _show_failure(number: str, text: str) -> None:
    further = f"<div>One step further: <code>hint({number!r})</code></div>" if find_exercise(number).hints else ""
    body = preformatted(text) + further
    show({"text/html": card(f"Exercise {number}: not yet", body, "bad"), "text/plain": text})


def _show_outcome(number: str, passed: bool) -> None:
    text = f"Exercise {number}: {'correct' if passed else 'not attempted yet'}"
    html = card(text, "", "good" if passed else "idle")
    show(record_bundle(f"exercise {number}", int(passed)) | {"text/html": html, "text/plain": text})


def _dots(count: int) -> str:
    return "●" * count + "○" * (5 - count)
