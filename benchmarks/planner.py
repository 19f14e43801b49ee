"""How long planning takes and how good the plans are, beside TorchRec's planner where it is installed.

    python benchmarks/planner.py [--rounds 3]

Both costs are TorchRec's own estimate of the busiest rank's milliseconds, so the comparison is on its terms. The large
problems are the trillion-parameter models and 10,000 tables on 1,024 ranks; TorchRec does not finish those.
"""

from __future__ import annotations

import logging
import random
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import Gate, parse_arguments, report
from benchmarks.embedding_lookup import torchrec_or_none
from recsys_edu.distributed.planner import EmbeddingShardingPlanner, Topology
from recsys_edu.distributed.planner.constants import GIB
from recsys_edu.distributed.planner.planners import chosen_options
from recsys_edu.distributed.sharding_plan import get_default_sharders
from recsys_edu.modules.embedding_configs import EmbeddingBagConfig
from recsys_edu.modules.embedding_modules import EmbeddingBagCollection

Shapes = Sequence[tuple[int, int]]

TRILLION_125 = [(4, 10**9, 256), (40, 25 * 10**6, 128), (100, 5 * 10**6, 128), (500, 5 * 10**5, 64), (140, 10**6, 128)]
TRILLION_3 = [(10, 10**9, 256), (100, 25 * 10**6, 128), (150, 5 * 10**6, 128), (500, 5 * 10**5, 64), (62, 10**6, 128)]
TEN_THOUSAND = [(2000, 10**6, 64), (3000, 10**5, 128), (5000, 10**4, 32)]

# name, tables, ranks, ranks per host, GiB per rank
LARGE = [
    ("1.25T parameters", TRILLION_125, 128, 8, 80),
    ("3T parameters", TRILLION_3, 128, 8, 141),
    ("10,000 tables", TEN_THOUSAND, 1024, 8, 32),
]
SMALL = [(10, 2, 2), (10, 4, 2), (20, 4, 4), (20, 8, 4), (30, 8, 8), (30, 16, 8), (50, 16, 8)]


def repeated(spec: Sequence[tuple[int, int, int]]) -> Shapes:
    return [(rows, columns) for count, rows, columns in spec for _ in range(count)]


def random_shapes(seed: int, count: int) -> Shapes:
    rng = random.Random(seed)
    return [(int(10 ** rng.uniform(3, 7)), rng.choice([32, 64, 128, 256])) for _ in range(count)]


def collection(shapes: Shapes, config: type = EmbeddingBagConfig, kind: type = EmbeddingBagCollection) -> Any:
    tables = [
        config(name=f"t{i}", num_embeddings=rows, embedding_dim=columns, feature_names=[f"f{i}"])
        for i, (rows, columns) in enumerate(shapes)
    ]
    return kind(tables=tables, device=torch.device("meta"))


