"""What a fused collection is made of: its tables, in the memory of the kernels that train them.

    FusedEmbeddingBagCollection
      embedding_bags: FusedTables            a ModuleDict, so checkpoints see embedding_bags.<table>.weight
        kernels: KernelsByType               float32 tables in one kernel, float16 tables in another, ...
        optimizer: FusedTablesOptimizer      state and learning rate of all of them

Shapes: B batch, L lanes, N values, R rows, D columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from recsys_edu.kernels.modules import make_kernel
from recsys_edu.kernels.spec import Kernel, KernelSpec, OptimizerSpec, TableSpec
from recsys_edu.modules.embedding_configs import BaseEmbeddingConfig, data_type_to_dtype, init_table
from recsys_edu.modules.embedding_modules import (
    check_lane_ids,
    in_lane_order,
    lane_offsets,
    lanes_of,
    prepare_configs,
    uniform_batches,
)
from recsys_edu.optim.fused_spec import optimizer_spec
from recsys_edu.optim.fused_tables import FusedTablesOptimizer, LearningRate
from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor


class FusedTables(nn.ModuleDict):
    """Tables that `optimizer_type(**optimizer_kwargs)` trains during backward: `fused[table].weight`.

    The weights are views of the kernels' memory. That stays so when the tables move to another device or are copied,
    and when `load_state_dict(assign=True)` puts other tensors in their place: those are copied into the kernels.

    Args:
        path: what the collection calls this module; the optimizer's keys are `<path>.<table>.weight`.
        device: "meta" makes no kernels yet; `.to_empty(device=...)` or assigned weights do.
        pooled: whether bags are summed.

    Raises:
        ValueError: an optimizer, or an argument of it, that no kernel fuses.
    """

    def __init__(
        self,
        path: str,
        tables: Sequence[BaseEmbeddingConfig],
        optimizer_type: type[torch.optim.Optimizer],
        optimizer_kwargs: dict[str, Any],
        device: torch.device | None,
        pooled: bool,
    ) -> None:
        super().__init__()
        prepare_configs(tables)
        self.lanes = lanes_of(tables)
        self._path, self._tables, self._pooled = path, tables, pooled
        self._optimizer_type, self._optimizer_kwargs = optimizer_type, optimizer_kwargs
        self._optimizer_spec = optimizer_spec(optimizer_type, optimizer_kwargs)
        self._device = torch.device("cpu" if device is None else device)
        self._kernels: KernelsByType | None = None
        self._optimizer = self._make_optimizer([], [], [])
        for table in tables:
            self._modules[table.name] = nn.Module()  # past add_module, which refuses a table called like a method
        self.register_load_state_dict_post_hook(_take_assigned_weights)
        if self._device.type == "meta":
            self._show([_empty_table(table, self._device) for table in tables])
            return
        self._make_kernels(self._device)
        for table, weight_RD in zip(tables, self._kernels.weights()):
            init_table(table, weight_RD)

    def in_lane_order(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """The batch as `lookup` takes it: lane by lane, its ids checked before anything is updated.

        Raises:
            RuntimeError: the tables are still on the meta device.
            KeyError: a feature that the input does not have.
            IndexError: an id outside its table.
        """
        if self._kernels is None:
            raise RuntimeError(f"{self._path} is on the meta device; give it memory: .to_empty(device=...)")
        features = in_lane_order(features, self.lanes.features)
        check_lane_ids(features, self.lanes)
        return features

    def lookup(self, features: KeyedJaggedTensor, sample_weights_N: torch.Tensor | None) -> torch.Tensor:
        """Pooled sums [B, sum of lane dims], or rows [N, D], of a batch in lane order."""
        self._optimizer.apply_learning_rate()
        return self._kernels.lookup(features, sample_weights_N)

    def optimizer(self) -> FusedTablesOptimizer:
        """The state, the learning rate and nothing to step."""
        return self._optimizer

    def device(self) -> torch.device:
        """Where the tables are."""
        return self._device

    def _make_kernels(self, device: torch.device) -> None:
        previous = self._kernels
        self._kernels = KernelsByType(self._tables, self._optimizer_spec, self._pooled, device)
        self._device = device
        if previous is not None:
            self._kernels.take_over(previous)
        self._bind()

    def _bind(self) -> None:
        """Point the weights and the optimizer at the kernels' memory."""
        self._show(self._kernels.weights())
        self._optimizer = self._make_optimizer(
            [self[table.name].weight for table in self._tables], self._kernels.states(), self._kernels.kernels
        )

    def _make_optimizer(
        self,
        weights: Sequence[torch.Tensor],
        states: Sequence[dict[str, torch.Tensor]],
        kernels: Sequence[Kernel],
    ) -> FusedTablesOptimizer:
        params = {f"{self._path}.{table.name}.weight": weight for table, weight in zip(self._tables, weights)}
        named_states = [
            {f"{table.name}.{name}": tensor for name, tensor in state.items()}
            for table, state in zip(self._tables, states)
        ]
        return FusedTablesOptimizer(params, named_states, LearningRate(tuple(kernels)))

    def _show(self, weights: Sequence[torch.Tensor]) -> None:
        """Register these tensors as `<table>.weight`, marked as trained in backward."""
        for table, weight_RD in zip(self._tables, weights):
            parameter = nn.Parameter(weight_RD.detach())
            parameter._optimizer_classes = [self._optimizer_type]
            parameter._optimizer_kwargs = [dict(self._optimizer_kwargs)]
            parameter._in_backward_optimizers = []
            self[table.name].register_parameter("weight", parameter)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)  # copy.deepcopy and unpickling separate the weights from the kernels
        if self._kernels is not None:
            self._bind()

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        """Move to another device by making kernels there; the type of a table is its config's to say."""
        del recurse
        device = fn(torch.empty(0, device=self._device)).device
        if device == self._device:
            return self
        if device.type == "meta":
            raise RuntimeError(f"{self._path} cannot go back to the meta device")
        self._make_kernels(device)
        return self


@torch.no_grad()
def _take_assigned_weights(module: FusedTables, incompatible_keys: Any) -> None:
    """After load_state_dict(assign=True), which puts foreign tensors in place of the kernels' memory."""
    del incompatible_keys
    loaded = [module[table.name].weight for table in module._tables]
    if not loaded or any(weight.is_meta for weight in loaded):
        return
    if module._kernels is None:
        module._make_kernels(loaded[0].device)
    for table, theirs in zip(module._tables, loaded):
        mine = module._optimizer.params[f"{module._path}.{table.name}.weight"]
        if mine is not theirs:
            mine.copy_(theirs)
            module[table.name].register_parameter("weight", mine)


def _empty_table(table: BaseEmbeddingConfig, device: torch.device) -> torch.Tensor:
    dtype = data_type_to_dtype(table.data_type)
    return torch.empty(table.num_embeddings, table.embedding_dim, dtype=dtype, device=device)


class KernelsByType:
    """One kernel per weight type, and how their lanes and tables fit together."""

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

    def take_over(self, other: KernelsByType) -> None:
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
