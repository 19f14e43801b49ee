"""Embedding collections whose optimizer runs inside backward.

    forward     kernel looks the rows up
    backward    kernel adds up each touched row's gradient and updates row and state at once
    step()      nothing left to do

No gradient of a table's size is ever made. The classes equal EmbeddingBagCollection and
EmbeddingCollection trained by the same optimizer, except that only the rows of a batch are touched (with
Adam's moments and weight decay that is a difference: an absent row does not decay).

Shapes: B batch, L lanes, N values, R rows, D columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from recsys_edu.kernels.backend import fbgemm_status
from recsys_edu.kernels.modules import make_kernel
from recsys_edu.kernels.spec import Kernel, KernelSpec, OptimizerSpec, TableSpec
from recsys_edu.modules.embedding_configs import (
    BaseEmbeddingConfig,
    EmbeddingBagConfig,
    EmbeddingConfig,
    data_type_to_dtype,
    init_table,
)
from recsys_edu.modules.embedding_modules import (
    EmbeddingBagCollection,
    EmbeddingBagCollectionInterface,
    EmbeddingCollection,
    EmbeddingCollectionInterface,
    Lanes,
    check_lane_ids,
    common_embedding_dim,
    divide_means,
    expand_batches,
    get_embedding_names_by_table,
    in_lane_order,
    lane_offsets,
    lanes_of,
    prepare_configs,
    split_sequences,
    uniform_batches,
)
from recsys_edu.optim.fused import FusedOptimizer, FusedOptimizerModule
from recsys_edu.optim.fused_spec import optimizer_spec
from recsys_edu.optim.keyed import KeyedOptimizer
from recsys_edu.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor


class FusedTablesOptimizer(FusedOptimizer):
    """The state and the learning rate of fused kernels, under parameter names.

        params   embedding_bags.<table>.weight
        state    <table>.momentum1, <table>.momentum2, as far as the optimizer has them; live tensors

    There is one parameter group; changing its `lr`, directly or by a scheduler, takes effect with the next
    forward.
    """

    def __init__(self, params: dict[str, torch.Tensor], states: Sequence[dict[str, Any]], rates: LearningRate) -> None:
        self._rates = rates
        state = {param: entries for param, entries in zip(params.values(), states) if entries}
        super().__init__(params, state, [{"params": list(params.values()), "lr": rates.get()}])

    def step(self, closure: Any = None) -> None:
        """Nothing is left to step; hands the group's learning rate to the kernels."""
        if closure is not None:
            with torch.enable_grad():
                closure()
        self.apply_learning_rate()

    def zero_grad(self, set_to_none: bool = False) -> None:
        """No gradients to clear; hands the group's learning rate to the kernels."""
        self.apply_learning_rate()

    def post_load_state_dict(self) -> None:
        self.apply_learning_rate()

    def apply_learning_rate(self) -> None:
        """Make the kernels train with the group's `lr`."""
        self._rates.set(float(self.param_groups[0]["lr"]))


@dataclass(frozen=True)
class LearningRate:
    """The one learning rate of several kernels."""

    kernels: tuple[Kernel, ...]

    def get(self) -> float:
        return self.kernels[0].learning_rate if self.kernels else 0.0

    def set(self, learning_rate: float) -> None:
        for kernel in self.kernels:
            if kernel.learning_rate != learning_rate:
                kernel.learning_rate = learning_rate


