"""Measuring on the reader's own machine: how long something takes, and how fast memory is.

Bandwidths are counted as bytes read plus bytes written, in GB/s (1e9 bytes). Medians, after a warm-up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def median_seconds(run: Callable[[], Any], min_run_time: float = 0.2) -> float:
    """The median time of one call of `run`, with as many threads as torch is set to use."""
    from torch.utils.benchmark import Timer

    run()  # the first call pays for allocation and for loading code
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=min_run_time).median


def copy_bandwidth(num_mib: int = 64, min_run_time: float = 0.2) -> float:
    """How fast memory streams: GB/s of copying `num_mib` MiB from one place to another."""
    source = torch.ones(num_mib * 2**18)
    target = torch.empty_like(source)
    seconds = median_seconds(lambda: target.copy_(source), min_run_time)
    return 2 * source.nbytes / seconds / 1e9


def gather_bandwidth(row_bytes: int, table_mib: int = 256, min_run_time: float = 0.2) -> float:
    """How fast memory gathers: GB/s of copying rows of `row_bytes` bytes from random places of a table.

    The table should be far larger than the caches; one number per 4 bytes.
    """
    dim = row_bytes // 4
    table = torch.ones(table_mib * 2**18 // dim, dim)
    num_rows = max(1, 8 * 2**20 // row_bytes)
    rows = torch.randint(0, len(table), (num_rows,))
    gathered = torch.empty(num_rows, dim)
    seconds = median_seconds(lambda: torch.index_select(table, 0, rows, out=gathered), min_run_time)
    return 2 * gathered.nbytes / seconds / 1e9
