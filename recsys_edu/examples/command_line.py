"""What the training programs' command lines share: checked numbers, defaults in --help, one line for a user's mistake.

    parser = make_parser("train_dlrm", "Train DLRM.")
    add_option(parser, "--steps", type=whole_number(1), default=100, help="steps to train")
    args = parser.parse_args(["--steps", "0"])
    CommandLineError: argument --steps: expected a whole number of 1 or more, got '0' (see --help)

In a notebook that is an exception like any other. `run_program` prints it without a traceback and ends with status 2.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from recsys_edu.datasets.download import DataUnavailableError
from recsys_edu.distributed.checkpoint import CheckpointError
from recsys_edu.interrupts import ends_when_interrupted, program_name

MOST_LINES = 3  # of an error


class CommandLineError(ValueError):
    """What is wrong with the arguments, or with what they name, in one line."""


# ------------------------------------------------------------ types of arguments


def whole_number(at_least: int) -> Callable[[str], int]:
    """An argparse type.

    >>> whole_number(1)("1_000")
    1000
    """

    def parsed(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or value < at_least:
            raise argparse.ArgumentTypeError(f"expected a whole number of {at_least} or more, got {text!r}")
        return value

    return parsed


def number(
    above: float | None = None, at_least: float | None = None, below: float = math.inf
) -> Callable[[str], float]:
    """An argparse type: a finite number, larger than `above` (or `at_least` so large) and smaller than `below`.

    >>> number(above=0)("3e-3")
    0.003
    """
    limits = [f"above {above:g}"] if above is not None else []
    limits += [f"of {at_least:g} or more"] if at_least is not None else []
    limits += [f"below {below:g}"] if below != math.inf else []
    expected = " ".join(["a number", " and ".join(limits)]).strip()

    def parsed(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        is_inside = math.isfinite(value) and value < below
        is_inside &= (above is None or value > above) and (at_least is None or value >= at_least)
        if not is_inside:
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return parsed


def existing_folder(text: str) -> Path:
    """An argparse type."""
    path = Path(text).expanduser()
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is {'no folder' if path.exists() else 'not there'}")
    return path


def folder_to_write(text: str) -> Path:
    """An argparse type: a folder that is there or can be made."""
    path = Path(text).expanduser()
    nearest = next((each for each in (path, *path.absolute().parents) if each.exists()), Path("/"))
    if not nearest.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} cannot be a folder: {str(nearest)!r} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"no permission to write into {str(nearest)!r}")
    return path


# ------------------------------------------------------------ parsers


def make_parser(program: str, description: str) -> argparse.ArgumentParser:
    """A parser for `python -m recsys_edu.examples.<program>` that raises CommandLineError."""
    name = f"python -m recsys_edu.examples.{program}"
    parser = argparse.ArgumentParser(prog=name, usage="%(prog)s [arguments]", description=description)
    parser.error = _refuse  # type: ignore[method-assign]
    return parser


def _refuse(message: str) -> None:
    raise CommandLineError(f"{message} (see --help)")


def add_option(parser: argparse.ArgumentParser, name: str, *, help: str, **settings: Any) -> None:
    """`add_argument` with the default in the help's text; write there what None stands for."""
    default = settings.get("default")
    shown = "" if default is None or default is False or "default:" in help else " (default: %(default)s)"
    parser.add_argument(name, help=help + shown, **settings)


# ------------------------------------------------------------ mistakes


@contextmanager
def users_mistakes() -> Iterator[None]:
    """Around what reads files and checks settings: its errors become CommandLineError, in one line.

    Not around the training itself: an error there is a bug, or news from another rank, and its traceback is needed.
    """
    try:
        yield
    except CommandLineError:
        raise
    except (OSError, ValueError, ImportError, NotImplementedError, CheckpointError, DataUnavailableError) as error:
        raise CommandLineError(one_line(error)) from error


def one_line(error: BaseException) -> str:
    """The error's text; of a long list only the beginning.

    >>> one_line(FileNotFoundError(2, "No such file or directory", "days/0_dense.npy"))
    'days/0_dense.npy: No such file or directory'
    """
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    more = f" (and {len(lines) - MOST_LINES} more)" if len(lines) > MOST_LINES else ""
    return " ".join(lines[:MOST_LINES]) + more if lines else type(error).__name__


def run_program(main: Callable[[], object]) -> None:
    """`main()` as a program: a mistake of its user ends it with one line and status 2, Ctrl-C with one line and 130.

    Under torchrun any other error is kept for its report, with the rank's traceback.
    """

    def guarded() -> None:
        try:
            main()
        except CommandLineError as mistake:
            print(f"{program_name()}: error: {mistake}", file=sys.stderr, flush=True)
            sys.exit(2)

    if "RANK" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import record

        guarded = record(guarded)
    with ends_when_interrupted():
        guarded()
