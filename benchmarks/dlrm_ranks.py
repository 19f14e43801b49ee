"""One training step of the announcement's DLRM on two gloo ranks, for each sharding type, beside TorchRec.

    python benchmarks/dlrm_ranks.py [--rounds 15] [--threads 1]

As dlrm_step.py, 1 id per bag and a global batch of 2048. Both libraries' models live in the same two processes and
step by turns; a step takes as long as its slower rank. Plans are made by hand, because TorchRec's planner refuses
row-wise types on a CPU. Collectives are counted by torch's profiler, which sees those that gloo runs, whoever asked.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import CLOCKS, OURS, THEIRS, Gate, best, medians, parse_arguments, ratio, report
from benchmarks.dlrm_step import (
    DENSE,
    TINY_LAYERS,
    Examples,
    Layers,
    Step,
    dense_alone,
    library_batch,
    our_library,
    parallel_dlrm,
    parallel_step,
    random_examples,
    table_milliseconds,
    their_library,
)
from benchmarks.embedding_lookup import TINY, Sizes

WORLD_SIZE = 2
NUM_BATCHES = 4
LIMIT_S = 20.0  # for each sharding type
COPIES_FUSED = "data-parallel, SGD in backward"
SHARDINGS = ("table-wise", "column-wise", "row-wise", "table-row-wise", "data-parallel", COPIES_FUSED)


def generators(sharding: str, plans: Any, tables: Sequence[str]) -> dict[str, Any]:
    """Per table, what the library's plan module makes of a sharding type."""
    make: dict[str, Callable[[int], Any]] = {
        "table-wise": lambda i: plans.table_wise(rank=i % WORLD_SIZE),
        "column-wise": lambda i: plans.column_wise(ranks=list(range(WORLD_SIZE))),
        "row-wise": lambda i: plans.row_wise(),
        "table-row-wise": lambda i: plans.table_row_wise(host_index=0),
        "data-parallel": lambda i: plans.data_parallel(),
        COPIES_FUSED: lambda i: plans.data_parallel(),
    }
    return {table: make[sharding](index) for index, table in enumerate(tables)}


def make_examples(sizes: Sizes, rank: int) -> list[Examples]:
    return [random_examples(sizes, 1, seed=rank * NUM_BATCHES + index) for index in range(NUM_BATCHES)]


def make_step(library: SimpleNamespace, sharding: str, sizes: Sizes, layers: Layers, rank: int) -> Step:
    """The library's training step on this rank's batches."""

    fused = sharding != "data-parallel"

    def plan(plans: Any, collection: nn.Module) -> Any:
        tables = [config.name for config in collection.embedding_bag_configs()]
        made = plans.construct_module_sharding_plan(
            collection,
            generators(sharding, plans, tables),
            local_size=WORLD_SIZE,
            world_size=WORLD_SIZE,
            device_type="cpu",
        )
        for table in made.values():
            table.compute_kernel = "dense" if "data-parallel" in sharding else "fused"
        return made

    batches = [library_batch(library, sizes, each) for each in make_examples(sizes, rank)]
    return parallel_step(parallel_dlrm(library, sizes, layers, plan, fused), batches, fused)


