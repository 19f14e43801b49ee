"""What the HTTP server adds to a model, and what batching gives back: latency and throughput by number of clients.

    python benchmarks/serving.py

The model is a DLRM of Criteo's shape (26 int8 tables, 13 dense inputs), exported with the kernels at hand. `overhead`
is a lone client's median latency less the median time of `Package.predict` on the same request, both on this machine.
Clients and server share its processors. Always wall clock: waiting is what is measured. Both servers run throughout and
take turns with each other and the bare model, so that a busy moment of the machine does not strike one of them alone.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import Gate, parse_arguments, report
from recsys_edu.inference.load_test import LoadResult, ServerProcess, join_results, run_load
from recsys_edu.inference.modules import quantize_inference_model
from recsys_edu.inference.package import Package, export_package, load_package
from recsys_edu.inference.requests import join_requests, parse_request
from recsys_edu.models.dlrm import DLRM
from recsys_edu.modules.embedding_configs import EmbeddingBagConfig
from recsys_edu.modules.embedding_modules import EmbeddingBagCollection

NUM_TABLES, NUM_DENSE, DIM = 26, 13, 64
BOTTOM, TOP = [512, 256, DIM], [1024, 1024, 512, 256, 1]
CLIENTS, MOST_CLIENTS = (1, 2, 4, 8, 16, 32, 64), 32
TURNS = 3
MODES = {"batched": ("--max-batch", "256"), "one by one": ("--max-batch", "1")}


def write_model(path: Path, num_rows: int, small: bool) -> None:
    torch.manual_seed(0)
    configs = [EmbeddingBagConfig(num_rows, DIM, f"t{i}", feature_names=[f"f{i}"]) for i in range(NUM_TABLES)]
    bottom, top = ([DIM], [64, 1]) if small else (BOTTOM, TOP)
    model = DLRM(EmbeddingBagCollection(tables=configs), NUM_DENSE, bottom, top)
    export_package(quantize_inference_model(model), path, NUM_DENSE)


def random_contents(num_rows: int, count: int = 64) -> list[dict[str, Any]]:
    """Requests of one example, one id per feature."""
    generator = torch.Generator().manual_seed(1)
    dense = torch.rand(count, NUM_DENSE, generator=generator)
    ids = torch.randint(0, num_rows, (count, NUM_TABLES), generator=generator)
    return [
        {"examples": [{"dense": row.tolist(), "ids": {f"f{i}": [int(one)] for i, one in enumerate(line)}}]}
        for row, line in zip(dense, ids)
    ]


def bare_times(package: Package, contents: Sequence[dict[str, Any]], batch: int, rounds: int) -> list[float]:
    """Milliseconds of the model alone, ids checked, on `batch` requests at once."""
    requests = [parse_request(json.dumps(each).encode(), package.metadata, 1) for each in contents]
    times = []
    for turn in range(rounds + 5):
        chosen = [requests[(turn * batch + place) % len(requests)] for place in range(batch)]
        tensors = join_requests(chosen, package.metadata)
        start = time.perf_counter()
        package.predict(*tensors)
        times.append((time.perf_counter() - start) * 1e3)
    return times[5:]


def row_of(mode: str, result: LoadResult, bare: float) -> dict[str, object]:
    return {
        "mode": mode,
        "clients": result.clients,
        "answers/s": result.per_second,
        "p50 ms": result.percentile_ms(50),
        "p99 ms": result.percentile_ms(99),
        "refused": sum(count for status, count in result.statuses.items() if status != 200),
        "bare model ms": bare,
    }


def gates(rows: Sequence[dict[str, Any]]) -> list[Gate]:
    by_key = {(row["mode"], row["clients"]): row for row in rows}
    alone = by_key["batched", 1]
    crowd = max(clients for _, clients in by_key if clients <= MOST_CLIENTS)
    gain = by_key["batched", crowd]["answers/s"] / by_key["one by one", crowd]["answers/s"]
    overhead = max(alone["p50 ms"] - alone["bare model ms"], 1e-3)  # the noise of two medians can exceed it
    return [
        Gate("ms at the median over the bare model", overhead, at_most=2.0),
        Gate(f"times the answers of one by one, {crowd} clients", gain, at_least=5.0),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(__doc__, argv, rounds=200, threads=1)
    seconds = 0.3 if arguments.tiny else 3.0
    num_rows = 100 if arguments.tiny else 100_000
    clients = (1, 4) if arguments.tiny else CLIENTS
    contents = random_contents(num_rows)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        path = Path(folder) / "criteo.pt2"
        write_model(path, num_rows, arguments.tiny)
        package = load_package(path)
        servers = {
            mode: stack.enter_context(ServerProcess(path, *options, "--threads", str(arguments.threads)))
            for mode, options in MODES.items()
        }
        found: dict[tuple[str, int], list[LoadResult]] = {(mode, count): [] for mode in MODES for count in clients}
        bare: dict[int, list[float]] = {count: [] for count in clients}
        for _ in range(TURNS):
            for count in clients:
                bare[count] += bare_times(package, contents, count, -(-arguments.rounds // TURNS))
                for mode, server in servers.items():
                    found[mode, count].append(run_load(server.url, contents, count, seconds / TURNS))
    rows = [
        row_of(mode, join_results(results), statistics.median(bare[count if mode == "batched" else 1]))
        for (mode, count), results in found.items()
    ]
    report("serving", rows, gates(rows), arguments.out)


if __name__ == "__main__":
    main()
