"""Training pipelines beside the plain loop on two gloo ranks, without and with delay added to the link.

    python benchmarks/pipeline.py [--rounds 12] [--threads 1]

The announcement's DLRM with 26 tables x 20k x 64, row-wise, 1 id per bag, global batch 1024. The delay is added to
every exchange of the embeddings: it arrives so many milliseconds after its start, whatever is computed meanwhile. DDP's
all-reduce of dense gradients is not delayed. TorchRec's pipelines, where installed, run without delay only.

A sample is the mean of several steps in a row, as in training: ranks meet before it, not before every step. The larger
part of a step is the dense layers, torch's own in both libraries; each library's are timed alone as well, with fixed
embeddings, and "of it tables" is a step less those. With `--clock cpu` nothing is delayed, since waiting costs no CPU.
"""

from __future__ import annotations

import itertools
import logging
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import CLOCKS, OURS, THEIRS, Gate, Samples, best, medians, parse_arguments, ratio, report
from benchmarks.dlrm_ranks import WORLD_SIZE, generators, time_ranks
from benchmarks.dlrm_step import (
    DENSE,
    TINY_LAYERS,
    Layers,
    Step,
    dense_alone,
    library_batch,
    our_library,
    parallel_dlrm,
    random_examples,
    their_library,
    training_step,
)
from benchmarks.embedding_lookup import LEARNING_RATE, TINY, Sizes
from recsys_edu.distributed.slow_link import SlowLink

NUM_BATCHES, IDS_PER_BAG, DELAYS_MS = 4, 1, (0.0, 20.0)
STEPS_PER_SAMPLE = 4
PLAIN, BASE, SPARSE, PREFETCH = "plain loop", "TrainPipelineBase", "TrainPipelineSparseDist", "Prefetch...SparseDist"
OUR_KINDS = (PLAIN, BASE, SPARSE, PREFETCH)
THEIR_SPARSE = f"{THEIRS} {SPARSE}"


def make_model(library: SimpleNamespace, sizes: Sizes, layers: Layers) -> nn.Module:
    """The DLRM, tables row-wise and trained in backward."""

    def plan(plans: Any, collection: nn.Module) -> Any:
        tables = [config.name for config in collection.embedding_bag_configs()]
        made = plans.construct_module_sharding_plan(
            collection,
            generators("row-wise", plans, tables),
            local_size=WORLD_SIZE,
            world_size=WORLD_SIZE,
            device_type="cpu",
        )
        for table in made.values():
            table.compute_kernel = "fused"
        return made

    return parallel_dlrm(library, sizes, layers, plan, fused=True)


def make_steps(sizes: Sizes, layers: Layers, rank: int) -> tuple[dict[str, Step], list[SlowLink]]:
    """A step function per contestant and for either library's dense layers, and the links of our models."""
    from recsys_edu.distributed import train_pipeline as ours

    examples = [random_examples(sizes, IDS_PER_BAG, seed=rank * NUM_BATCHES + index) for index in range(NUM_BATCHES)]
    steps: dict[str, Step] = {}
    links = []
    for name, library in ((OURS, our_library()), (THEIRS, their_library())):
        if library is not None:
            steps[name + DENSE] = dense_alone(library, sizes, layers, examples, parallel=True)
    kinds = {
        PLAIN: None,
        BASE: ours.TrainPipelineBase,
        SPARSE: ours.TrainPipelineSparseDist,
        PREFETCH: ours.PrefetchTrainPipelineSparseDist,
    }
    for name, kind in kinds.items():
        library = our_library()
        model = make_model(library, sizes, layers)
        links.append(SlowLink(model.module.model.sparse_arch.embedding_bag_collection.shards.exchange))
        steps[name] = _step(kind, model, [library_batch(library, sizes, each) for each in examples])
    if (library := their_library()) is not None:
        from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

        batches = [library_batch(library, sizes, each) for each in examples]
        steps[THEIR_SPARSE] = _step(TrainPipelineSparseDist, make_model(library, sizes, layers), batches)
    return steps, links


