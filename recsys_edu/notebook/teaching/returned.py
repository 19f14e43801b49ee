"""Notebooks that came back: who returned which, and which answers stand in them.

returned/
    alice/11_table_wise.ipynb            a folder for each student, however deep inside (nbgrader's layout too)
    bob/week 3/11_table_wise.ipynb
    11_table_wise_carol.ipynb            or loose files: the rest of the name is the student
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHAPTER = re.compile(r"(?<!\d)(\d\d)[_ -][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Returned:
    """One notebook of one student."""

    student: str
    chapter: str
    path: Path


def find_returned(folder: Path, titles: dict[str, str]) -> list[Returned]:
    """Every notebook below `folder` that belongs to a chapter; `titles` maps "11" to "11_table_wise".

    Where a student returned a chapter several times, the file that was changed last counts.

    Raises:
        FileNotFoundError: `folder` does not exist or holds no notebook of the course.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    found: dict[tuple[str, str], Returned] = {}
    for path in sorted(folder.rglob("*.ipynb"), key=lambda each: each.stat().st_mtime):
        inside = path.relative_to(folder)
        chapter = _chapter(path.stem, titles)
        if chapter is None or any(part.startswith(".") for part in inside.parts):
            continue
        student = inside.parts[0] if len(inside.parts) > 1 else _student(path.stem, titles[chapter])
        found[student, chapter] = Returned(student, chapter, path.resolve())
    if not found:
        raise FileNotFoundError(
            f"no notebook of the course in {folder}: names begin or end like {min(titles.values())}"
        )
    return [found[key] for key in sorted(found)]


def answers_in(cells: list[Any]) -> dict[str, ast.expr]:
    """What each `check("11.1", answer)` of a notebook is given, by exercise; the last call counts."""
    answers = {}
    for tree in map(parse_cell, cells):
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "check":
                given = [*node.args, *(each.value for each in node.keywords if each.arg == "answer")]
                if len(given) == 2 and isinstance(given[0], ast.Constant):
                    answers[str(given[0].value)] = given[1]
    return answers


def definitions_in(cells: list[Any]) -> list[ast.stmt]:
    """What answers may need: imports, functions, classes, and assignments to plain names.

    Calls, loops and assignments into other objects (`torch.equal = ...`) are left out. Of cells without a `check`
    only constants are kept among the assignments, since the rest may train for minutes.
    """
    kept: list[ast.stmt] = []
    for tree in map(parse_cell, cells):
        checks = any(isinstance(node, ast.Call) and getattr(node.func, "id", "") == "check" for node in ast.walk(tree))
        for statement in tree.body:
            names_something = isinstance(statement, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef))
            if names_something or (_assigns_names(statement) and (checks or _is_constant(statement.value))):
                kept.append(statement)
    return kept


def parse_cell(source: str) -> ast.Module:
    """A cell as Python, its magics included; a cell that is no Python is empty."""
    from IPython.core.inputtransformer2 import TransformerManager

    try:
        return ast.parse(TransformerManager().transform_cell(source))
    except SyntaxError:
        return ast.Module(body=[], type_ignores=[])


def _assigns_names(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Assign) and all(isinstance(each, ast.Name) for each in statement.targets)


def _is_constant(node: ast.expr) -> bool:
    try:
        ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError):
        return False
    return True


def _chapter(stem: str, titles: dict[str, str]) -> str | None:
    for chapter, title in titles.items():
        if title in stem:
            return chapter
    found = CHAPTER.search(stem)
    return found[1] if found and found[1] in titles else None


def _student(stem: str, title: str) -> str:
    rest = stem.replace(title, "") if title in stem else CHAPTER.sub("", stem)
    return rest.strip(" _-") or "unknown"