def timed(call: Callable[[], Any], rounds: int) -> tuple[Any, float]:
    """The last answer, and the median of the seconds."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        answer = call()
        seconds.append(time.perf_counter() - start)
    return answer, statistics.median(seconds)


def large_row(name: str, shapes: Shapes, world_size: int, local_size: int, gib: float) -> dict[str, object]:
    model = collection(shapes)
    topology = Topology(world_size, "cuda", hbm_cap=int(gib * GIB), local_world_size=local_size)
    planner = EmbeddingShardingPlanner(topology=topology)
    plan, seconds = timed(lambda: planner.plan(model, get_default_sharders()), 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "problem": name,
        "tables": len(shapes),
        "ranks": world_size,
        "seconds": seconds,
        "ms": plan.cost_ms,
        "bound ms": plan.lower_bound_ms,
        "peak GiB": peak / GIB,
        "torchrec s": "-",
        "torchrec ms": "-",
        "times faster": "-",
        "cost ratio": "-",
    }


def small_row(seed: int, count: int, world_size: int, local_size: int, rounds: int) -> dict[str, object]:
    """One random problem, solved by both; `cost ratio` is ours over theirs."""
    shapes = random_shapes(seed, count)
    model, topology = collection(shapes), Topology(world_size, "cuda", local_world_size=local_size)
    planner = EmbeddingShardingPlanner(topology=topology)
    plan, seconds = timed(lambda: planner.plan(model, get_default_sharders()), rounds)
    row = {
        "problem": f"random {seed}",
        "tables": count,
        "ranks": world_size,
        "seconds": seconds,
        "ms": plan.cost_ms,
        "bound ms": plan.lower_bound_ms,
        "peak GiB": "-",
        "torchrec s": "-",
        "torchrec ms": "-",
        "times faster": "-",
        "cost ratio": "-",
    }
    if torchrec_or_none() is None:
        return row
    their_seconds, their_cost, our_cost = with_torchrec(shapes, world_size, local_size, plan)
    row |= {
        "ms": our_cost,
        "torchrec s": their_seconds,
        "torchrec ms": their_cost,
        "times faster": their_seconds / seconds,
        "cost ratio": our_cost / their_cost,
    }
    return row


def with_torchrec(shapes: Shapes, world_size: int, local_size: int, plan: Any) -> tuple[float, float, float]:
    """(seconds, cost of TorchRec's plan, cost of `plan`), both by TorchRec's estimators and performance model."""
    from torchrec import EmbeddingBagCollection as TheirCollection
    from torchrec import EmbeddingBagConfig as TheirConfig
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
    from torchrec.distributed.planner import EmbeddingShardingPlanner as TheirPlanner
    from torchrec.distributed.planner import Topology as TheirTopology
    from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
    from torchrec.distributed.planner.perf_models import NoopPerfModel
    from torchrec.distributed.planner.types import Shard, ShardingOption

    model = collection(shapes, TheirConfig, TheirCollection)
    topology = TheirTopology(world_size=world_size, local_world_size=local_size, compute_device="cuda")
    planner = TheirPlanner(topology=topology, batch_size=512, debug=False)
    _, seconds = timed(lambda: planner.plan(model, [EmbeddingBagCollectionSharder()]), 1)
    ours = [
        ShardingOption(
            name=option.name,
            tensor=model.embedding_bags[option.name].weight,
            module=("", model),
            input_lengths=[1.0],
            batch_size=512,
            sharding_type=option.sharding_type,
            partition_by=option.partition_by,
            compute_kernel=option.compute_kernel,
            shards=[Shard(size=s.size, offset=s.offset, rank=s.rank) for s in option.shards],
        )
        for option in chosen_options(plan.found, 512)
    ]
    enumerator = EmbeddingEnumerator(topology=topology, batch_size=512)
    enumerator.enumerate(model, [EmbeddingBagCollectionSharder()])
    enumerator.populate_estimates(ours)
    rate = NoopPerfModel(topology).rate
    return seconds, rate(planner._best_plan), rate(ours)


def gates(rows: Sequence[dict[str, Any]]) -> list[Gate]:
    by_name = {row["problem"]: row for row in rows}
    found = [
        Gate(f"seconds for {name}", by_name[name]["seconds"], at_most=limit)
        for name, limit in (("1.25T parameters", 5), ("3T parameters", 5), ("10,000 tables", 60))
        if name in by_name
    ]
    found += [
        Gate(f"GiB of memory after planning {name}", by_name[name]["peak GiB"], at_most=1)
        for name in ("1.25T parameters", "3T parameters")
        if name in by_name
    ]
    compared = [row for row in rows if row["cost ratio"] != "-"]
    if compared:
        found.append(Gate("worst cost over TorchRec's", max(r["cost ratio"] for r in compared), at_most=1.01))
        better = sum(r["cost ratio"] < 0.9999 for r in compared) / len(compared)
        found.append(Gate("share of problems with a better plan", better, at_least=0.5))
        found.append(Gate("least times faster than TorchRec", min(r["times faster"] for r in compared), at_least=20))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(__doc__, argv, rounds=3, threads=1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)  # TorchRec announces every topology
    large = [] if arguments.tiny else LARGE
    small = SMALL[:1] if arguments.tiny else SMALL
    small_row(0, 3, 2, 2, 1)  # imports and caches
    rows = [large_row(name, repeated(spec), *machines) for name, spec, *machines in large]
    rows += [small_row(seed, *problem, arguments.rounds) for seed, problem in enumerate(small)]
    report("planner", rows, gates(rows), arguments.out)


if __name__ == "__main__":
    main()
