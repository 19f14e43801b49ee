"""The student edition: everything a course needs, without solutions, without hints, in one zip that needs no git.

    recsys_edu student --out recsys_edu-student.zip            without hints
    recsys_edu student --out recsys_edu-student.zip --hints    with them

Left out: `notebooks/solutions/`, tests, benchmarks, and the lines that point to solutions. Hints stand in
`recsys_edu/notebook/exercises/*.py`; there they are replaced by an empty list, and `hint(...)` says that they are with
the teacher. The checks stay, since students run them; a check holds a reference, so who reads it finds an answer.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

FOLDER_IN_ZIP = "recsys_edu-course"
WHOLE_FILES = (
    "LICENSE",
    "GLOSSARY.md",
    "CONTRIBUTING.md",
    "Makefile",
    "pyproject.toml",
    "environment.yml",
    "data/README.md",
)
SCRIPTS = ("scripts/setup_env.py",)
PACKAGE = ("*.py", "py.typed")
SOLUTION_LINE = re.compile(r"^.*notebooks/solutions/.*$\n?", re.MULTILINE)
ZIP_DATE = (1980, 1, 1, 0, 0, 0)  # so that equal contents make equal zips

README = r"""# The course

You need Python 3.11 or newer, and a network once. Set up (minutes, once), fetch the data (once), see whether all is
well, and begin:

    python3 scripts/setup_env.py --extras notebooks
    .venv/bin/recsys_edu data fetch
    .venv/bin/recsys_edu doctor
    .venv/bin/jupyter lab notebooks/00_start_here.ipynb

On Windows:

    py -3.12 scripts\setup_env.py --extras notebooks
    .venv\Scripts\recsys_edu data fetch
    .venv\Scripts\recsys_edu doctor
    .venv\Scripts\jupyter lab notebooks\00_start_here.ipynb

On Colab or Kaggle, upload this zip beside the notebook, under the name recsys_edu-student.zip: the notebook's first
cell installs it.

On Linux without a GPU, set TORCH_INDEX_URL first to the address that the selector on pytorch.org's "Get started"
page shows after `--index-url` for Linux, Pip, CPU: it saves gigabytes.

The data is MovieLens-100K. It is fetched from GroupLens, checked, and kept under `data/`. Its terms do not allow to
pass it on, so it is not in this folder. Without a network, lay the three files that the error message names there.

**Exercises.** Fill in the function and run the cell: `check("11.1", pieces)` compares with a reference on fresh inputs
and says what was expected. {hints}

**Handing in.** Save the notebook under its own name and hand in the file. An answer is checked again from its
definition, apart from the rest of the notebook: it may use imports, your own functions and constants, and nothing that
an earlier cell of the notebook computed.
"""
WITH_HINTS = '`hint("11.1")` gives one hint at a time.'
WITHOUT_HINTS = "Hints are with your teacher."


def write_student_edition(root: Path, out: Path, *, hints: bool = False) -> list[str]:
    """Write the zip from the checkout at `root`; the names in it.

    Raises:
        FileNotFoundError: `root` is no checkout of the project.
        OSError: the zip cannot be written; what `out` held before is still there.
    """
    if not (root / "notebooks").is_dir() or not (root / "pyproject.toml").is_file():
        raise FileNotFoundError(f"{root} is no checkout: it has no notebooks/ and pyproject.toml")
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".{out.name}.part")
    names = []
    try:
        with zipfile.ZipFile(aside, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, text in student_files(root, hints):
                info = zipfile.ZipInfo(f"{FOLDER_IN_ZIP}/{name}", ZIP_DATE)
                info.compress_type = zipfile.ZIP_DEFLATED
                info.external_attr = 0o644 << 16
                archive.writestr(info, text)
                names.append(name)
        os.replace(aside, out)
    finally:
        aside.unlink(missing_ok=True)
    return names


def student_files(root: Path, hints: bool) -> Iterator[tuple[str, str]]:
    """(name, text) of every file of the student edition."""
    yield "README.md", README.format(hints=WITH_HINTS if hints else WITHOUT_HINTS)
    for name in (*WHOLE_FILES, *SCRIPTS):
        if (root / name).is_file():
            yield name, (root / name).read_text(encoding="utf-8")
    for path in sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        yield f"notebooks/{path.name}", without_solution_lines(path.read_text(encoding="utf-8"))
    for pattern in PACKAGE:
        for path in sorted((root / "recsys_edu").rglob(pattern)):
            text = path.read_text(encoding="utf-8")
            is_exercises = path.parent.name == "exercises" and path.stem.startswith("nb")
            yield path.relative_to(root).as_posix(), text if hints or not is_exercises else without_hints(text)


def without_hints(source: str) -> str:
    """Python source with every `hints=...` argument of an `Exercise` replaced by `hints=()`.

    >>> without_hints('Exercise("01.1", hints=("first", "second"), check=f)')
    'Exercise("01.1", hints=(), check=f)'
    """
    spans = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Exercise":
            spans += [each.value for each in node.keywords if each.arg == "hints"]
            if len(node.args) > 6:
                spans.append(node.args[6])
    data = source.encode()  # ast counts columns in bytes
    starts = [0]
    for line in data.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for node in sorted(spans, key=lambda each: -(starts[each.lineno - 1] + each.col_offset)):
        begin = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        data = data[:begin] + b"()" + data[end:]
    return data.decode()


def without_solution_lines(notebook: str) -> str:
    """A notebook's text without outputs and without the lines that say where the solutions are."""
    content = json.loads(notebook)
    for cell in content["cells"]:
        if cell["cell_type"] == "markdown":
            text = SOLUTION_LINE.sub("", "".join(cell["source"])).lstrip("\n")
            cell["source"] = text.splitlines(keepends=True)
        else:
            cell |= {"outputs": [], "execution_count": None}
    content["cells"] = [cell for cell in content["cells"] if "".join(cell["source"]).strip()]
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def main(arguments: Sequence[str]) -> int:
    """The command `recsys_edu student`."""
    parser = argparse.ArgumentParser(prog="recsys_edu student", description="Write the student edition, a zip.")
    parser.add_argument("--out", type=Path, default=Path("dist/recsys_edu-student.zip"))
    parser.add_argument("--hints", action="store_true", help="leave the hints in")
    options = parser.parse_args(arguments)
    try:
        names = write_student_edition(Path(__file__).resolve().parents[3], options.out, hints=options.hints)
    except OSError as error:  # no checkout; or a full disk, where a zip from before is kept
        print(f"the student edition was not written: {error}", file=sys.stderr)
        return 1
    print(f"{options.out}: {len(names)} files, {options.out.stat().st_size / 2**20:.1f} MiB, no solutions")
    return 0
