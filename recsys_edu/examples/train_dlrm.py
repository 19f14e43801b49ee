"""Train DLRM on MovieLens or Criteo with sharded tables, on one process, one host or many.

    python   -m recsys_edu.examples.train_dlrm --dataset movielens
    torchrun --nproc-per-node 2 -m recsys_edu.examples.train_dlrm --dataset synthetic-criteo --sharding row_wise
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1      # several hosts with restarts; on each of them:
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29400 --max-restarts 3 \\
        -m recsys_edu.examples.train_dlrm --dataset criteo --data DAYS --out SHARED_FOLDER --checkpoint-every 1000

In a notebook's `%%ranks` cell: `train_dlrm.main(["--dataset", "movielens"])`. The loop itself is recsys_edu.training.

With `--out` losses and metrics go to `metrics.jsonl` there, checkpoints to `step_<n>`. Started again, or restarted by
torchrun because a rank died, it goes on from the last complete checkpoint: to the same losses, bit for bit, as without
the interruption; also on another number of ranks or under another plan, then up to rounding.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from recsys_edu.distributed import sharding_plan
from recsys_edu.distributed.comm import get_local_size
from recsys_edu.distributed.model_parallel import DefaultDataParallelWrapper, DistributedModelParallel
from recsys_edu.distributed.types import ShardingPlan
from recsys_edu.examples.ctr_tasks import DATASETS, CTRTask, criteo_task, movielens_task, synthetic_criteo_task
from recsys_edu.models.dlrm import DLRM, DLRMTrain
from recsys_edu.modules.embedding_modules import EmbeddingBagCollection
from recsys_edu.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from recsys_edu.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper
from recsys_edu.optim.optimizers import in_backward_optimizer_filter
from recsys_edu.optim.rowwise_adagrad import RowWiseAdagrad
from recsys_edu.training import PIPELINES, Schedule, Trainer, process_group

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
    parser.add_argument("--evaluate-every", type=int, help="steps; default: after every epoch; 0: only at the end")
    parser.add_argument("--patience", type=int, help="stop after so many evaluations without a better entropy")
    parser.add_argument("--pipeline", choices=list(PIPELINES), default="sparse-dist")
    parser.add_argument("--load-ahead", action="store_true", help="make batches in a thread of their own")
    parser.add_argument("--tensorboard", action="store_true", help="log to OUT/tensorboard too")
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, help="bar; default: in a terminal")
    parser.add_argument("--log-every", type=int, default=10, help="steps between looks at the losses")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds to wait for a silent rank")
    return parser.parse_args(argv)


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
    # (There are none, which it remarks upon.) The sum of two does not depend on the order.
    wrapper = DefaultDataParallelWrapper(static_graph=False, find_unused_parameters=world_size > 2)
    plan = named_plan(tables, args.sharding, world_size, device.type)
    sharded = DistributedModelParallel(model, device=device, plan=plan, data_parallel_wrapper=wrapper)
    others = dict(in_backward_optimizer_filter(sharded.named_parameters()))
    dense_optimizer = KeyedOptimizerWrapper(others, lambda params: torch.optim.Adagrad(params, lr=args.dense_lr))
    return sharded, CombinedOptimizer([sharded.fused_optimizer, dense_optimizer])


def train(args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """The whole run; returns the last metrics."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    task = make_task(args, rank, world_size)
    model, optimizer = make_model(args, task, device, rank, world_size)
    every = task.steps_per_epoch if args.evaluate_every is None else args.evaluate_every
    trainer = Trainer(
        model,
        optimizer,
        task.train,
        task.test,
        device=device,
        out=args.out,
        schedule=Schedule(args.checkpoint_every, every, args.log_every, args.keep, args.patience),
        pipeline=args.pipeline,
        data={name: str(getattr(args, name)) for name in ("dataset", "data", "rows_per_table", "batch_size", "seed")},
        steps_per_epoch=task.steps_per_epoch,
        load_ahead=args.load_ahead,
        tensorboard=args.tensorboard,
        progress=args.progress,
    )
    last_step = args.steps if args.steps is not None else args.epochs * task.steps_per_epoch
    first_step = trainer.resume()
    if rank == 0:
        print(f"{args.dataset}: steps {first_step} to {last_step} on {world_size} ranks", flush=True)
    metrics = trainer.fit(last_step)
    if rank == 0:
        early = f" (stopped early; the best was step {trainer.best_step})" if trainer.stopped_early else ""
        scores = f"AUC {metrics['auc']:.4f}, normalised entropy {metrics['ne']:.4f}"
        print(f"step {trainer.step}: {scores}{early}", flush=True)
    return metrics


@record
def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run with these arguments (default: the command line's), on the ranks that there are."""
    args = parse_arguments(argv)
    with process_group(args.timeout) as device:
        return train(args, device)


if __name__ == "__main__":
    main()
