"""What every benchmark shares: the machine, fair timing, a table, a JSON file.

Contestants are timed in turn, round after round, so that a noisy neighbour or a warming CPU hits all of them alike.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def machine_info() -> dict[str, object]:
    """Processor, threads, versions and the command: what a number means nothing without."""
    versions = {}
    for name in ("torch", "fbgemm-gpu-cpu", "fbgemm-gpu", "torchrec"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
        "command": shlex.join(["python", *sys.argv]),
    }


def time_ms(
    contestants: Mapping[str, Callable[[], object]], rounds: int = 20, budget_ms: float = 20.0
) -> dict[str, float]:
    """Median milliseconds per call of each contestant, over `rounds` interleaved rounds.

    A round calls a contestant as often as fits into `budget_ms` (at least once), so short calls are averaged.
    """
    repeats = {}
    for name, call in contestants.items():
        call()  # caches, allocator, lazy imports
        repeats[name] = max(1, int(budget_ms / max(_elapsed_ms(call, 1), 1e-3)))
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, call in contestants.items():
            times[name].append(_elapsed_ms(call, repeats[name]) / repeats[name])
    return {name: statistics.median(samples) for name, samples in times.items()}


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


def write_result(name: str, rows: Sequence[Mapping[str, object]]) -> Path:
    """Write `results/<name>.json`: machine, versions, command and the rows; whole or not at all."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps({"machine": machine_info(), "rows": list(rows)}, indent=1) + "\n")
    os.replace(aside, path)
    return path


def _elapsed_ms(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # kernels run behind the caller's back
    return (time.perf_counter() - start) * 1e3


def _shown(cell: object) -> str:
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
