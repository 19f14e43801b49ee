"""The step simulator's prediction beside measured training steps on 1, 2 and 4 gloo ranks of this machine.

    python benchmarks/step_simulator.py [--rounds 6]

The announcement's DLRM, 26 tables x 100k x 64, 1 id per bag, global batch 2048, one thread per rank. The ranks
calibrate together, plan with what they measured, predict the step, and train: as a plain loop and with
TrainPipelineSparseDist, as is and with delay added to every exchange of embeddings. A step takes as long as its slowest
rank. `error` is the median over rounds of the predicted time over the measured one, less 1. Each round calibrates
before and after it measures, and `other load` is what else wanted a core when a world of ranks began (load average).
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import CLOCKS, Gate, parse_arguments, report
from benchmarks.dlrm_ranks import time_ranks
from benchmarks.dlrm_step import (
    NUM_BATCHES,
    TINY_LAYERS,
    Layers,
    Step,
    dlrm,
    library_batch,
    our_library,
    random_examples,
    training_step,
)
from benchmarks.embedding_lookup import LEARNING_RATE, TINY, Sizes
from recsys_edu.distributed.model_parallel import DistributedModelParallel
from recsys_edu.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from recsys_edu.distributed.planner.calibrate import Calibration, calibrate
from recsys_edu.distributed.planner.kernel_costs import dense_work
from recsys_edu.distributed.planner.report import PlannedSharding
from recsys_edu.distributed.planner.step_simulator import simulate_step
from recsys_edu.distributed.sharding_plan import get_default_sharders
from recsys_edu.distributed.slow_link import slow_link
from recsys_edu.distributed.train_pipeline import TrainPipelineSparseDist
from recsys_edu.distributed.types import PipelineType
from recsys_edu.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

WORLD_SIZES, DELAYS_MS, GLOBAL_BATCH = (1, 2, 4), (0.0, 20.0), 2048
LOOPS = {"plain loop": PipelineType.NONE, "TrainPipelineSparseDist": PipelineType.TRAIN_SPARSE_DIST}


def make_model(sizes: Sizes, layers: Layers) -> nn.Module:
    """The DLRM with tables that train in backward."""
    model = dlrm(our_library(), sizes, layers)
    tables = model.model.sparse_arch.embedding_bag_collection
    apply_optimizer_in_backward(torch.optim.SGD, tables.parameters(), {"lr": LEARNING_RATE})
    return model


def make_step(model: nn.Module, batches: Sequence[Any], pipeline: PipelineType) -> Step:
    trained = [p for name, p in model.named_parameters() if "embedding_bags" not in name]
    if pipeline is PipelineType.NONE:
        return training_step(model, trained, batches)
    optimizer = torch.optim.SGD(trained, lr=LEARNING_RATE)
    loop, turns = TrainPipelineSparseDist(model, optimizer, torch.device("cpu")), itertools.cycle(batches)
    return lambda: loop.progress(turns)


def compare(rank: int, world_size: int, sizes: Sizes, layers: Layers, rounds: int, now: Callable[[], float]) -> list:
    """Rows of (loop, delay, measured ms, predicted ms, predicted over measured, sharding types) for this world.

    Every round predicts, measures and predicts again, each time from a new calibration: what else the machine does
    meanwhile hits both alike, and a round's prediction is the mean of its two.
    """
    table_shapes, model = make_model(sizes, layers), make_model(sizes, layers)
    work, plan = dense_work(model), planned(calibrate(rounds=3), table_shapes, sizes, world_size)
    sharded = DistributedModelParallel(model, device=torch.device("cpu"), plan=plan)
    examples = [random_examples(sizes, 1, seed=rank * NUM_BATCHES + index) for index in range(NUM_BATCHES)]
    batches = [library_batch(our_library(), sizes, each) for each in examples]
    found = []
    for delay_ms in DELAYS_MS if world_size > 1 else DELAYS_MS[:1]:
        for name, pipeline in LOOPS.items():
            with slow_link(sharded, delay_ms):
                step, pairs = make_step(sharded, batches, pipeline), []
                for _ in range(3):  # DDP settles its buckets, the pipeline fills
                    step()

                def predict(pipeline: PipelineType = pipeline, delay_ms: float = delay_ms) -> float:
                    machine = calibrate(rounds=1)
                    again = planned(machine, table_shapes, sizes, world_size, like=plan)
                    kernels = dataclasses.replace(machine.kernels(), delay_ms=delay_ms)
                    return simulate_step(again, work, sizes.batch_size, kernels, pipeline).step_ms

                before = predict()
                for _ in range(rounds):
                    measured = statistics.median(time_ranks({name: step}, 3, now)[name])
                    after = predict()
                    pairs.append((measured, (before + after) / 2))
                    before = after
                del step
            shares = [predicted / measured for measured, predicted in pairs]
            measured, predicted = (statistics.median(column) for column in zip(*pairs))
            types = sorted(set(plan.to_frame()["sharding_type"].to_list()))
            found.append((name, delay_ms, measured, predicted, statistics.median(shares), ", ".join(types)))
    return found


def planned(
    machine: Calibration, model: nn.Module, sizes: Sizes, world_size: int, like: PlannedSharding | None = None
) -> PlannedSharding:
    """The planner's plan for the machine as it was measured; `like`: that plan's choices, costed anew."""
    constraints = None
    if like is not None:
        constraints = {
            choice.table: ParameterConstraints(
                sharding_types=[choice.sharding_type],
                compute_kernels=[choice.compute_kernel],
                ranks=None if choice.sharding_type == "data_parallel" else sorted(set(choice.ranks)),
            )
            for choice in like.explain()
        }
    topology = machine.topology(world_size)
    planner = EmbeddingShardingPlanner(topology=topology, batch_size=sizes.batch_size, constraints=constraints)
    return planner.plan(model, get_default_sharders())


def run_rank(rank: int, world_size: int, store: str, tiny: bool, rounds: int, threads: int, clock: str, answers: Any):
    """A rank's whole life; rank 0 answers."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    batch_size = GLOBAL_BATCH // world_size
    sizes, layers = (TINY, TINY_LAYERS) if tiny else (Sizes(batch_size=batch_size), Layers())
    found = compare(rank, world_size, sizes, layers, rounds, CLOCKS[clock])
    dist.barrier()
    dist.destroy_process_group()
    if rank == 0:
        answers.put(found)