class _FusedTables:
    """The kernels of a fused collection, one per weight type, and how their lanes fit together.

    Not a module: the collection's children are its tables, under the names that checkpoints know, and
    share the kernels' memory.
    """

    def __init__(
        self, tables: Sequence[BaseEmbeddingConfig], optimizer: OptimizerSpec, pooled: bool, device: torch.device
    ) -> None:
        self.lanes = lanes_of(tables)
        self.kernels: list[Kernel] = []
        self.kernel_lanes: list[list[int]] = []
        self._places: list[tuple[int, int]] = [(0, 0)] * len(tables)  # table -> (kernel, its table there)
        for data_type in dict.fromkeys(table.data_type for table in tables):
            mine = [index for index, table in enumerate(tables) if table.data_type is data_type]
            lanes = [lane for lane, table in enumerate(self.lanes.tables) if table in mine]
            for position, table in enumerate(mine):
                self._places[table] = (len(self.kernels), position)
            chosen = [tables[index] for index in mine]
            spec = KernelSpec(
                tables=tuple(TableSpec(table.name, table.num_embeddings, table.embedding_dim) for table in chosen),
                lane_tables=tuple(mine.index(self.lanes.tables[lane]) for lane in lanes),
                pooled=pooled,
                data_type=data_type,
                optimizer=optimizer,
                validate_ids=False,
                lane_features=tuple(self.lanes.features[lane] for lane in lanes),
            )
            self.kernels.append(make_kernel(spec, device))
            self.kernel_lanes.append(lanes)

    def weights(self) -> list[torch.Tensor]:
        by_kernel = [kernel.table_weights() for kernel in self.kernels]
        return [by_kernel[kernel][position] for kernel, position in self._places]

    def states(self) -> list[dict[str, torch.Tensor]]:
        by_kernel = [kernel.optimizer_state() for kernel in self.kernels]
        return [by_kernel[kernel][position] for kernel, position in self._places]

    def take_over(self, other: _FusedTables) -> None:
        """Copy weights, state and learning rate from tables of the same configs on another device."""
        with torch.no_grad():
            for mine, theirs in zip(self.weights(), other.weights()):
                mine.copy_(theirs)
            for mine, theirs in zip(self.states(), other.states()):
                for name, tensor in mine.items():
                    tensor.copy_(theirs[name])
        for mine, theirs in zip(self.kernels, other.kernels):
            mine.learning_rate = theirs.learning_rate
            mine.step_count = theirs.step_count

    def lookup(self, features: KeyedJaggedTensor, sample_weights_N: torch.Tensor | None) -> torch.Tensor:
        """Pooled sums [B, sum of lane dims], or rows [N, D], of a batch in lane order."""
        pooled = self.kernels[0].spec.pooled
        offsets = uniform_batches(features)[0] if pooled else lane_offsets(features)
        if len(self.kernels) == 1:
            return self.kernels[0](features.values(), offsets, sample_weights_N)
        return self._lookup_by_type(features.values(), offsets, sample_weights_N, pooled)

    def _lookup_by_type(
        self, values_N: torch.Tensor, offsets: torch.Tensor, sample_weights_N: torch.Tensor | None, pooled: bool
    ) -> torch.Tensor:
        """Each kernel its lanes, then the answers' columns (or rows) back in lane order."""
        num_lanes = len(self.lanes.features)
        batch_size = (offsets.numel() - 1) // num_lanes
        bounds = offsets[:: max(batch_size, 1)].tolist()  # host sync: each kernel gets a slice per lane
        answers: list[torch.Tensor | None] = [None] * num_lanes
        for kernel, lanes in zip(self.kernels, self.kernel_lanes):
            if not lanes:
                continue
            spans = [slice(bounds[lane], bounds[lane + 1]) for lane in lanes]
            lengths = torch.cat([offsets[lane * batch_size : (lane + 1) * batch_size + 1].diff() for lane in lanes])
            answer = kernel(
                torch.cat([values_N[span] for span in spans]),
                torch.cat([lengths.new_zeros(1), lengths.cumsum(0).to(lengths.dtype)]),
                None if sample_weights_N is None else torch.cat([sample_weights_N[span] for span in spans]),
            )
            sizes = [self.lanes.dims[lane] if pooled else bounds[lane + 1] - bounds[lane] for lane in lanes]
            for lane, piece in zip(lanes, answer.split(sizes, dim=1 if pooled else 0)):
                answers[lane] = piece
        return torch.cat([answer for answer in answers if answer is not None], dim=1 if pooled else 0)


