"""Write the first code cell of every notebook, which lets it run anywhere, and the links that open it there.

    python scripts/setup_cells.py            write them
    python scripts/setup_cells.py --check    exit 1 where a notebook is behind

The cell does nothing where the course is installed (a clone, the student zip, Binder, pip). On Colab and Kaggle it
installs the course; anywhere else it says how. Where it installs from is declared once, as `Repository` under
[project.urls] in pyproject.toml: an address https://github.com/OWNER/NAME. While none is declared the cell takes the
student zip (`make student`) that lies beside the notebook, and there are no badges.
"""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from pathlib import Path
from urllib.parse import quote

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
TAG = "setup"
CELL_ID = "set-up"
STUDENT_ZIP = "recsys_edu-student.zip"
GITHUB = "https://github.com/"
SOURCE = """\
# Set-up: nothing to do where the course is installed. {how}.
import importlib.util
import os

if importlib.util.find_spec("recsys_edu") is None:
    if not {{"COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE"}} & set(os.environ):
        raise ImportError("no recsys_edu in this kernel. Start with `make lab`, or: %pip install -e {up}[notebooks]")
    %pip install -q "{requirement}"
"""


def repository(root: Path = ROOT) -> str | None:
    """The public address that pyproject.toml declares, None where it declares none on GitHub."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    address = project.get("urls", {}).get("Repository", "").rstrip("/")
    return address if address.startswith(GITHUB) else None


def cell_source(address: str | None, up: str = "..") -> str:
    """The set-up cell's text; `up` leads from the notebook's folder to the checkout."""
    if address is None:
        requirement, how = f"{STUDENT_ZIP}[notebooks]", f"On Colab or Kaggle, upload {STUDENT_ZIP} first"
    else:
        requirement, how = f"recsys_edu[notebooks] @ git+{address}", "On Colab and Kaggle this cell installs it"
    return SOURCE.format(how=how, up=up, requirement=requirement).rstrip("\n")


def colab_link(address: str, name: str, branch: str = "main") -> str:
    """Where Colab opens a notebook of a public GitHub repository; `name` is its path inside."""
    return f"https://colab.research.google.com/github/{address.removeprefix(GITHUB)}/blob/{branch}/{quote(name)}"


def binder_link(address: str, name: str, branch: str = "main") -> str:
    """Where Binder opens a notebook of a public GitHub repository."""
    place = quote(f"lab/tree/{name}", safe="")
    return f"https://mybinder.org/v2/gh/{address.removeprefix(GITHUB)}/{branch}?urlpath={place}"


def with_setup_cell(notebook: dict, source: str) -> dict:
    """A copy whose second cell is the set-up cell."""
    cells = [cell for cell in notebook["cells"] if TAG not in cell["metadata"].get("tags", ())]
    setup = {
        "cell_type": "code",
        "execution_count": None,
        "id": CELL_ID,
        "metadata": {"tags": [TAG]},
        "outputs": [],
        "source": source.splitlines(keepends=True),
    }
    return {**notebook, "cells": [*cells[:1], setup, *cells[1:]]}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where a notebook is behind")
    options = parser.parse_args(arguments)
    from clean_notebooks import notebook_paths, replace_notebook

    address, behind = repository(), []
    for path in notebook_paths(ROOT):
        inside = path.relative_to(ROOT).parts
        notebook = json.loads(path.read_text(encoding="utf-8"))
        wanted = with_setup_cell(notebook, cell_source(address, "/".join([".."] * (len(inside) - 1))))
        if notebook == wanted:
            continue
        behind.append("/".join(inside))
        if not options.check:
            replace_notebook(path, wanted)
    outcome = "is behind; run: make clean-notebooks" if options.check else "was written"
    for name in behind:
        print(f"{name}: its set-up cell {outcome}")
    return int(bool(behind) and options.check)


if __name__ == "__main__":
    sys.exit(main())
