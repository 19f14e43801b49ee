"""What the engine's tests share: tables, batches, plans, and the unsharded oracle they are compared with.

The oracle is one process with the joined batch: PyTorch's autograd through the unsharded collection, and the update
rules written out once more in float32 on dense gradients. Nothing here uses the engine's routing, exchange or kernels.

Suffixes: B local batch, W ranks, R rows, D columns.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from recsys_edu.distributed import sharding_plan as plans
from recsys_edu.distributed.sharding.tiling import Shard
from recsys_edu.distributed.simulation import forward_all, simulate
from recsys_edu.distributed.tiled_tensor import TiledTensor
from recsys_edu.distributed.types import ParameterSharding
from recsys_edu.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType
from recsys_edu.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from recsys_edu.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from recsys_edu.optim.rowwise_adagrad import RowWiseAdagrad
from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor
from recsys_edu.types import DataType

WIDTH = 16
OPTIMIZERS: Mapping[str, tuple[type[torch.optim.Optimizer], dict] | None] = {
    "dense": None,
    "sgd": (torch.optim.SGD, {"lr": 0.3}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.3, "eps": 1e-4}),
    "rowwise_adagrad": (RowWiseAdagrad, {"lr": 0.3, "eps": 1e-4}),
    "adam": (torch.optim.Adam, {"lr": 0.1, "eps": 1e-4}),
}
LEARNING_RATE_OF_DENSE = 0.3

# ---------------------------------------------------------------- tables and plans


def bag_tables(data_type: DataType = DataType.FP32) -> list[EmbeddingBagConfig]:
    """Two features in one table, one feature in two tables, MEAN and SUM, a table of fewer rows than ranks."""
    facts = [
        ("t0", 13, WIDTH, ["f0", "f1"], PoolingType.SUM),
        ("t1", 3, 2 * WIDTH, ["f1"], PoolingType.MEAN),
        ("t2", 20, WIDTH, ["f3", "f2"], PoolingType.MEAN),
    ]
    return [
        EmbeddingBagConfig(name=n, num_embeddings=r, embedding_dim=d, feature_names=f, pooling=p, data_type=data_type)
        for n, r, d, f, p in facts
    ]


def sequence_tables(data_type: DataType = DataType.FP32) -> list[EmbeddingConfig]:
    """The same for sequences, whose tables all have one width."""
    facts = [("t0", 13, ["f0", "f1"]), ("t1", 3, ["f1"]), ("t2", 20, ["f3", "f2"])]
    return [
        EmbeddingConfig(name=n, num_embeddings=r, embedding_dim=WIDTH, feature_names=f, data_type=data_type)
        for n, r, f in facts
    ]


def collection(tables: Sequence[EmbeddingBagConfig | EmbeddingConfig], weighted: bool = False, seed: int = 0):
    """The unsharded collection with weights around +-0.5."""
    pooled = isinstance(tables[0], EmbeddingBagConfig)
    module = EmbeddingBagCollection(list(tables), weighted) if pooled else EmbeddingCollection(list(tables))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(torch.rand(weight.shape, generator=generator) - 0.5)
    return module


def attach(module: nn.Module, optimizer: str) -> nn.Module:
    """The module with an optimizer attached to every table, so that its shards train in backward."""
    if OPTIMIZERS[optimizer] is not None:
        apply_optimizer_in_backward(OPTIMIZERS[optimizer][0], module.parameters(), OPTIMIZERS[optimizer][1])
    return module


def _uneven_rows(request: plans.TilingRequest) -> list[Shard]:
    """A third of the rows on the last rank, the rest on the first: not in rank order, not on every rank."""
    first = max(request.num_rows // 3, 1)
    columns = range(request.num_columns)
    return [
        Shard(request.table, range(first), columns, request.world_size - 1),
        Shard(request.table, range(first, request.num_rows), columns, 0),
    ]


def _student_tiling(request: plans.TilingRequest) -> list[Shard]:
    """Row blocks whose columns are cut differently, three of the shards on one rank."""
    cut, last, width = request.num_rows // 2, request.world_size - 1, request.num_columns
    return [
        Shard(request.table, range(cut), range(4), last),
        Shard(request.table, range(cut), range(4, width), 0),
        Shard(request.table, range(cut, request.num_rows), range(width - 8), last // 2),
        Shard(request.table, range(cut, request.num_rows), range(width - 8, width), last),
    ]


# For table number i on w ranks in hosts of h ranks each.
TYPES: Mapping[str, Callable[[int, int, int], Callable]] = {
    "table_wise": lambda i, w, h: plans.table_wise(rank=(i + 1) % w),
    "row_wise": lambda i, w, h: plans.row_wise(),
    "column_wise": lambda i, w, h: plans.column_wise(),
    "table_row_wise": lambda i, w, h: plans.table_row_wise(host_index=i % (w // h)),
    "last_host": lambda i, w, h: plans.table_row_wise(host_index=w // h - 1),  # the other hosts own nothing
    "table_column_wise": lambda i, w, h: plans.table_column_wise(host_index=(i + 1) % (w // h)),
    "grid": lambda i, w, h: plans.grid_shard(host_indexes=list(range(w // h))[:: 1 if i % 2 else -1]),
    "data_parallel": lambda i, w, h: plans.data_parallel(),
    "uneven_row_wise": lambda i, w, h: plans.custom(_uneven_rows),
    "custom": lambda i, w, h: plans.custom(_student_tiling),
    "mixed": lambda i, w, h: [plans.data_parallel(), plans.table_row_wise(w // h - 1), plans.column_wise([w - 1, 0])][
        i
    ],
}


def plan_of(module: nn.Module, kind: str, world_size: int, local_size: int) -> Mapping[str, ParameterSharding]:
    """A plan that shards every table by `kind`; attach optimizers before."""
    names = list(module.embedding_bags if hasattr(module, "embedding_bags") else module.embeddings)
    generators = {name: TYPES[kind](index, world_size, local_size) for index, name in enumerate(names)}
    return plans.construct_module_sharding_plan(
        module, generators, local_size=local_size, world_size=world_size, device_type="cpu"
    )


# ---------------------------------------------------------------- batches


def features_of(tables: Sequence[EmbeddingBagConfig | EmbeddingConfig]) -> dict[str, int]:
    """Feature to the number of ids that all its tables know, in an order of its own, with one feature nobody reads."""
    rows: dict[str, int] = {"unread": 10**6}
    for table in reversed(tables):
        for feature in table.feature_names:
            rows[feature] = min(table.num_embeddings, rows.get(feature, 10**9))
    return rows


def make_batch(
    rows_of_feature: Mapping[str, int], batch_size: int, weighted: bool, generator: torch.Generator, longest: int = 4
) -> KeyedJaggedTensor:
    """Random bags of 0 to `longest` ids."""
    lengths, values = [], []
    for rows in rows_of_feature.values():
        lengths.append(torch.randint(0, longest + 1, (batch_size,), generator=generator))
        values.append(torch.randint(0, rows, (int(lengths[-1].sum()),), generator=generator))
    ids = torch.cat(values)
    weights = torch.rand(ids.numel(), generator=generator) + 0.5 if weighted else None
    return KeyedJaggedTensor(list(rows_of_feature), ids, weights, lengths=torch.cat(lengths), stride=batch_size)


def batches_of_step(
    tables: Sequence[EmbeddingBagConfig | EmbeddingConfig], world_size: int, step: int, weighted: bool = False
) -> list[KeyedJaggedTensor]:
    """One batch per rank, of unequal sizes; the last rank has none in step 2."""
    generator = torch.Generator().manual_seed(100 * world_size + step)
    sizes = [3, 1, 4, 2]
    if step == 2 and world_size > 1:
        sizes[world_size - 1] = 0
    rows = features_of(tables)
    return [make_batch(rows, sizes[rank], weighted, generator) for rank in range(world_size)]


def join(batches: Sequence[KeyedJaggedTensor]) -> KeyedJaggedTensor:
    """The batches of all ranks as one: feature by feature, rank after rank."""
    keys = batches[0].keys()
    parts = [[batch[key] for batch in batches] for key in keys]
    weighted = batches[0].weights_or_none() is not None
    return KeyedJaggedTensor(
        keys,
        torch.cat([part.values() for of_key in parts for part in of_key]),
        torch.cat([part.weights() for of_key in parts for part in of_key]) if weighted else None,
        lengths=torch.cat([part.lengths() for of_key in parts for part in of_key]),
        stride=sum(batch.stride() for batch in batches),
    )


# ---------------------------------------------------------------- answers and losses


def blocks_of(answer) -> list[Tensor]:
    """A KeyedTensor's values, or every sequence's rows, as a list."""
    return [answer.values()] if not isinstance(answer, Mapping) else [part.values() for part in answer.values()]


def loss_of(answer, seed: int = 0) -> Tensor:
    """A loss whose gradient depends on the answer and differs in every column."""
    loss = torch.zeros(())
    for index, block in enumerate(blocks_of(answer)):
        scale_D = torch.linspace(0.2, 1.0 + index, block.shape[1]) if block.dim() > 1 else 1.0
        loss = loss + (scale_D * (block - 0.3).square()).sum() * 0.1
    return loss


# ---------------------------------------------------------------- the oracle


@dataclass
class Cell:
    """A rectangle of a table with optimizer state of its own."""

    rows: slice
    columns: slice
    state: dict[str, Tensor]


class Oracle:
    """An unsharded collection trained on joined batches, one explicit update rule per optimizer.

    `plan` only says which rectangles have their own row-wise state (one number per row and column block).
    """

    def __init__(
        self, module: nn.Module, optimizer: str, plan: Mapping[str, ParameterSharding], world_size: int
    ) -> None:
        self.module, self.optimizer, self.world_size, self.num_steps = module, optimizer, world_size, 0
        tables = self.module.embedding_bags if hasattr(module, "embedding_bags") else self.module.embeddings
        self.configs = (
            module.embedding_bag_configs() if hasattr(module, "embedding_bags") else module.embedding_configs()
        )
        self.weights = {name: table.weight for name, table in tables.items()}
        copied = [name for name, sharding in plan.items() if sharding.sharding_type == "data_parallel"]
        # Copies with an optimizer in backward are trained there like shards; the others by whoever trains the model.
        self.replicated = set(copied) if OPTIMIZERS[optimizer] is None else set()
        self.cells = {name: self._cells(weight, plan[name]) for name, weight in self.weights.items()}

    @staticmethod
    def _cells(weight: Tensor, sharding: ParameterSharding) -> list[Cell]:
        rectangles = [((0, 0), tuple(weight.shape))]
        if sharding.sharding_spec is not None:
            rectangles = [(shard.shard_offsets, shard.shard_sizes) for shard in sharding.sharding_spec.shards]
        cells = []
        for (row, column), (height, width) in rectangles:
            state = {
                "momentum1": torch.zeros(height, width),
                "momentum2": torch.zeros(height, width),
                "row": torch.zeros(height),
            }
            cells.append(Cell(slice(row, row + height), slice(column, column + width), state))
        return cells

    def forward(self, batches: Sequence[KeyedJaggedTensor]):
        return self.module(join(batches))

    def gradients(self, answer) -> dict[str, Tensor]:
        """Of the mean over ranks of their losses."""
        for weight in self.weights.values():
            weight.grad = None
        (loss_of(answer) / self.world_size).backward()
        return {
            name: torch.zeros_like(weight) if weight.grad is None else weight.grad
            for name, weight in self.weights.items()
        }

    @torch.no_grad()
    def update(self, batches: Sequence[KeyedJaggedTensor]) -> None:
        """One step, on the rows that any batch touched."""
        self.num_steps += 1
        for config in self.configs:
            name, weight = config.name, self.weights[config.name]
            gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
            touched = torch.cat([b[f].values() for b in batches for f in config.feature_names]).unique()
            if OPTIMIZERS[self.optimizer] is None or name in self.replicated:
                weight -= LEARNING_RATE_OF_DENSE * gradient
                continue
            for cell in self.cells[name]:
                rows = touched[(touched >= cell.rows.start) & (touched < cell.rows.stop)]
                old = weight[rows, cell.columns].float()
                new = self._updated(old, gradient[rows, cell.columns].float(), cell.state, rows - cell.rows.start)
                weight[rows, cell.columns] = new.to(weight.dtype)

    def _updated(self, old: Tensor, g: Tensor, state: dict[str, Tensor], rows: Tensor) -> Tensor:
        settings = OPTIMIZERS[self.optimizer][1]
        rate, eps, t = settings["lr"], settings.get("eps", 0.0), self.num_steps
        if self.optimizer == "sgd":
            return old - rate * g
        if self.optimizer == "adagrad":
            state["momentum1"][rows] += g * g
            return old - rate * g / (state["momentum1"][rows].sqrt() + eps)
        if self.optimizer == "rowwise_adagrad":
            state["row"][rows] += (g * g).mean(1)
            return old - rate * g / (state["row"][rows].sqrt() + eps).unsqueeze(1)
        state["momentum1"][rows] = 0.9 * state["momentum1"][rows] + 0.1 * g
        state["momentum2"][rows] = 0.999 * state["momentum2"][rows] + 0.001 * g * g
        root = (state["momentum2"][rows] / (1 - 0.999**t)).sqrt() + eps
        return old - rate * state["momentum1"][rows] / (1 - 0.9**t) / root


# ---------------------------------------------------------------- what the ranks hold


def whole(parts: Sequence[Tensor]) -> Tensor:
    """Every rank's view of one table, put together; each number must be held once, or by all and equal to the bit."""
    if not isinstance(parts[0], TiledTensor):
        assert all(torch.equal(part, parts[0]) for part in parts)
        return parts[0].detach().clone()
    answer = torch.full(parts[0].shape, -1234.5, dtype=torch.float32)
    held = torch.zeros(parts[0].shape, dtype=torch.int64)
    for part in parts:
        for tile in part.tiles:
            window = tuple(slice(o, o + s) for o, s in zip(tile.offsets, tile.tensor.shape))
            assert bool(((held[window] == 0) | (answer[window] == tile.tensor)).all()), "copies differ"
            answer[window] = tile.tensor.float()
            held[window] += 1
    assert bool((held == 1).all()) or bool((held == len(parts)).all()), f"held {held.unique().tolist()} times"
    return answer