class _FusedCollection(nn.Module):
    """What both fused collections are made of: the kernels, and one child with a `weight` per table."""

    _children_name: str

    def _build(
        self,
        tables: Sequence[BaseEmbeddingConfig],
        optimizer_type: type[torch.optim.Optimizer],
        optimizer_kwargs: dict[str, Any],
        device: torch.device | None,
        pooled: bool,
    ) -> None:
        prepare_configs(tables)
        self._tables, self._pooled = tables, pooled
        self._optimizer_type, self._optimizer_kwargs = optimizer_type, optimizer_kwargs
        self._optimizer_spec = optimizer_spec(optimizer_type, optimizer_kwargs)
        self._lanes: Lanes = lanes_of(tables)
        self._device = torch.device("cpu" if device is None else device)
        children = nn.ModuleDict()
        for table in tables:
            children[table.name] = nn.Module()
        setattr(self, self._children_name, children)
        if self._device.type == "meta":
            self._fused: _FusedTables | None = None
            self._adopt(
                [
                    torch.empty(t.num_embeddings, t.embedding_dim, dtype=data_type_to_dtype(t.data_type), device="meta")
                    for t in tables
                ]
            )
            return
        self._make_kernels(self._device)
        self.register_load_state_dict_post_hook(_take_assigned_weights)
        for table, weight_RD in zip(tables, self._fused.weights()):
            init_table(table, weight_RD)

    def _make_kernels(self, device: torch.device) -> None:
        previous = getattr(self, "_fused", None)
        self._fused = _FusedTables(self._tables, self._optimizer_spec, self._pooled, device)
        self._device = device
        if previous is not None:
            self._fused.take_over(previous)
        self._bind()

    def _bind(self) -> None:
        """Point the children's weights and the optimizer at the kernels' memory."""
        self._adopt(self._fused.weights())
        params = {f"{self._children_name}.{t.name}.weight": w for t, w in zip(self._tables, self._weights())}
        states = [
            {f"{table.name}.{name}": tensor for name, tensor in state.items()}
            for table, state in zip(self._tables, self._fused.states())
        ]
        self._fused_optimizer = FusedTablesOptimizer(params, states, LearningRate(tuple(self._fused.kernels)))

    def _adopt(self, weights: Sequence[torch.Tensor]) -> None:
        """Show the kernels' memory as `<children>.<table>.weight`, marked as trained in backward."""
        children = getattr(self, self._children_name)
        for table, weight_RD in zip(self._tables, weights):
            parameter = nn.Parameter(weight_RD.detach())
            parameter._optimizer_classes = [self._optimizer_type]
            parameter._optimizer_kwargs = [dict(self._optimizer_kwargs)]
            parameter._in_backward_optimizers = []
            children[table.name].register_parameter("weight", parameter)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)  # copy.deepcopy and unpickling separate the children from the kernels
        if self._fused is not None:
            self._bind()

    def _weights(self) -> list[nn.Parameter]:
        children = getattr(self, self._children_name)
        return [children[table.name].weight for table in self._tables]

    def _ready(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """The batch in lane order, its ids checked, the kernels set to the current learning rate."""
        if self._fused is None:
            raise RuntimeError(f"{type(self).__name__} is on the meta device; give it memory: .to_empty(device=...)")
        features = in_lane_order(features, self._lanes.features)
        check_lane_ids(features, self._lanes)
        self._fused_optimizer.apply_learning_rate()
        return features

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        """Move to another device by making kernels there; the type of a table is its config's to say."""
        del recurse
        device = fn(torch.empty(0, device=self._device)).device
        if device == self._device:
            return self
        if device.type == "meta":
            raise RuntimeError(f"{type(self).__name__} cannot go back to the meta device")
        self._make_kernels(device)
        return self

    def optimizer_type(self) -> type[torch.optim.Optimizer]:
        """The optimizer class as given."""
        return self._optimizer_type

    def optimizer_kwargs(self) -> dict[str, Any]:
        """Its arguments as given."""
        return self._optimizer_kwargs

    @property
    def device(self) -> torch.device:
        """Where the tables are."""
        return self._device


@torch.no_grad()
def _take_assigned_weights(module: _FusedCollection, incompatible_keys: Any) -> None:
    """After load_state_dict(assign=True), which puts foreign tensors in place of the kernels' memory."""
    del incompatible_keys
    own = module._fused.weights()
    for mine, loaded in zip(own, module._weights()):
        if mine.data_ptr() != loaded.data_ptr():
            mine.copy_(loaded)
    module._adopt(own)


class FusedEmbeddingBagCollection(_FusedCollection, EmbeddingBagCollectionInterface, FusedOptimizerModule):
    """An EmbeddingBagCollection that `optimizer_type(**optimizer_kwargs)` trains during backward.

    >>> film = EmbeddingBagConfig(name="film", num_embeddings=100, embedding_dim=8, feature_names=["film"])
    >>> ebc = FusedEmbeddingBagCollection([film], torch.optim.SGD, {"lr": 0.5})
    >>> ids = KeyedJaggedTensor.from_lengths_sync(["film"], torch.tensor([7]), torch.tensor([1]))
    >>> before = ebc.state_dict()["embedding_bags.film.weight"][7].clone()
    >>> ebc(ids).values().sum().backward()                                   # gradient 1 for row 7
    >>> bool(torch.allclose(ebc.state_dict()["embedding_bags.film.weight"][7], before - 0.5))
    True

    Input, output and state_dict keys are EmbeddingBagCollection's. `location` is accepted for TorchRec's
    callers; the kernel of the device decides where memory lies.

    Raises:
        ValueError: an optimizer, or an argument of it, that no kernel fuses.
        RuntimeError: (forward) the collection is still on the meta device.

    Counterpart: torchrec.modules.fused_embedding_modules.FusedEmbeddingBagCollection.
    """

    _children_name = "embedding_bags"

    def __init__(
        self,
        tables: list[EmbeddingBagConfig],
        optimizer_type: type[torch.optim.Optimizer],
        optimizer_kwargs: dict[str, Any],
        is_weighted: bool = False,
        device: torch.device | None = None,
        location: Any | None = None,
    ) -> None:
        super().__init__()
        self._is_weighted = is_weighted
        self._build(tables, optimizer_type, optimizer_kwargs, device, pooled=True)

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        lanes = self._lanes
        if not lanes.features:
            return KeyedTensor([], [], torch.empty(features.stride(), 0, device=features.device()))
        features = self._ready(features)
        pooled_BD = self._fused.lookup(features, features.weights() if self._is_weighted else None)
        pooled_BD = divide_means(pooled_BD, uniform_batches(features)[1], lanes)
        pooled_BD = expand_batches(pooled_BD, features, lanes)
        return KeyedTensor(keys=list(lanes.names), length_per_key=list(lanes.dims), values=pooled_BD)

    def fused_optimizer(self) -> KeyedOptimizer:
        """The state, the learning rate and nothing to step; keys are `embedding_bags.<table>.weight`."""
        return self._fused_optimizer

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """The configs as given."""
        return self._tables

    def is_weighted(self) -> bool:
        """Whether looked-up rows are multiplied by the KJT's weights."""
        return self._is_weighted


class FusedEmbeddingCollection(_FusedCollection, EmbeddingCollectionInterface, FusedOptimizerModule):
    """An EmbeddingCollection that `optimizer_type(**optimizer_kwargs)` trains during backward.

    Input, output and state_dict keys (`embeddings.<table>.weight`) are EmbeddingCollection's.

    Raises:
        ValueError: as EmbeddingCollection; or an optimizer, or an argument of it, that no kernel fuses.
        RuntimeError: (forward) the collection is still on the meta device.

    Counterpart: torchrec.modules.fused_embedding_modules.FusedEmbeddingCollection.
    """

    _children_name = "embeddings"

    def __init__(
        self,
        tables: list[EmbeddingConfig],
        optimizer_type: type[torch.optim.Optimizer],
        optimizer_kwargs: dict[str, Any],
        device: torch.device | None = None,
        need_indices: bool = False,
        location: Any | None = None,
    ) -> None:
        super().__init__()
        self._need_indices = need_indices
        self._embedding_dim = common_embedding_dim(tables)
        self._build(tables, optimizer_type, optimizer_kwargs, device, pooled=False)

    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        if not self._lanes.features:
            return {}
        features = self._ready(features)
        rows_ND = self._fused.lookup(features, None)
        return split_sequences(rows_ND, features, self._lanes.names, self._need_indices)

    def fused_optimizer(self) -> KeyedOptimizer:
        """The state, the learning rate and nothing to step; keys are `embeddings.<table>.weight`."""
        return self._fused_optimizer

    def embedding_configs(self) -> list[EmbeddingConfig]:
        """The configs as given."""
        return self._tables

    def embedding_names_by_table(self) -> list[list[str]]:
        """For each table the names of its outputs."""
        return get_embedding_names_by_table(self._tables)

    def embedding_dim(self) -> int:
        """The width that all tables share; -1 without tables."""
        return self._embedding_dim

    def need_indices(self) -> bool:
        """Whether the ids come back as the outputs' weights."""
        return self._need_indices


def fuse_embedding_optimizer(
    model: nn.Module,
    optimizer_type: type[torch.optim.Optimizer],
    optimizer_kwargs: dict[str, Any],
    device: torch.device,
    location: Any | None = None,
) -> nn.Module:
    """Replace every EmbeddingBagCollection and EmbeddingCollection inside `model` by its fused form.

    The model is changed in place and returned (a collection itself: its fused form is returned). Weights
    are kept where they exist; state_dict keys stay.

    Counterpart: torchrec.modules.fused_embedding_modules.fuse_embedding_optimizer.
    """
    if isinstance(model, EmbeddingBagCollection):
        fused: nn.Module = FusedEmbeddingBagCollection(
            model.embedding_bag_configs(), optimizer_type, optimizer_kwargs, model.is_weighted(), device, location
        )
    elif isinstance(model, EmbeddingCollection):
        fused = FusedEmbeddingCollection(
            model.embedding_configs(), optimizer_type, optimizer_kwargs, device, model.need_indices(), location
        )
    else:
        for name, child in model.named_children():
            setattr(model, name, fuse_embedding_optimizer(child, optimizer_type, optimizer_kwargs, device, location))
        return model
    if model.device.type != "meta" and torch.device(device).type != "meta":
        fused.load_state_dict(model.state_dict())
    return fused


def convert_optimizer_type_and_kwargs(
    optimizer_type: type[torch.optim.Optimizer], optimizer_kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]] | None:
    """FBGEMM's name for an optimizer class, and its arguments renamed; None for classes it does not know.

    >>> convert_optimizer_type_and_kwargs(torch.optim.RMSprop, {"lr": 0.1}) is None
    True

    `lr` becomes `learning_rate`, `betas` becomes `beta1` and `beta2`. The name is an FBGEMM EmbOptimType
    where FBGEMM is installed and that enum's member name, a string, elsewhere.

    Counterpart: torchrec.modules.fused_embedding_modules.convert_optimizer_type_and_kwargs.
    """
    names = {
        "torch.optim.sgd.SGD": "EXACT_SGD",
        "torch.optim.adagrad.Adagrad": "EXACT_ADAGRAD",
        "torch.optim.adam.Adam": "ADAM",
        "recsys_edu.optim.rowwise_adagrad.RowWiseAdagrad": "EXACT_ROWWISE_ADAGRAD",
    }
    name = names.get(f"{optimizer_type.__module__}.{optimizer_type.__qualname__}")
    if name is None:
        return None
    renamed = dict(optimizer_kwargs)
    if "lr" in renamed:
        renamed["learning_rate"] = renamed.pop("lr")
    if "betas" in renamed:
        renamed["beta1"], renamed["beta2"] = renamed.pop("betas")
    if not fbgemm_status().available:
        return name, renamed
    from fbgemm_gpu.split_embedding_configs import EmbOptimType

    return EmbOptimType[name], renamed