def count_collectives(step: Step) -> dict[str, int]:
    """What gloo ran during one step, by kind."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    names = [event.name.removeprefix("gloo:") for event in profile.events() if event.name.startswith("gloo:")]
    return dict(Counter(names))


def time_ranks(steps: dict[str, Step], rounds: int, now: Callable[[], float]) -> dict[str, list[float]]:
    """Milliseconds of the slower rank, per library and round. Every rank gets the same numbers."""
    samples: dict[str, list[float]] = {name: [] for name in steps}
    deadline, order = time.monotonic() + LIMIT_S, list(steps)
    for turn in range(rounds):
        late = torch.tensor(float(time.monotonic() > deadline))
        dist.all_reduce(late)  # all ranks stop in the same round
        if turn >= 3 and late > 0:
            break
        for name in order if turn % 2 else order[::-1]:
            dist.barrier()
            start = now()
            steps[name]()
            elapsed = torch.tensor((now() - start) * 1e3)
            dist.all_reduce(elapsed, dist.ReduceOp.MAX)
            samples[name].append(elapsed.item())
    return samples


def run_rank(rank: int, store: str, tiny: bool, rounds: int, threads: int, clock: str, answers: Any) -> None:
    """A rank's whole life; rank 0 answers with a list of findings, one per sharding type."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD_SIZE)
    sizes, layers = (TINY, TINY_LAYERS) if tiny else (Sizes(batch_size=2048 // WORLD_SIZE), Layers())
    libraries = {OURS: our_library()}
    if (theirs := their_library()) is not None:
        libraries[THEIRS] = theirs
    findings = []
    for sharding in SHARDINGS:
        examples = make_examples(sizes, rank)
        steps, collectives, refusals = {}, {}, {}
        for name, library in libraries.items():
            steps[name + DENSE] = dense_alone(library, sizes, layers, examples, parallel=True)
            for _ in range(3):
                steps[name + DENSE]()
            collectives[name + DENSE] = count_collectives(steps[name + DENSE])
            try:
                step = make_step(library, sharding, sizes, layers, rank)
                for _ in range(3):  # DDP settles its buckets
                    step()
                collectives[name] = count_collectives(step)
                steps[name] = step
            except Exception as error:  # a refusal is a finding too
                if name == OURS:
                    raise
                refusals[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        findings.append((sharding, time_ranks(steps, rounds, CLOCKS[clock]), collectives, refusals))
        if rank == 0:
            print(f"{sharding} done", file=sys.stderr, flush=True)
        del steps, step
        gc.collect()
    dist.barrier()
    dist.destroy_process_group()
    if rank == 0:
        answers.put(findings)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(__doc__, argv, rounds=15, threads=1)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the ranks' profilers announce themselves
    answers = multiprocessing.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        settings = (
            f"file://{folder}/store",
            arguments.tiny,
            arguments.rounds,
            arguments.threads,
            arguments.clock,
            answers,
        )
        ranks = multiprocessing.spawn(run_rank, settings, nprocs=WORLD_SIZE, join=False)
        findings = answers.get() if _answered(ranks, answers) else []
        ranks.join()
    rows, gates = [], []
    for sharding, samples, collectives, refusals in findings:
        fastest, tables = best(samples), table_milliseconds(samples)
        for name, milliseconds in medians(samples).items():
            rows.append(
                {
                    "sharding": sharding,
                    "library": name,
                    "ms per step": milliseconds,
                    "fastest ms": fastest[name],
                    "of it tables, ms": tables[name],
                    "time / ours": ratio(samples, name, OURS),
                    "collectives": sum(collectives[name].values()),
                    "kinds": ", ".join(f"{count} {kind}" for kind, count in sorted(collectives[name].items())),
                }
            )
        for name, reason in refusals.items():
            missing = dict.fromkeys(["ms per step", "fastest ms", "of it tables, ms", "time / ours", "collectives"], "")
            rows.append({"sharding": sharding, "library": name, **missing, "kinds": f"refused: {reason}"})
        if THEIRS in samples:
            promise = f"times faster than TorchRec, 2 ranks, {sharding}"
            gates.append(Gate(promise, ratio(samples, THEIRS, OURS), at_least=1.3))
            gates.append(Gate(f"{promise}, without the dense layers", tables[THEIRS] / tables[OURS], at_least=1.3))
    report("dlrm_ranks", rows, gates, arguments.out)


def _answered(ranks: Any, answers: Any) -> bool:
    """Wait until rank 0 has answered; a rank that fails raises here."""
    while answers.empty():
        if ranks.join(timeout=0.2):
            break
    return not answers.empty()


if __name__ == "__main__":
    main()
