"""Train DLRM on MovieLens or Criteo with sharded tables, on one process, one host or many.

    python   -m recsys_edu.examples.train_dlrm --dataset movielens
    torchrun --nproc-per-node 2 -m recsys_edu.examples.train_dlrm --dataset synthetic-criteo --sharding row_wise
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1      # several hosts with restarts; on each of them:
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29400 --max-restarts 3 \\
        -m recsys_edu.examples.train_dlrm --dataset criteo --data DAYS --out SHARED_FOLDER --checkpoint-every 1000

With `--out` losses and metrics go to `metrics.jsonl` there, checkpoints to `step_<n>`. Started again, or restarted by
torchrun because a rank died, it goes on from the last complete checkpoint: to the same losses, bit for bit, as without
the interruption; also on another number of ranks or under another plan, then up to rounding.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.rendezvous import rendezvous

from recsys_edu.distributed import sharding_plan
from recsys_edu.distributed.checkpoint import FACTS_FILE, load_checkpoint, save_checkpoint
from recsys_edu.distributed.comm import get_local_rank, get_local_size
from recsys_edu.distributed.exchange import gather_objects
from recsys_edu.distributed.model_parallel import DefaultDataParallelWrapper, DistributedModelParallel
from recsys_edu.distributed.types import ShardingPlan
from recsys_edu.examples.ctr_tasks import DATASETS, CTRTask, criteo_task, movielens_task, synthetic_criteo_task
from recsys_edu.metrics.auc import AUCMetric
from recsys_edu.metrics.metrics_config import RecTaskInfo
from recsys_edu.metrics.ne import NEMetric
from recsys_edu.models.dlrm import DLRM, DLRMTrain
from recsys_edu.modules.embedding_modules import EmbeddingBagCollection
from recsys_edu.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from recsys_edu.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper
from recsys_edu.optim.optimizers import in_backward_optimizer_filter
from recsys_edu.optim.rowwise_adagrad import RowWiseAdagrad

TABLES_PATH = "model.sparse_arch.embedding_bag_collection"
OPTIMIZERS = {
    "rowwise_adagrad": RowWiseAdagrad,
    "adagrad": torch.optim.Adagrad,
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", choices=DATASETS, default="movielens")
    parser.add_argument("--data", type=Path, help="folder of Criteo's .npy files")
    parser.add_argument("--rows-per-table", type=int, default=100_000, help="of Criteo's 26 tables (ids are hashed)")
    parser.add_argument("--batch-size", type=int, default=1024, help="examples per step, of all ranks together")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--steps", type=int, help="this many, whatever the epochs")
    parser.add_argument("--dim", type=int, default=16, help="columns of every table")
    parser.add_argument("--sharding", default="default", help="names such as row_wise,grid_shard, dealt to the tables")
    parser.add_argument("--optimizer", choices=list(OPTIMIZERS), default="rowwise_adagrad", help="of the tables")
    parser.add_argument("--lr", type=float, default=0.05, help="of the tables")
    parser.add_argument("--dense-lr", type=float, default=0.02, help="of the rest, trained by Adagrad")
    parser.add_argument("--out", type=Path, help="folder for metrics and checkpoints, the same one on every host")
    parser.add_argument("--checkpoint-every", type=int, default=0, help="steps; 0: only at the end")
    parser.add_argument("--keep", type=int, default=2, help="checkpoints to keep")
    parser.add_argument("--log-every", type=int, default=10, help="steps between looks at the losses")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds to wait for a silent rank")
    return parser.parse_args(argv)


@contextmanager
def process_group(timeout: float) -> Iterator[torch.device]:
    """This rank's device; inside, a process group if torchrun started several ranks (or one)."""
    device = torch.device("cuda", get_local_rank(1, 0)) if torch.cuda.is_available() else torch.device("cpu")
    if "RANK" not in os.environ:
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    limit = timedelta(seconds=timeout)
    if life := os.environ.get("TORCHELASTIC_RESTART_COUNT"):
        # torchrun's own store outlives a restart; ranks must not meet the addresses of those that have died.
        _check_restarts()
        store, rank, world_size = next(rendezvous("env://", timeout=limit))
        store = dist.PrefixStore(f"life {life}", store) if os.environ.get("GROUP_WORLD_SIZE") == "1" else store
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=limit)
    else:
        dist.init_process_group(backend, timeout=limit)
    yield device
    dist.destroy_process_group()


