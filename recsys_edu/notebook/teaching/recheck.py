"""One process that holds a student's definitions and runs the course's own checks on the answers, one after another.

    python -m recsys_edu.notebook.teaching.recheck NOTEBOOK RESULTS SEEDS 11.1 11.2 ...

RESULTS gets a line of JSON when an exercise begins and one when it ends, so that whoever started this process knows
which answer it hung in. The checks are loaded before any line of the student's is run, the notebook's own `check` and
`record` are never called, and afterwards the functions that the checks lean on must be those they were.
"""

from __future__ import annotations

import ast
import builtins
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any


def main(arguments: Sequence[str]) -> int:
    """Check the named exercises of one notebook; see the module."""
    import nbformat
    import torch

    from recsys_edu.notebook.exercise import find_exercise
    from recsys_edu.notebook.exercises import compare
    from recsys_edu.notebook.teaching.returned import answers_in, definitions_in

    notebook, results, seeds, *numbers = arguments
    checks = {number: find_exercise(number) for number in numbers}
    watched = [torch, torch.Tensor, torch.nn.functional, torch.linalg, builtins, compare, sys.modules["random"]]
    before = [dict(vars(each)) for each in watched]
    cells = [cell.source for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]
    answers, definitions = answers_in(cells), definitions_in(cells)
    namespace: dict[str, Any] = {"__name__": "__answers__", "profile": "ci"}
    with Path(results).open("a", encoding="utf-8") as file:

        def tell(**line: Any) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        _define(definitions, namespace)
        for number, seed in zip(numbers, json.loads(seeds)):
            tell(exercise=number)
            torch.manual_seed(seed)
            verdict, message = _verdict(checks[number].check, answers.get(number), namespace)
            changed = [name for each, old in zip(watched, before) for name in _changed(old, vars(each))]
            if changed:
                verdict, message = "tampered", f"the answer replaced {', '.join(changed[:5])}"
            tell(exercise=number, verdict=verdict, message=message[:2000])
            if changed:
                return 1
    return 0


def _define(definitions: Sequence[ast.stmt], namespace: dict[str, Any]) -> None:
    for statement in definitions:
        code = compile(ast.Module(body=[statement], type_ignores=[]), "<notebook>", "exec")
        with suppress(Exception):  # what an answer needs of it will be missed, and named, when it is checked
            exec(code, namespace)


def _verdict(check: Any, answer: ast.expr | None, namespace: dict[str, Any]) -> tuple[str, str]:
    from recsys_edu.notebook.exercise import CheckFailed

    if answer is None:
        return "no answer", "the notebook does not call check() for it"
    try:
        value = eval(compile(ast.Expression(answer), "<answer>", "eval"), namespace)
        if value is None or value is ...:
            return "not attempted", ""
        check(value)
    except NotImplementedError:
        return "not attempted", ""
    except CheckFailed as failure:
        return "wrong", str(failure)
    except MemoryError as failure:
        return "memory", f"MemoryError: {failure}"
    except Exception as failure:
        text = f"{type(failure).__name__}: {failure}"
        return ("memory" if "can't allocate memory" in text else "wrong"), text
    return "correct", ""


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    missing = object()
    return [name for name, value in before.items() if not name.startswith("__") and now.get(name, missing) is not value]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
