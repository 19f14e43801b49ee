"""README's generated parts: notebooks (from their titles), reading order (from docstrings), results (from benchmarks).

    python scripts/readme.py            rewrite them
    python scripts/readme.py --check    exit 1 where the README is behind

A result file is what benchmarks/common.py writes: {"machine": {name: value}, "rows": [{column: value}]}. Its title
is the first sentence of the benchmark's docstring. Numbers are shown with three significant digits.
"""

from __future__ import annotations

import argparse
import ast
import html
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
LONGEST_OPEN_TABLE = 12  # rows
FIRST_NOTEBOOK = "notebooks/00_start_here.ipynb"

READING_ORDER = {
    "Data that comes in": [
        "recsys_edu/sparse/jagged.py",
        "recsys_edu/sparse/keyed_jagged.py",
        "recsys_edu/sparse/keyed.py",
        "recsys_edu/kernels/jagged_ops.py",
    ],
    "One process": [
        "recsys_edu/modules/embedding_configs.py",
        "recsys_edu/modules/embedding_modules.py",
        "recsys_edu/kernels/spec.py",
        "recsys_edu/kernels/reference.py",
        "recsys_edu/kernels/fbgemm.py",
        "recsys_edu/kernels/chunks.py",
        "recsys_edu/models/dlrm.py",
    ],
    "Many ranks": [
        "recsys_edu/distributed/sharding/tiling.py",
        "recsys_edu/distributed/sharding/table_wise.py",
        "recsys_edu/distributed/sharding/row_wise.py",
        "recsys_edu/distributed/layout.py",
        "recsys_edu/distributed/routing.py",
        "recsys_edu/distributed/exchange.py",
        "recsys_edu/distributed/flight.py",
        "recsys_edu/distributed/pooled_assembly.py",
        "recsys_edu/distributed/embeddingbag.py",
        "recsys_edu/distributed/model_parallel.py",
        "recsys_edu/distributed/checkpoint.py",
        "recsys_edu/distributed/simulation.py",
    ],
    "Around it": [
        "recsys_edu/datasets/movielens_ctr.py",
        "recsys_edu/metrics/rec_metric.py",
        "recsys_edu/metrics/ne.py",
        "recsys_edu/notebook/doctor.py",
    ],
}


def first_sentence(path: Path) -> str:
    """The first sentence of a module's docstring, on one line."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    if not docstring:
        raise ValueError(f"{path} has no module docstring")
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    sentence, stop, _ = paragraph.partition(". ")
    return sentence + ("." if stop else "")


def reading_order() -> str:
    """The table of files; one that does not exist is an error."""
    lines = ["| | file | what it is |", "|---|---|---|"]
    number = 0
    for chapter, names in READING_ORDER.items():
        lines.append(f"| | **{chapter}** | |")
        for name in names:
            number += 1
            text = first_sentence(ROOT / name).replace("|", "\\|")
            lines.append(f"| {number} | [{name.removeprefix('recsys_edu/')}]({name}) | {text} |")
    return "\n".join(lines)


def notebook_table(colab: Callable[[str], str] | None = None) -> str:
    """The table of notebooks, from the title and the promise in the first cell of each.

    `colab` makes of a notebook's path the address where Colab opens it.
    """
    lines = ["| notebook | its promise | time |", "|---|---|---|"]
    for path in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        first = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
        title = re.search(r"^# (.+)$", first, re.MULTILINE)
        promise = re.search(r"^\*\*The promise:\*\* (.+)$", first, re.MULTILINE)
        minutes = re.search(r"^\| Time \| (.+?) \|$", first, re.MULTILINE)
        if not (title and promise and minutes):
            raise ValueError(f"{path}: the first cell needs '# title', '**The promise:** ...' and '| Time | ... |'")
        name = f"notebooks/{path.name}"
        opens = f" ([Colab]({colab(name)}))" if colab is not None else ""
        lines.append(f"| [{title[1]}]({name}){opens} | {promise[1]} | {minutes[1]} |")
    return "\n".join(lines)


def notebooks() -> str:
    """The table, and where pyproject.toml declares a public address a badge of Binder and links to Colab."""
    from setup_cells import binder_link, colab_link, repository

    address = repository(ROOT)
    if address is None:
        return notebook_table()
    badge = f"[![Binder](https://mybinder.org/badge_logo.svg)]({binder_link(address, FIRST_NOTEBOOK)})"
    return f"{badge}\n\n{notebook_table(lambda name: colab_link(address, name))}"


def shown(value: object) -> str:
    """Three significant digits for numbers, without an exponent; anything else as it is.

    >>> shown(86.123), shown(1234.5), shown(0.01234), shown("ours")
    ('86.1', '1,234', '0.0123', 'ours')
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value).replace("|", "\\|")
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    text = f"{value:.3g}"
    return f"{value:f}" if "e" in text else text


def results() -> str:
    """One table for each committed result file, with the conditions it was measured under; long ones folded."""
    parts = []
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        title = first_sentence(RESULTS.parent / f"{path.stem}.py").rstrip(".")
        columns = list(result["rows"][0])
        rows = [[shown(row[column]) for column in columns] for row in result["rows"]]
        table = [columns, ["---"] * len(columns), *rows]
        lines = [*("| " + " | ".join(row) + " |" for row in table), "", f"Conditions: {conditions(result['machine'])}."]
        if len(rows) > LONGEST_OPEN_TABLE:
            opening = f"<details><summary><b>{html.escape(title, quote=False)}</b> ({len(rows)} rows)</summary>"
            lines = [opening, "", *lines, "", "</details>"]
        else:
            lines = [f"**{title}**", "", *lines]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) or "No measurement has been committed yet; `make bench` measures on your machine."


def conditions(machine: dict) -> str:
    """The machine, the versions and the command in one line."""
    named = {**machine, **machine.get("versions", {})}
    named.pop("versions", None)
    command = named.pop("command", None)
    texts = [f"{name.replace('_', ' ')} {value}" for name, value in named.items() if value is not None]
    return "; ".join(texts + ([f"`{command}`"] if command else []))


GENERATED = {"notebooks": notebooks, "reading order": reading_order, "results": results}


def with_generated_parts(text: str) -> str:
    """The README's text with what stands between each pair of markers made anew."""
    for name, make in GENERATED.items():
        opening, closing = f"<!-- generated: {name} (make readme) -->", f"<!-- end: {name} -->"
        before, found_opening, rest = text.partition(opening)
        _, found_closing, after = rest.partition(closing)
        if not (found_opening and found_closing):
            raise ValueError(f"README.md lacks the lines {opening} and {closing}, in this order")
        text = f"{before}{opening}\n\n{make()}\n\n{closing}{after}"
    return text


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where the README is behind")
    options = parser.parse_args(arguments)
    before = README.read_text(encoding="utf-8")
    after = with_generated_parts(before)
    if before == after:
        return 0
    if options.check:
        print("README.md is behind the docstrings or the results; run: make readme")
        return 1
    aside = README.with_suffix(".part")
    aside.write_text(after, encoding="utf-8", newline="\n")
    os.replace(aside, README)
    print("rewrote README.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