def run_world(world_size: int, arguments: Any) -> list:
    answers = multiprocessing.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        settings = (arguments.tiny, arguments.rounds, arguments.threads, arguments.clock, answers)
        ranks = multiprocessing.spawn(
            run_rank, (world_size, f"file://{folder}/store", *settings), nprocs=world_size, join=False
        )
        while answers.empty() and not ranks.join(timeout=0.2):
            pass
        found = answers.get()
        ranks.join()
    return found


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(__doc__, argv, rounds=6, threads=1)
    rows = []
    for world_size in WORLD_SIZES[:2] if arguments.tiny else WORLD_SIZES:
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
        for loop, delay_ms, measured_ms, predicted_ms, share, types in run_world(world_size, arguments):
            rows.append(
                {
                    "ranks": world_size,
                    "loop": loop,
                    "delay ms": delay_ms,
                    "other load": load,
                    "plan": types,
                    "measured ms": measured_ms,
                    "predicted ms": predicted_ms,
                    "error": share - 1,
                }
            )
    errors = [abs(row["error"]) for row in rows]
    gates = [
        Gate("median error of the predicted step", statistics.median(errors), at_most=0.2),
        Gate("largest error of a predicted step", max(errors), at_most=0.4),
    ]
    report("step_simulator", rows, gates, arguments.out)


if __name__ == "__main__":
    main()