def _step(kind: Any, model: nn.Module, batches: Sequence[Any]) -> Step:
    trained = [p for name, p in model.named_parameters() if "embedding_bags" not in name]
    if kind is None:
        return training_step(model, trained, batches)
    pipeline = kind(model, torch.optim.SGD(trained, lr=LEARNING_RATE), torch.device("cpu"))
    turns = itertools.cycle(batches)
    return lambda: pipeline.progress(turns)


def several(step: Step, count: int) -> Step:
    """`count` steps in a row."""

    def steps() -> None:
        for _ in range(count):
            step()

    return steps


def run_rank(rank: int, store: str, tiny: bool, rounds: int, threads: int, clock: str, answers: Any) -> None:
    """A rank's whole life; rank 0 answers with the samples for each delay."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD_SIZE)
    sizes = TINY if tiny else Sizes(num_rows=20_000, batch_size=1024 // WORLD_SIZE)
    steps, links = make_steps(sizes, TINY_LAYERS if tiny else Layers(), rank)
    findings = {}
    steps = {name: several(step, STEPS_PER_SAMPLE) for name, step in steps.items()}
    for delay_ms in DELAYS_MS if clock == "wall" else (0.0,):
        for link in links:
            link.delay_ms = delay_ms
        chosen = {name: step for name, step in steps.items() if name in OUR_KINDS or not delay_ms}
        for step in chosen.values():
            step()  # DDP settles its buckets, pipelines fill
        found = time_ranks(chosen, rounds, CLOCKS[clock])
        findings[delay_ms] = {name: [ms / STEPS_PER_SAMPLE for ms in times] for name, times in found.items()}
    dist.barrier()
    dist.destroy_process_group()
    if rank == 0:
        answers.put(findings)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(__doc__, argv, rounds=12, threads=1)
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
        while answers.empty() and not ranks.join(timeout=0.2):
            pass
        findings = answers.get() if not answers.empty() else {}
        ranks.join()
    rows, gates = [], []
    for delay_ms, samples in findings.items():
        rows += make_rows(delay_ms, samples)
        gates += make_gates(delay_ms, samples)
    report("pipeline", rows, gates, arguments.out)


def make_rows(delay_ms: float, samples: Samples) -> list[dict[str, object]]:
    fastest, tables = best(samples), table_milliseconds(samples)
    return [
        {
            "delay ms": delay_ms,
            "contestant": name,
            "ms per step": milliseconds,
            "fastest ms": fastest[name],
            "of it tables, ms": tables.get(name, ""),
            "plain loop / time": ratio(samples, PLAIN, name),
        }
        for name, milliseconds in medians(samples).items()
    ]


def table_milliseconds(samples: Samples) -> dict[str, float]:
    """What the tables add to a step: its median less that of the same library's dense layers. Without delay only."""
    found = medians(samples)
    dense_of = {name: THEIRS if name == THEIR_SPARSE else OURS for name in found if not name.endswith(DENSE)}
    return {name: found[name] - found[of + DENSE] for name, of in dense_of.items() if of + DENSE in found}


def make_gates(delay_ms: float, samples: Samples) -> list[Gate]:
    gates = [
        Gate(
            f"{SPARSE} over the {PLAIN}, {delay_ms:g} ms delay",
            ratio(samples, PLAIN, SPARSE),
            at_least=1.3 if delay_ms else 0.97,
        )
    ]
    if THEIR_SPARSE in samples:
        promise, tables = f"times faster than {THEIR_SPARSE}", table_milliseconds(samples)
        gates.append(Gate(promise, ratio(samples, THEIR_SPARSE, SPARSE), at_least=1.3))
        faster = tables[THEIR_SPARSE] / tables[SPARSE]
        gates.append(Gate(f"{promise}, without the dense layers", faster, at_least=1.3))
    return gates


if __name__ == "__main__":
    main()
