"""Models, batches and the plain loop that the pipelines' tests share.

Every training test compares with `plain_loop` on an equal model: outputs and all weights to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from recsys_edu.datasets.utils import Batch
from recsys_edu.distributed import sharding_plan as plans
from recsys_edu.distributed.model_parallel import DistributedModelParallel
from recsys_edu.distributed.tiled_tensor import TiledTensor
from recsys_edu.distributed.types import ShardingPlan
from recsys_edu.models.dlrm import DLRM, DLRMTrain
from recsys_edu.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType
from recsys_edu.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from recsys_edu.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from recsys_edu.optim.rowwise_adagrad import RowWiseAdagrad
from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor
from recsys_edu.streamable import Pipelineable

CPU = torch.device("cpu")
WIDTH, ROWS, NUM_TABLES, NUM_DENSE = 8, 20, 7, 3
KINDS = ["table_wise", "row_wise", "column_wise", "table_row_wise", "table_column_wise", "grid", "data_parallel"]
FEATURES = [f"f{index}" for index in range(NUM_TABLES)]


def generators(world_size: int) -> list[Callable]:
    """One sharding type per table."""
    return [
        plans.table_wise(rank=world_size - 1),
        plans.row_wise(),
        plans.column_wise(),
        plans.table_row_wise(host_index=0),
        plans.table_column_wise(host_index=0),
        plans.grid_shard(host_indexes=[0]),
        plans.data_parallel(),
    ]


def make_kjt(features: Sequence[str], batch_size: int, generator: torch.Generator, longest: int = 3):
    lengths = torch.randint(0, longest + 1, (len(features) * batch_size,), generator=generator)
    values = torch.randint(0, ROWS, (int(lengths.sum()),), generator=generator)
    return KeyedJaggedTensor(list(features), values, lengths=lengths, stride=batch_size)


def make_batches(rank: int, count: int, batch_size: int = 4, last: int | None = 2) -> list[Batch]:
    """Random batches of this rank; the last one is smaller."""
    batches = []
    for index in range(count):
        generator = torch.Generator().manual_seed(1000 * rank + index)
        size = last if last is not None and index == count - 1 else batch_size
        batches.append(
            Batch(
                torch.rand(size, NUM_DENSE, generator=generator),
                make_kjt(FEATURES, size, generator),
                torch.randint(0, 2, (size,), generator=generator),
            )
        )
    return batches


class SequenceModel(nn.Module):
    """Embeds sequences and scores their sums; Batch to (loss, logits)."""

    def __init__(self, collection: nn.Module) -> None:
        super().__init__()
        self.embedding_collection = collection
        self.dense, self.score = nn.Linear(NUM_DENSE, WIDTH), nn.Linear(WIDTH, 1)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        sequences = self.embedding_collection(batch.sparse_features)
        hidden = self.dense(batch.dense_features)
        for jagged in sequences.values():
            pooled = torch.zeros_like(hidden)
            bags = torch.repeat_interleave(torch.arange(hidden.shape[0]), jagged.lengths())
            hidden = hidden + pooled.index_add(0, bags, jagged.values())
        logits = self.score(hidden).squeeze(-1)
        return nn.functional.binary_cross_entropy_with_logits(logits, batch.labels.float()), logits


@dataclass
class Nested:
    ids: KeyedJaggedTensor


@dataclass
class TwoKjts(Pipelineable):
    """A batch whose KeyedJaggedTensors lie in a nested dataclass, in a dict and in a tuple."""

    inner: Nested
    more: dict[str, Any]

    def to(self, device: torch.device, non_blocking: bool = False) -> TwoKjts:
        more = {
            key: tuple(part.to(device=device, non_blocking=non_blocking) for part in parts)
            for key, parts in self.more.items()
        }
        return TwoKjts(Nested(self.inner.ids.to(device, non_blocking)), more)

    def record_stream(self, stream: torch.Stream) -> None:
        for kjt in (self.inner.ids, *self.more["ids"]):
            kjt.record_stream(stream)


class TwoCollections(nn.Module):
    """One collection is called with two KeyedJaggedTensors, the other with one of them, by keyword."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.score = first, second, nn.Linear(WIDTH, 1)

    def forward(self, batch: TwoKjts) -> tuple[Tensor, Tensor]:
        other = batch.more["ids"][0]
        a, b, c = self.first(batch.inner.ids), self.first(other), self.second(features=other)
        parts = [part.values().view(part.values().shape[0], -1, WIDTH).sum(1) for part in (a, b, c)]
        logits = self.score(torch.tanh(sum(parts))).squeeze(-1)
        return logits.square().mean(), logits


def two_kjt_batches(rank: int, count: int) -> list[TwoKjts]:
    batches = []
    for index in range(count):
        generator = torch.Generator().manual_seed(77 * rank + index)
        batches.append(
            TwoKjts(
                Nested(make_kjt(FEATURES, 3, generator)), {"ids": (make_kjt(FEATURES, 3, generator), torch.tensor(1))}
            )
        )
    return batches