def _check_restarts() -> None:
    """On several hosts each torchrun counts restarts for itself, so only a store of the ranks' own is safe."""
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    own_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "False"
    if restarts and not own_store and os.environ.get("GROUP_WORLD_SIZE") != "1":
        raise ValueError(
            "torchrun --max-restarts on several hosts: start it with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its "
            "environment, or a restarted rank may look for one that has died (pytorch issue 135712)"
        )


def make_task(args: argparse.Namespace, rank: int, world_size: int) -> CTRTask:
    if args.batch_size % world_size:
        raise ValueError(f"--batch-size {args.batch_size} cannot be cut into {world_size} equal slices, one per rank")
    if args.dataset == "criteo":
        if args.data is None:
            raise ValueError("--dataset criteo needs --data FOLDER (see recsys_edu.datasets.criteo.BinaryCriteoUtils)")
        return criteo_task(args.data, args.rows_per_table, args.batch_size, args.dim, rank, world_size)
    make = movielens_task if args.dataset == "movielens" else synthetic_criteo_task
    return make(args.batch_size, args.dim, args.seed, rank, world_size)


def named_plan(tables: EmbeddingBagCollection, names: str, world_size: int, device_type: str) -> ShardingPlan | None:
    """The sharding types in `names` dealt to the tables in turn; None (the default plan) for "default".

    Raises:
        ValueError: a name that is no sharding type.
    """
    if names == "default":
        return None
    local_size = get_local_size(world_size)
    num_hosts = world_size // local_size
    makers = {
        "data_parallel": lambda turn: sharding_plan.data_parallel(),
        "table_wise": lambda turn: sharding_plan.table_wise(turn % world_size),
        "row_wise": lambda turn: sharding_plan.row_wise(),
        "column_wise": lambda turn: sharding_plan.column_wise(),
        "table_row_wise": lambda turn: sharding_plan.table_row_wise(turn % num_hosts),
        "table_column_wise": lambda turn: sharding_plan.table_column_wise(turn % num_hosts),
        "grid_shard": lambda turn: sharding_plan.grid_shard(list(range(num_hosts))),
    }
    chosen = names.split(",")
    if unknown := [name for name in chosen if name not in makers]:
        raise ValueError(f"--sharding: no sharding type {unknown}; expected default, or some of {', '.join(makers)}")
    generators = {
        name: makers[chosen[turn % len(chosen)]](turn // len(chosen)) for turn, name in enumerate(tables.embedding_bags)
    }
    plan = sharding_plan.construct_module_sharding_plan(
        tables, generators, local_size=local_size, world_size=world_size, device_type=device_type
    )
    return ShardingPlan({TABLES_PATH: plan})


def make_model(
    args: argparse.Namespace, task: CTRTask, device: torch.device, rank: int, world_size: int
) -> tuple[DistributedModelParallel, KeyedOptimizer]:
    """DLRM, built without memory and given it shard by shard; and one optimizer over tables and dense layers."""
    tables = EmbeddingBagCollection(tables=task.tables, device=torch.device("meta"))
    apply_optimizer_in_backward(OPTIMIZERS[args.optimizer], tables.parameters(), {"lr": args.lr})
    dense, over = [64, args.dim], [64, 32, 1]
    model = DLRMTrain(DLRM(tables, task.num_dense, dense, over, dense_device=torch.device("meta")))
    torch.manual_seed(args.seed * 1_000_003 + rank)  # ranks hold different rows, which must not begin alike
    # DDP groups gradients anew after its first step, and with the groups changes the order in which three or more ranks
    # are added up; a restart would repeat that and round otherwise. Looking for unused parameters, it keeps its groups.
    # (There are none, which it remarks upon.)
    wrapper = DefaultDataParallelWrapper(static_graph=False, find_unused_parameters=True)
    plan = named_plan(tables, args.sharding, world_size, device.type)
    sharded = DistributedModelParallel(model, device=device, plan=plan, data_parallel_wrapper=wrapper)
    others = dict(in_backward_optimizer_filter(sharded.named_parameters()))
    dense_optimizer = KeyedOptimizerWrapper(others, lambda params: torch.optim.Adagrad(params, lr=args.dense_lr))
    return sharded, CombinedOptimizer([sharded.fused_optimizer, dense_optimizer])


class RunFolder:
    """Where a run keeps its metrics and checkpoints; rank 0 writes. Without `--out` nothing is kept.

    Lines are appended whole. What a killed run wrote beyond its last checkpoint is cut off when the run goes on.
    """

    def __init__(self, path: Path | None, rank: int) -> None:
        self.path, self.rank = path, rank
        self.metrics = path / "metrics.jsonl" if path is not None else None
        if path is not None and rank == 0:
            path.mkdir(parents=True, exist_ok=True)

    def write(self, lines: list[dict[str, object]]) -> None:
        if self.metrics is not None and self.rank == 0:
            with open(self.metrics, "a") as file:
                file.write("".join(json.dumps(line) + "\n" for line in lines))

    def cut_after(self, step: int) -> None:
        """Drop lines of later steps, and a line that was being written when the run ended."""
        if self.metrics is None or self.rank != 0 or not self.metrics.exists():
            return
        kept = [line for line in self.metrics.read_text().splitlines(True) if line.endswith("\n")]
        kept = [line for line in kept if json.loads(line)["step"] <= step]
        aside = self.metrics.with_suffix(".tmp")
        aside.write_text("".join(kept))
        os.replace(aside, self.metrics)

    def checkpoints(self) -> list[Path]:
        """Complete ones, oldest first, as rank 0 sees them."""
        found = list(self.path.glob("step_*")) if self.path is not None else []
        complete = [path for path in found if path.name[5:].isdigit() and (path / FACTS_FILE).exists()]
        group = dist.group.WORLD if dist.is_initialized() else None
        return gather_objects(sorted(complete, key=lambda path: int(path.name[5:])), group)[0]

    def drop_old(self, keep: int) -> None:
        for path in self.checkpoints()[:-keep]:
            if self.rank == 0:
                shutil.rmtree(path)


def evaluate(model: DistributedModelParallel, task: CTRTask, device: torch.device, rank: int, world_size: int):
    """AUC and normalised entropy over the test batches of all ranks, the same on every rank."""
    options = {"tasks": [RecTaskInfo(name="click")], "window_size": 2**40, "compute_on_all_ranks": True}
    metrics = [metric(world_size, rank, batch_size=1, **options).to(device) for metric in (AUCMetric, NEMetric)]
    model.eval()
    with torch.no_grad():
        for batch in task.test():
            _, (_, logits, labels) = model(batch.to(device))
            for metric in metrics:
                metric.update(predictions={"click": logits.sigmoid()}, labels={"click": labels}, weights=None)
    model.train()
    values = {key: float(value) for metric in metrics for key, value in metric.compute().items()}
    return {"auc": values["auc-click|window_auc"], "ne": values["ne-click|lifetime_ne"]}


def train(args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """The whole run; returns the last metrics."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    task = make_task(args, rank, world_size)
    model, optimizer = make_model(args, task, device, rank, world_size)
    folder = RunFolder(args.out, rank)
    data = {name: str(getattr(args, name)) for name in ("dataset", "data", "rows_per_table", "batch_size", "seed")}
    last_step = args.steps if args.steps is not None else args.epochs * task.steps_per_epoch
    first_step = 0
    if checkpoints := folder.checkpoints():
        saved = load_checkpoint(checkpoints[-1], model, optimizer)
        if saved["data"] != data:
            raise ValueError(f"{checkpoints[-1]} is of a run on other data: {saved['data']}, this one is on {data}")
        first_step = saved["step"]
    folder.cut_after(first_step)
    if rank == 0:
        print(f"{args.dataset}: steps {first_step} to {last_step} on {world_size} ranks", flush=True)
    losses: list[torch.Tensor] = []
    for step, batch in zip(range(first_step + 1, last_step + 1), task.train(first_step)):
        loss, _ = model(batch.to(device))
        optimizer.zero_grad(set_to_none=True)  # over kept gradients DDP divides, over fresh ones it multiplies by 1 / W
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        save = step == last_step or (args.checkpoint_every and step % args.checkpoint_every == 0)
        if save or len(losses) == args.log_every:
            folder.write(average_losses(losses, step))
            losses = []
        if save and args.out is not None:
            save_checkpoint(args.out / f"step_{step}", model, optimizer, {"step": step, "data": data})
            folder.drop_old(args.keep)
    metrics = evaluate(model, task, device, rank, world_size)
    folder.write([{"step": last_step, **metrics}])
    if rank == 0:
        print(f"step {last_step}: AUC {metrics['auc']:.4f}, normalised entropy {metrics['ne']:.4f}", flush=True)
    return metrics


def average_losses(losses: list[torch.Tensor], last_step: int) -> list[dict[str, object]]:
    """One line per step; the loss is the mean over all ranks' slices."""
    values = torch.stack(losses).double()
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    first = last_step - len(losses) + 1
    return [{"step": first + i, "loss": value} for i, value in enumerate(values.tolist())]  # host sync: to write them


@record
def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    with process_group(args.timeout) as device:
        train(args, device)


if __name__ == "__main__":
    main()