def whole_tables(modules: Sequence[nn.Module]) -> dict[str, Tensor]:
    """Table name to its weights, from the state dicts of all ranks."""
    states = [module.state_dict() for module in modules]
    return {key.split(".")[-2]: whole([state[key] for state in states]) for key in states[0]}


def snapshot(modules: Sequence[nn.Module]) -> dict[str, Tensor]:
    """Every tile of weights and optimizer state of every rank, copied."""
    copies = {}
    for rank, module in enumerate(modules):
        tensors = dict(module.state_dict())
        for name, state in module.fused_optimizer.state_dict()["state"].items():
            tensors.update({f"{name}:{key}": value for key, value in state.items() if isinstance(value, Tensor)})
        for name, tensor in tensors.items():
            tiles = tensor.tiles if isinstance(tensor, TiledTensor) else [None]
            for tile in tiles:
                copies[f"rank {rank} {name} {tile and tile.offsets}"] = (tile.tensor if tile else tensor).clone()
    return copies


def assert_same_bits(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name in actual:
        assert torch.equal(actual[name], expected[name]), name


class World:
    """All simulated ranks of one sharded collection, trained step by step beside the oracle."""

    def __init__(
        self,
        module: nn.Module,
        make_plan: Callable[[nn.Module], Mapping[str, ParameterSharding]],
        world_size: int,
        optimizer: str,
        local_size: int | None = None,
        **of_module: Any,
    ) -> None:
        unsharded = copy.deepcopy(module)
        self.plan = make_plan(attach(module, optimizer))  # attached first: the plan's kernels depend on it
        self.optimizer = optimizer
        self.oracle = Oracle(unsharded, optimizer, self.plan, world_size)
        arguments = {"local_size": local_size} if hasattr(module, "embedding_bags") else {}
        self.modules = simulate(module, self.plan, world_size, **arguments, **of_module)

    def parameters_of(self, table: str) -> list[nn.Parameter]:
        found = []
        for module in self.modules:
            tables = module.embedding_bags if hasattr(module, "embedding_bags") else module.embeddings
            found += [parameter for parameter in tables[table].parameters()]
        return found

    def step(self, batches: Sequence[KeyedJaggedTensor], rtol: float = 1e-4, atol: float = 1e-5) -> None:
        """Forward, backward and update on both sides; outputs and dense gradients are compared on the way."""
        answers = forward_all(self.modules, batches)
        expected = self.oracle.forward(batches)
        assert_same_answers(answers, expected, batches, rtol, atol)
        for name in self.oracle.weights:
            for parameter in self.parameters_of(name):
                parameter.grad = None
        torch.stack([loss_of(answer) for answer in answers]).sum().backward()
        gradients = self.oracle.gradients(expected)
        self._compare_gradients(gradients, rtol, atol)
        self.oracle.update(batches)

    @torch.no_grad()
    def _compare_gradients(self, gradients: Mapping[str, Tensor], rtol: float, atol: float) -> None:
        world_size = len(self.modules)
        for name, expected in gradients.items():
            if name in self.oracle.replicated:
                parameters = self.parameters_of(name)
                assert len(parameters) == world_size
                # What DDP does: the mean over ranks.
                mean = sum(torch.zeros_like(p) if p.grad is None else p.grad for p in parameters) / world_size
                torch.testing.assert_close(mean, expected, rtol=rtol, atol=atol)
                for parameter in parameters:
                    parameter -= LEARNING_RATE_OF_DENSE * expected  # the same on all ranks, to the bit
            elif OPTIMIZERS[self.optimizer] is None:
                self._compare_dense(name, expected, rtol, atol)
            else:
                assert all(parameter.grad is None for parameter in self.parameters_of(name))

    def _compare_dense(self, name: str, expected: Tensor, rtol: float, atol: float) -> None:
        seen = 0
        for module in self.modules:
            tables = module.embedding_bags if hasattr(module, "embedding_bags") else module.embeddings
            for local, parameter in zip(tables[name].local, tables[name].parameters()):
                rows, columns = local.shard.rows, local.shard.columns
                window = expected[rows.start : rows.stop, columns.start : columns.stop]
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                torch.testing.assert_close(gradient, window, rtol=rtol, atol=atol)
                parameter -= LEARNING_RATE_OF_DENSE * gradient
                seen += window.numel()
        assert seen == expected.numel()

    def compare_weights(self, rtol: float = 1e-4, atol: float = 1e-5) -> None:
        """All weights and the optimizer's momenta against the oracle's."""
        actual = whole_tables(self.modules)
        for name, weight in self.oracle.weights.items():
            torch.testing.assert_close(actual[name], weight.detach().float(), rtol=rtol, atol=atol)


def assert_same_answers(
    answers: Sequence, expected, batches: Sequence[KeyedJaggedTensor], rtol=1e-4, atol=1e-5
) -> None:
    """Every rank's answer is its part of the answer to the joined batch."""
    if not isinstance(expected, Mapping):
        assert answers[0].keys() == expected.keys()
        assert answers[0].length_per_key() == expected.length_per_key()
        parts = expected.values().split([batch.stride() for batch in batches])
        for answer, part in zip(answers, parts):
            torch.testing.assert_close(answer.values(), part, rtol=rtol, atol=atol)
        return
    for name, whole_answer in expected.items():
        feature = name.split("@")[0]
        counts = [batch[feature].values().numel() for batch in batches]
        lengths = whole_answer.lengths().split([batch.stride() for batch in batches])
        for answer, rows, lengths_B in zip(answers, whole_answer.values().split(counts), lengths):
            assert list(answer) == list(expected)
            torch.testing.assert_close(answer[name].values(), rows, rtol=rtol, atol=atol)
            assert torch.equal(answer[name].lengths().long(), lengths_B.long())