def bags() -> EmbeddingBagCollection:
    pooling = [PoolingType.SUM, PoolingType.MEAN]
    return EmbeddingBagCollection(
        [
            EmbeddingBagConfig(
                name=f"t{i}", num_embeddings=ROWS, embedding_dim=WIDTH, feature_names=[f], pooling=pooling[i % 2]
            )
            for i, f in enumerate(FEATURES)
        ]
    )


def sequences() -> EmbeddingCollection:
    return EmbeddingCollection(
        [
            EmbeddingConfig(name=f"t{i}", num_embeddings=ROWS, embedding_dim=WIDTH, feature_names=[f])
            for i, f in enumerate(FEATURES)
        ]
    )


def dlrm() -> nn.Module:
    return DLRMTrain(DLRM(bags(), NUM_DENSE, [16, WIDTH], [16, 1]))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "dlrm": dlrm,
    "sequence": lambda: SequenceModel(sequences()),
    "two": lambda: TwoCollections(bags(), bags()),
}


def make_model(name: str, world_size: int, fused: bool = True):
    """The model, sharded with every type in one plan, and the optimizer of its dense part."""
    torch.manual_seed(0)
    model = MODELS[name]()
    plan = {}
    for path, module in model.named_modules():
        if isinstance(module, (EmbeddingBagCollection, EmbeddingCollection)):
            if fused:
                apply_optimizer_in_backward(RowWiseAdagrad, module.parameters(), {"lr": 0.1})
            made = dict(zip([f"t{i}" for i in range(NUM_TABLES)], generators(world_size)))
            plan[path] = plans.construct_module_sharding_plan(
                module, made, local_size=world_size, world_size=world_size, device_type="cpu"
            )
    parallel = DistributedModelParallel(model, device=CPU, plan=ShardingPlan(plan))
    trained = [parameter for _, parameter in parallel.bare_named_parameters()]
    return parallel, torch.optim.SGD(trained, lr=0.1)


def plain_loop(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[Any]) -> list[Tensor]:
    """What a pipeline must equal. Losses of all steps."""
    losses = []
    for batch in batches:
        if model.training:
            optimizer.zero_grad()
        loss, _ = model(batch)
        if model.training:
            loss.backward()
            optimizer.step()
        losses.append(loss.detach().clone())
    return losses


def keep_losses(model: nn.Module, losses: list[Tensor]) -> Callable[[Any], Any]:
    """`custom_model_fwd` that notes the losses."""

    def forward(batch: Any) -> Any:
        loss, output = model(batch)
        losses.append(loss.detach().clone())
        return loss, output

    return forward


def run_to_end(pipeline: Any, batches: Iterator[Any]) -> int:
    """Number of steps until StopIteration."""
    steps = 0
    while True:
        try:
            pipeline.progress(batches)
        except StopIteration:
            return steps
        steps += 1


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor this rank holds, copied: weights, shards, and state of the fused optimizers."""
    found = {}
    states = {name: state for name, state in model.fused_optimizer.state_dict()["state"].items()}
    tensors = dict(model.state_dict())
    tensors |= {f"{n}:{k}": v for n, state in states.items() for k, v in state.items() if isinstance(v, Tensor)}
    for name, tensor in tensors.items():
        tiles = tensor.tiles if isinstance(tensor, TiledTensor) else None
        for index, part in enumerate([tile.tensor for tile in tiles] if tiles is not None else [tensor]):
            found[f"{name} {index}"] = part.detach().clone()
    return found


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name in actual:
        assert torch.equal(actual[name], expected[name]), name


def assert_all_equal(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(actual) == len(expected)
    for index, (mine, theirs) in enumerate(zip(actual, expected)):
        assert torch.equal(mine, theirs), f"step {index}: {mine} is not {theirs}"


class EveryOther:
    """Gradients of two batches are added up before a step."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.calls = optimizer, 0

    def zero_grad(self) -> None:
        if self.calls % 2 == 0:
            self.optimizer.zero_grad()

    def step(self) -> None:
        self.calls += 1
        if self.calls % 2 == 0:
            self.optimizer.step()


def failing(batches: list[Any], at: int) -> Iterator[Any]:
    """An iterator that raises in place of batch `at`, and can go on."""

    class Failing:
        position = -1

        def __iter__(self):
            return self

        def __next__(self):
            self.position += 1
            if self.position == at:
                raise OSError("the disk is gone")
            if self.position >= len(batches):
                raise StopIteration
            return batches[self.position]

    return Failing()


def steps_and_errors(pipeline: Any, batches: Iterable[Any], limit: int = 20) -> list[str]:
    """What each progress did, until StopIteration."""
    found, source = [], iter(batches) if isinstance(batches, list) else batches
    for _ in range(limit):
        try:
            pipeline.progress(source)
            found.append("step")
        except StopIteration:
            return found
        except Exception as error:
            found.append(f"{type(error).__name__}: {error} {' '.join(getattr(error, '__notes__', []))}")
    raise AssertionError(f"no end: {found}")
