"""What every benchmark shares: the machine, fair timing, a table, gates, a JSON file.

Contestants are timed in turn, round after round, in changing order, so that a noisy neighbour or a warming CPU hits
all of them alike. A ratio is the median over rounds of the ratio within a round.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
OURS, THEIRS = "recsys_edu", "torchrec"

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's mallopt

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""`cpu` counts what all threads of the process computed and leaves out what the machine did for others meanwhile."""

Samples = Mapping[str, Sequence[float]]
"""Contestant to milliseconds per call, one entry per round; entry i of every contestant is from the same round."""


@dataclass(frozen=True)
class Gate:
    """One promise about speed: what was measured, the bound, and on which side of it the number has to be."""

    promise: str
    measured: float
    at_least: float | None = None
    at_most: float | None = None

    @property
    def met(self) -> bool:
        low = self.at_least is None or self.measured >= self.at_least
        return low and (self.at_most is None or self.measured <= self.at_most)


def parse_arguments(
    description: str, argv: Sequence[str] | None = None, rounds: int = 20, threads: int = 2
) -> argparse.Namespace:
    """What every benchmark can be told: rounds, threads, where the result goes, and tiny sizes for a smoke test."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=rounds, help="how often each contestant is timed")
    parser.add_argument("--threads", type=int, default=threads, help="torch threads of a process")
    parser.add_argument(
        "--clock", choices=list(CLOCKS), default="wall", help="cpu: for busy machines, with --threads 1"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON result")
    parser.add_argument("--tiny", action="store_true", help="sizes that only show that it runs")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    return arguments


def machine_info() -> dict[str, object]:
    """Processor, memory, threads, versions, date, command: what a number means nothing without."""
    versions = {}
    for name in ("torch", "fbgemm-gpu-cpu", "fbgemm-gpu", "torchrec"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_GiB": _memory_gib(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
        "date": datetime.now(UTC).date().isoformat(),
        "command": _command(),
    }


def time_samples(
    contestants: Mapping[str, Callable[[], object]],
    rounds: int = 20,
    budget_ms: float = 20.0,
    limit_s: float = 30.0,
    clock: str = "wall",
) -> dict[str, list[float]]:
    """Milliseconds per call of each contestant in each of `rounds` interleaved rounds.

    A round calls a contestant as often as fits into `budget_ms` (at least once), so short calls are averaged. After
    `limit_s` seconds no further round begins, so a slow or busy machine gets fewer rounds, at least three.
    """
    keep_freed_memory()
    deadline = time.monotonic() + limit_s
    repeats = {}
    for name, call in contestants.items():
        call()  # caches, allocator, lazy imports
        repeats[name] = max(1, int(budget_ms / max(_elapsed_ms(call, 1, CLOCKS[clock]), 1e-3)))
    times: dict[str, list[float]] = {name: [] for name in contestants}
    order = list(contestants)
    for turn in range(rounds):
        if turn >= 3 and time.monotonic() > deadline:
            break
        start = turn % len(order)  # nobody always runs on what the same neighbour left in the caches
        for name in order[start:] + order[:start]:
            times[name].append(_elapsed_ms(contestants[name], repeats[name], CLOCKS[clock]) / repeats[name])
    return times


def keep_freed_memory() -> None:
    """Have glibc hand freed memory back to the process only, where there is glibc.

    By default it returns what lies on top of the heap to the system, and the next to allocate pays for getting it back
    page by page: a millisecond for 13 MB, and whom it hits depends on whose turn was before.
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        glibc = ctypes.CDLL(None)
        glibc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        glibc.mallopt(_M_MMAP_MAX, 0)


def medians(samples: Samples) -> dict[str, float]:
    """Median milliseconds per contestant."""
    return {name: statistics.median(times) for name, times in samples.items()}


def best(samples: Samples) -> dict[str, float]:
    """Fastest milliseconds per contestant: what is left when the neighbours' noise is gone."""
    return {name: min(times) for name, times in samples.items()}


def ratio(samples: Samples, numerator: str, denominator: str) -> float:
    """Median over rounds of one contestant's time over another's in the same round.

    >>> ratio({"slow": [4.0, 9.0, 4.0], "fast": [2.0, 3.0, 2.0]}, "slow", "fast")
    2.0
    """
    return statistics.median(a / b for a, b in zip(samples[numerator], samples[denominator], strict=True))


def time_ms(
    contestants: Mapping[str, Callable[[], object]], rounds: int = 20, budget_ms: float = 20.0
) -> dict[str, float]:
    """Median milliseconds per call of each contestant, over `rounds` interleaved rounds."""
    return medians(time_samples(contestants, rounds, budget_ms))


def print_table(rows: Sequence[Mapping[str, object]]) -> None:
    """Rows of equal keys as an aligned text table."""
    header = list(rows[0])
    lines = [header, *([_shown(row[name]) for name in header] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for line in lines:
        first, *rest = (
            cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths))
        )
        print("  ".join([first, *rest]))


def write_result(
    name: str, rows: Sequence[Mapping[str, object]], gates: Sequence[Gate] = (), folder: Path = RESULTS
) -> Path:
    """Write `<folder>/<name>.json`: machine, versions, command, the rows and the gates; whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    aside = path.with_suffix(".tmp")
    result: dict[str, object] = {"machine": machine_info(), "rows": list(rows)}
    if gates:
        result["gates"] = [asdict(gate) | {"met": gate.met} for gate in gates]
    aside.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(aside, path)
    return path


def report(name: str, rows: Sequence[Mapping[str, object]], gates: Sequence[Gate], folder: Path) -> None:
    """Print the table and the gates, write the JSON."""
    print_table(rows)
    for gate in gates:
        bound = f">= {gate.at_least:g}" if gate.at_least is not None else f"<= {gate.at_most:g}"
        print(f"{'met   ' if gate.met else 'MISSED'}  {gate.promise}: {gate.measured:.3g} ({bound})")
    path = write_result(name, rows, gates, folder)
    print(f"written to {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}\n")


def _elapsed_ms(call: Callable[[], object], repeats: int, now: Callable[[], float]) -> float:
    start = now()
    for _ in range(repeats):
        call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # kernels run behind the caller's back
    return (now() - start) * 1e3


def _shown(cell: object) -> str:
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def _command() -> str:
    """As a reader would type it at the root of the checkout; where the result went is left out."""
    program, *arguments = sys.argv
    if "--out" in arguments:
        place = arguments.index("--out")
        arguments = arguments[:place] + arguments[place + 2 :]
    path = Path(program).resolve()
    shown = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
    return shlex.join(["python", shown, *arguments])


def _memory_gib() -> int | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    except (AttributeError, ValueError, OSError):  # Windows
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
