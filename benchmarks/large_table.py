"""One table of 8 GiB, from the meta device, row-wise on four processes: what is the most memory any of them takes?

    python benchmarks/large_table.py              8 GiB, needs 12 GiB of free memory
    python benchmarks/large_table.py --tiny       64 MiB

Each rank initialises its quarter of the rows in place and trains with row-wise Adagrad. The peak is the kernel's
count of resident memory (ru_maxrss), so it includes Python, torch and FBGEMM.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import ROOT, Gate, parse_arguments, report
from recsys_edu.distributed.shard import shard
from recsys_edu.distributed.sharding_plan import row_wise
from recsys_edu.modules.embedding_configs import EmbeddingBagConfig
from recsys_edu.modules.embedding_modules import EmbeddingBagCollection
from recsys_edu.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from recsys_edu.optim.rowwise_adagrad import RowWiseAdagrad
from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor

RANKS, DIM, BATCH, IDS_PER_BAG, STEPS = 4, 64, 1024, 10, 5
ROWS, TINY_ROWS = 2**25, 2**18
MOST_PER_PROCESS_GIB = 3.5
RANK_ARGUMENT = "--as-rank-with-rows"


def main() -> None:
    arguments = parse_arguments(__doc__, threads=1)
    rows = TINY_ROWS if arguments.tiny else ROWS
    needed, free = 1.5 * rows * DIM * 4, available_bytes()
    if free is not None and free < needed:
        print(f"large_table: {needed / 2**30:.0f} GiB of free memory needed, {free / 2**30:.1f} there: not measured")
        return
    with tempfile.TemporaryDirectory() as folder:
        ranks = run_ranks(rows, arguments.threads, Path(folder))
    gib = rows * DIM * 4 / 2**30
    table = [{"rank": rank, **result} for rank, result in enumerate(ranks)]
    peak = max(result["peak GiB"] for result in ranks)
    gates = [Gate(f"a table of {gib:g} GiB on {RANKS} ranks: GiB of the largest process", peak, at_most=most(gib))]
    report("large_table", table, gates, arguments.out)


def most(table_gib: float) -> float:
    """What a process may take: 3.5 GiB for the table of 8; for a smaller one its share and 1.5 GiB for all else."""
    return MOST_PER_PROCESS_GIB if table_gib == 8 else table_gib / RANKS + 1.5


def run_ranks(rows: int, threads: int, folder: Path) -> list[dict[str, float]]:
    """Start the ranks, wait for all, and return what each wrote."""
    processes = []
    for rank in range(RANKS):
        command = [sys.executable, __file__, RANK_ARGUMENT, str(rows), "--rank", str(rank), "--folder", str(folder)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
        processes.append(subprocess.Popen(command, env=environment))
    codes = [process.wait() for process in processes]
    if any(codes):
        raise RuntimeError(f"ranks ended with codes {codes}")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


def run_as_rank(arguments: argparse.Namespace) -> None:
    store = dist.FileStore(str(arguments.folder / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=arguments.rank, world_size=RANKS)
    result = measure(arguments.rows)
    (arguments.folder / f"{arguments.rank}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def measure(rows: int) -> dict[str, float]:
    """Peaks of this process before there is a table, with its part of it, and after training."""
    torch.manual_seed(dist.get_rank())
    before = peak_gib()
    start = time.perf_counter()
    table = EmbeddingBagConfig(name="t", num_embeddings=rows, embedding_dim=DIM, feature_names=["f"])
    module = EmbeddingBagCollection(tables=[table], device=torch.device("meta"))
    apply_optimizer_in_backward(RowWiseAdagrad, module.parameters(), {"lr": 0.1})
    sharded = shard(module, row_wise())
    built, build_s = peak_gib(), time.perf_counter() - start
    lengths = torch.full((BATCH,), IDS_PER_BAG)
    batch = KeyedJaggedTensor.from_lengths_sync(["f"], torch.randint(0, rows, (BATCH * IDS_PER_BAG,)), lengths)
    target = torch.randn(BATCH, DIM)
    losses = []
    for _ in range(STEPS):
        loss = (sharded(batch).values() - target).square().mean()
        loss.backward()
        losses.append(loss.item())
    if not losses[-1] < losses[0]:
        raise RuntimeError(f"it does not learn: losses {losses}")
    return {
        "without table GiB": before,
        "with its part GiB": built,
        "peak GiB": peak_gib(),
        "build s": build_s,
        "first loss": losses[0],
        "last loss": losses[-1],
    }


def peak_gib() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def available_bytes() -> int | None:
    """Memory that is free or can be freed; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


if __name__ == "__main__":
    if RANK_ARGUMENT in sys.argv:
        parser = argparse.ArgumentParser()
        parser.add_argument(RANK_ARGUMENT, type=int, dest="rows")
        parser.add_argument("--rank", type=int)
        parser.add_argument("--folder", type=Path)
        run_as_rank(parser.parse_args())
    else:
        main()
