"""`python -m recsys_edu.notebook run [--profile ci] [NOTEBOOK ...] [-p NAME VALUE ...]`."""

from __future__ import annotations

import argparse
import ast
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recsys_edu.notebook.profiles import PROFILES


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run; 0 when every notebook ran to its end, 1 when one failed, 2 for a wrong call."""
    parser = argparse.ArgumentParser(prog="python -m recsys_edu.notebook", description="Run the notebooks.")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="execute notebooks, write the report, print the recorded numbers")
    run.add_argument("notebooks", nargs="*", metavar="NOTEBOOK", help="paths or beginnings of names: 02, solutions")
    run.add_argument("--profile", choices=PROFILES, default="ci")
    run.add_argument("-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    run.add_argument("--out", type=Path, default=None, help="where results go (default: notebooks/out)")
    run.add_argument("--timeout", type=float, default=1800, help="seconds allowed to each notebook (default: 1800)")
    run.add_argument("--jobs", type=int, default=None, help="how many at once (default: what memory allows)")
    run.add_argument("--no-html", action="store_true", help="write executed notebooks only")
    execute = commands.add_parser("execute", help="execute one notebook in this process")
    execute.add_argument("source", type=Path)
    execute.add_argument("executed", type=Path)
    execute.add_argument("parameters", type=json.loads)
    options = parser.parse_args(arguments)
    return _execute(options) if options.command == "execute" else _run(options)


def _run(options: argparse.Namespace) -> int:
    from recsys_edu.notebook.report import records_table, write_report
    from recsys_edu.notebook.runner import find_notebooks, notebook_name, notebooks_folder, run_notebooks

    try:
        notebooks = find_notebooks(options.notebooks)
        out = options.out or notebooks_folder() / "out"
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 2
    parameters = {"profile": options.profile} | {name: parse_value(text) for name, text in options.parameter}
    print(f"running {', '.join(map(notebook_name, notebooks))} (profile {options.profile})", flush=True)
    runs = run_notebooks(notebooks, parameters, out, timeout_s=options.timeout, jobs=options.jobs)
    for run in runs:
        print(f"{'ran   ' if run.error is None else 'FAILED'} {run.name} in {run.seconds:.1f} s")
    print(f"\n{records_table(runs)}\n", flush=True)
    for run in runs:
        if run.error is not None:
            print(f"FAILED {run.name}, {run.error}\n", file=sys.stderr)
    if not options.no_html:
        try:
            print(f"report: {write_report(runs, out, options.profile)}")
        except OSError as error:
            print(f"the report cannot be written: {error}", file=sys.stderr)
            return 1
    return 1 if any(run.error is not None for run in runs) else 0


def _execute(options: argparse.Namespace) -> int:
    from recsys_edu.notebook.runner import execute

    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that the kernel is shut down on the way out
    execute(options.source, options.executed, options.parameters)
    return 0


def parse_value(text: str) -> Any:
    """A parameter from the command line: a Python literal where it is one, else the text itself.

    >>> parse_value("0.5"), parse_value("sgd")
    (0.5, 'sgd')
    """
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


if __name__ == "__main__":
    sys.exit(main())
