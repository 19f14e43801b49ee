"""The commands behind `recsys_edu ...`; each imports what it needs when it is called, and the doctor needs no torch.

recsys_edu doctor                       what is installed and what to do about mismatches
recsys_edu data fetch                   MovieLens-100K into the cache
recsys_edu demo                         fetch the data, run notebook 00, train sharded on two ranks
recsys_edu notebooks run 02 --profile ci
recsys_edu serve film.pt2 --port 8000   a packaged model over HTTP
recsys_edu bench                        every benchmark of the checkout
recsys_edu student                      a zip of the course without solutions and hints
recsys_edu grade returned/ --out grades.csv
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

Command = Callable[[list[str]], int]


def doctor(arguments: list[str]) -> int:
    """what is installed, which kernels run and why, and the cure of each mismatch"""
    from recsys_edu.notebook.doctor import main as run_doctor

    return run_doctor()


def data(arguments: list[str]) -> int:
    """`data fetch` puts MovieLens-100K into the cache"""
    from recsys_edu.datasets.download import FOLDER_NAME, DataUnavailableError, fetch_movielens_100k

    if arguments[:1] != ["fetch"] or arguments[1:] not in ([], [FOLDER_NAME]):
        print(f"usage: recsys_edu data fetch [{FOLDER_NAME}]", file=sys.stderr)
        return 2
    try:
        print(f"MovieLens-100K: {fetch_movielens_100k()}")
    except DataUnavailableError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def notebooks(arguments: list[str]) -> int:
    """`notebooks run` executes notebooks and writes the report (`notebooks run --help`)"""
    from recsys_edu.notebook.__main__ import main as run_notebooks

    return run_notebooks(arguments)


def demo(arguments: list[str]) -> int:
    """MovieLens-100K through notebook 00, then sharded on two ranks: their numbers, and where the report lies"""
    start = time.monotonic()
    status = data(["fetch"]) or notebooks(["run", "00", "--profile", "course", *arguments]) or train_sharded()
    if status == 0:
        print(f"done in {time.monotonic() - start:.0f} s. Next: make lab, or open notebooks/ in any Jupyter")
    return status


def train_sharded(ranks: int = 2) -> int:
    """DLRM on MovieLens with its tables sharded over real ranks, through torchrun."""
    print(f"\nthe same data, the tables sharded over {ranks} processes:", flush=True)
    # one thread for each rank; no remark of torch's about a setting that the program has chosen
    os.environ.update(OMP_NUM_THREADS="1", TORCH_CPP_LOG_LEVEL="ERROR")
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    logging.getLogger("torch.distributed.elastic").setLevel(logging.ERROR)
    try:
        torchrun(
            ["--standalone", "--nproc-per-node", str(ranks), "-m", "recsys_edu.examples.train_dlrm", "--epochs", "1"]
        )
    except SignalException as interrupt:  # torchrun has ended its ranks
        raise KeyboardInterrupt from interrupt
    except ChildFailedError as failure:
        print(failure, file=sys.stderr)
        return 1
    return 0


def bench(arguments: list[str]) -> int:
    """every benchmark of the checkout, or those whose names contain one of the arguments"""
    folder = Path(__file__).resolve().parents[2] / "benchmarks"
    scripts = [path for path in sorted(folder.glob("*.py")) if path.stem not in ("common", "__init__")]
    scripts = [path for path in scripts if not arguments or any(text in path.stem for text in arguments)]
    if not scripts:
        print(f"no benchmark in {folder} matches {' '.join(arguments) or '*.py'}", file=sys.stderr)
        return 2
    failed = [path.name for path in scripts if run_script(path)]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def run_script(path: Path) -> int:
    """Its exit status; an interrupt is ours alone, and ends the script with all that it has started."""
    apart = {} if os.name == "nt" else {"process_group": 0}
    script = subprocess.Popen([sys.executable, str(path)], **apart)
    try:
        return script.wait()
    except BaseException:
        os.killpg(script.pid, signal.SIGKILL) if apart else script.kill()
        script.wait()
        raise


def student(arguments: list[str]) -> int:
    """the student edition: a zip of the course without solutions and hints (`student --help`)"""
    from recsys_edu.notebook.teaching.student import main as write_edition

    return write_edition(arguments)


def grade(arguments: list[str]) -> int:
    """returned notebooks into a CSV, each in a process with limits (`grade --help`)"""
    from recsys_edu.notebook.teaching.grade import main as grade_returned

    return grade_returned(arguments)


def serve(arguments: list[str]) -> int:
    """a packaged model over HTTP, with batching (`serve --help`)"""
    from recsys_edu.inference.serve import main as run_serve

    return run_serve(arguments)


COMMANDS: dict[str, Command] = {
    each.__name__: each for each in (doctor, data, demo, notebooks, serve, bench, student, grade)
}


def usage() -> str:
    lines = [f"  recsys_edu {name:<10} {command.__doc__}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: recsys_edu COMMAND ...", "", *lines])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 when it succeeded, 2 when there is no such command."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] in ([], ["-h"], ["--help"]):
        print(usage())
        return 0
    if arguments[0] not in COMMANDS:
        print(f"no command {arguments[0]!r}\n\n{usage()}", file=sys.stderr)
        return 2
    return COMMANDS[arguments[0]](arguments[1:])


if __name__ == "__main__":
    from recsys_edu.__main__ import main as program

    sys.exit(program())
