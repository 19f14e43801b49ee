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
import functools
from contextlib import ExitStack

import torch
import torch.distributed as dist

from recsys_edu.distributed import sharding_plan
from recsys_edu.distributed.comm import get_local_size
from recsys_edu.distributed.model_parallel import DefaultDataParallelWrapper, DistributedModelParallel
from recsys_edu.distributed.types import ShardingPlan
from recsys_edu.examples.command_line import (
    CommandLineError,
    add_option,
    existing_folder,
    folder_to_write,
    make_parser,
    number,
    run_program,
    users_mistakes,
    whole_number,
)
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
    """
    Raises:
        CommandLineError: an unknown argument, a bad value, or two that do not go together.
    """
    parser = make_parser("train_dlrm", __doc__.splitlines()[0])
    add = functools.partial(add_option, parser)
    positive = number(above=0)
    add("--dataset", choices=DATASETS, default="movielens", help="what to train on")
    add(
        "--data", type=existing_folder,
        help="folder of Criteo's .npy files, or of an unpacked MovieLens (default: MovieLens-100K, fetched once)",
    )  # fmt: skip
    add("--rows-per-table", type=whole_number(1), default=100_000, help="of Criteo's 26 tables (ids are hashed)")
    add("--batch-size", type=whole_number(1), default=1024, help="examples per step, of all ranks together")
    add("--epochs", type=whole_number(1), default=2, help="passes over the training part")
    add("--steps", type=whole_number(1), help="train so many, whatever the epochs (default: EPOCHS' number)")
    add("--dim", type=whole_number(1), default=16, help="columns of every table")
    add("--sharding", default="default", help="default, or names such as row_wise,grid_shard, dealt to the tables")
    add("--optimizer", choices=list(OPTIMIZERS), default="rowwise_adagrad", help="of the tables")
    add("--lr", type=positive, default=0.05, help="learning rate of the tables")
    add("--dense-lr", type=positive, default=0.02, help="of the rest, trained by Adagrad")
    add(
        "--out", type=folder_to_write,
        help="folder for metrics and checkpoints, the same one on every host (default: nothing is kept)",
    )  # fmt: skip
    add("--checkpoint-every", type=whole_number(0), default=0, help="steps; 0: only at the end")
    add("--keep", type=whole_number(1), default=2, help="checkpoints to keep")
    add("--evaluate-every", type=whole_number(0), help="steps; 0: only at the end (default: after every epoch)")
    add(
        "--patience", type=whole_number(1), help="stop after so many evaluations without a better entropy (default: no)"
    )
    add("--pipeline", choices=list(PIPELINES), default="sparse-dist", help="what overlaps; results are the same")
    add("--load-ahead", action="store_true", help="make batches in a thread of their own")
    add("--tensorboard", action="store_true", help="log to OUT/tensorboard too")
    add("--progress", action=argparse.BooleanOptionalAction, help="show a bar (default: in a terminal)")
    add("--log-every", type=whole_number(1), default=10, help="steps between looks at the losses")
    add("--seed", type=whole_number(0), default=0, help="of weights, and of the data's order")
    add("--timeout", type=positive, default=300.0, help="seconds to wait for a silent rank")
    args = parser.parse_args(argv)
    _check_together(args)
    return args


def _check_together(args: argparse.Namespace) -> None:
    if args.dataset == "criteo" and args.data is None:
        raise CommandLineError(
            "--dataset criteo needs --data FOLDER (see recsys_edu.datasets.criteo.BinaryCriteoUtils)"
        )
    if args.dataset == "synthetic-criteo" and args.data is not None:
        raise CommandLineError("--data: synthetic-criteo is made, not read; to read Criteo's files: --dataset criteo")
    for option, wanted in (("--tensorboard", args.tensorboard), ("--patience", args.patience is not None)):
        if wanted and args.out is None:
            raise CommandLineError(f"{option} needs --out FOLDER, where its files go")
    if args.patience is not None and args.evaluate_every == 0:
        raise CommandLineError("--patience counts evaluations, and --evaluate-every 0 makes only one, at the end")


def make_task(args: argparse.Namespace, rank: int, world_size: int) -> CTRTask:
    if args.batch_size % world_size:
        raise ValueError(f"--batch-size {args.batch_size} cannot be cut into {world_size} equal slices, one per rank")
    if args.dataset == "criteo":
        return criteo_task(args.data, args.rows_per_table, args.batch_size, args.dim, rank, world_size)
    if args.dataset == "synthetic-criteo":
        return synthetic_criteo_task(args.batch_size, args.dim, args.seed, rank, world_size)
    return movielens_task(args.batch_size, args.dim, args.seed, rank, world_size, args.data)


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


def make_trainer(args: argparse.Namespace, device: torch.device, rank: int, world_size: int) -> tuple[Trainer, int]:
    """A trainer at the run's last checkpoint, and the step where the run ends."""
    task = make_task(args, rank, world_size)
    if not task.steps_per_epoch:
        raise ValueError(f"--batch-size {args.batch_size}: the training part has fewer examples")
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
    trainer.resume()
    return trainer, args.steps if args.steps is not None else args.epochs * task.steps_per_epoch


def train(args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """The whole run; returns the last metrics.

    Raises:
        CommandLineError: the arguments ask for something that is not there, or that does not go with the run in --out.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    with users_mistakes():
        trainer, last_step = make_trainer(args, device, rank, world_size)
    if rank == 0:
        ranks = "1 rank" if world_size == 1 else f"{world_size} ranks"
        if trainer.step < last_step:
            print(f"{args.dataset}: steps {trainer.step} to {last_step} on {ranks}", flush=True)
        else:
            print(f"{args.dataset}: {args.out} is at step {trainer.step}; more --steps or --epochs go on", flush=True)
    metrics = trainer.fit(last_step)
    if rank == 0:
        early = f" (stopped early; the best was step {trainer.best_step})" if trainer.stopped_early else ""
        scores = f"AUC {metrics['auc']:.4f}, normalised entropy {metrics['ne']:.4f}"
        print(f"step {trainer.step}: {scores}{early}", flush=True)
    return metrics


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run with these arguments (default: the command line's), on the ranks that there are."""
    args = parse_arguments(argv)
    with ExitStack() as stack:
        with users_mistakes():
            device = stack.enter_context(process_group(args.timeout))
        return train(args, device)


if __name__ == "__main__":
    run_program(main)
