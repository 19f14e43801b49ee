"""Notebooks are committed without outputs and with the same metadata: clean them, or (--check) name those that are not.

Differences then show what a person changed. Cell ids and tags stay; everything an editor or a run adds goes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
KEPT_CELL_METADATA = ("tags",)


def notebook_paths(root: Path = ROOT) -> list[Path]:
    """Every notebook of the course and its solutions; executed copies lie under notebooks/out and do not count."""
    found = sorted((root / "notebooks").rglob("*.ipynb"))
    return [path for path in found if not {"out", ".ipynb_checkpoints"} & set(path.relative_to(root).parts)]


def cleaned(notebook: dict) -> dict:
    """A copy without outputs, execution counts, editor metadata and the trailing empty code cells."""
    cells = []
    for cell in notebook["cells"]:
        kept = {key: cell["metadata"][key] for key in KEPT_CELL_METADATA if cell.get("metadata", {}).get(key)}
        fresh = {**cell, "metadata": kept}
        if cell["cell_type"] == "code":
            fresh |= {"outputs": [], "execution_count": None}
        cells.append(fresh)
    while cells and cells[-1]["cell_type"] == "code" and not "".join(cells[-1]["source"]).strip():
        cells.pop()
    return {**notebook, "cells": cells, "metadata": METADATA}


def complaints(notebook: dict) -> list[str]:
    """What is unclean about a notebook, in words; empty when nothing is."""
    found = []
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    if any(cell.get("outputs") for cell in code):
        found.append("has outputs")
    if any(cell.get("execution_count") is not None for cell in code):
        found.append("has execution counts")
    if notebook["metadata"] != METADATA:
        found.append(f"has metadata {json.dumps(notebook['metadata'])}")
    extra = {key for cell in notebook["cells"] for key in cell.get("metadata", {}) if key not in KEPT_CELL_METADATA}
    if extra:
        found.append(f"has cell metadata {', '.join(sorted(extra))}")
    if not found and cleaned(notebook) != notebook:
        found.append("ends with an empty code cell")
    return found


def replace_notebook(path: Path, notebook: dict) -> None:
    """Write a notebook the way all of them are written, atomically."""
    aside = path.with_suffix(".part")
    aside.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")
    os.replace(aside, path)


def rewrite(path: Path) -> bool:
    """Clean one file in place, atomically. Returns whether it changed."""
    before = path.read_text(encoding="utf-8")
    notebook = json.loads(before)
    if not complaints(notebook):
        return False
    replace_notebook(path, cleaned(notebook))
    return True


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where a notebook is not clean")
    options = parser.parse_args(arguments)
    unclean = 0
    for path in notebook_paths():
        name = path.relative_to(ROOT).as_posix()
        if not options.check:
            if rewrite(path):
                print(f"cleaned {name}")
            continue
        for complaint in complaints(json.loads(path.read_text(encoding="utf-8"))):
            print(f"{name} {complaint}; run: python scripts/clean_notebooks.py")
            unclean += 1
    return 1 if unclean else 0


if __name__ == "__main__":
    sys.exit(main())
