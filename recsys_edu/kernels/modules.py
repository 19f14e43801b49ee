"""Kernels that own their tables: dense (ordinary gradients) and fused (the optimizer runs inside backward).

| optimizer | forward | update | class |
|---|---|---|---|
| None | FBGEMM or PyTorch | none: gradients | DenseKernel |
| fused by FBGEMM | FBGEMM | FBGEMM, in its backward | FbgemmFusedKernel |
| any other | FBGEMM or PyTorch | `optimizers.update_rows` | FusedKernel |

Shapes: B batch, L lanes, N values, R rows, D columns.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recsys_edu.kernels import lookup, reference
from recsys_edu.kernels.checks import check_ids
from recsys_edu.kernels.fbgemm import FbgemmFusedTables, why_not_fused, why_not_host_memory, why_not_lookup
from recsys_edu.kernels.optimizers import ROW_OPTIMIZERS, new_state, update_rows
from recsys_edu.kernels.quantized import QuantizedKernel, QuantizedSpec
from recsys_edu.kernels.spec import Kernel, KernelSpec, TableMemory, weight_dtype


def make_kernel(
    spec: KernelSpec | QuantizedSpec, device: torch.device | str = "cpu", backend: str | None = None
) -> Kernel | QuantizedKernel:
    """Build the kernel that a spec describes, with zeroed weights.

    Args:
        backend: None takes FBGEMM wherever it can serve the spec; "pytorch" never does; "fbgemm" demands it. What was
            chosen, and why, is in `kernel.backend` and `kernel.backend_reason`.

    Raises:
        ValueError: an unknown backend, "fbgemm" for a spec that FBGEMM cannot serve, or weights in host memory
            where that cannot be.

    >>> spec = KernelSpec((TableSpec("user", 100, 8),), (0,), pooled=True, optimizer=OptimizerSpec("SGD"))
    >>> kernel = make_kernel(spec)
    >>> kernel(torch.tensor([3, 5]), torch.tensor([0, 2])).shape
    torch.Size([1, 8])
    """
    if isinstance(spec, QuantizedSpec):
        return QuantizedKernel(spec, device, backend)
    device = torch.device(device)
    if backend not in (None, *lookup.BACKENDS):
        raise ValueError(f"backend {backend!r}: expected None or one of {', '.join(lookup.BACKENDS)}")
    dims = [table.dim for table in spec.tables]
    reason = why_not_lookup(dims, weight_dtype(spec.data_type), device) if backend != "pytorch" else "asked for"
    if backend == "fbgemm" and reason:
        raise ValueError(f"backend='fbgemm' was asked for, but {reason}")
    chosen = "pytorch" if reason else "fbgemm"
    if spec.memory is not TableMemory.DEVICE and (hindrance := why_not_host_memory(spec, device) or reason):
        names = ", ".join(table.name for table in spec.tables[:5])
        raise ValueError(f"tables {names} cannot stay in host memory: {hindrance}")
    if spec.optimizer is None:
        return DenseKernel(spec, device, chosen, reason or "FBGEMM serves this spec")
    unfused = reason or why_not_fused(spec, device)
    if unfused is None:
        return FbgemmFusedKernel(spec, device, "FBGEMM serves this spec, optimizer included")
    if not reason:
        unfused = f"FBGEMM looks up; updates are our own: {unfused}"
    return FusedKernel(spec, device, chosen, unfused)


class DenseKernel(nn.Module):
    """Tables as parameters with ordinary gradients."""

    def __init__(self, spec: KernelSpec, device: torch.device, backend: str, reason: str) -> None:
        super().__init__()
        self.spec, self.backend, self.backend_reason = spec, backend, reason
        self.weights = nn.ParameterList(nn.Parameter(table) for table in _zero_tables(spec, device))
        lookup.flatten_tables(list(self.weights))

    def _apply(self, function, recurse: bool = True):
        super()._apply(function, recurse)
        lookup.flatten_tables(list(self.weights))
        return self

    def __setstate__(self, state) -> None:  # copy.deepcopy and unpickling clone each parameter by itself
        super().__setstate__(state)
        lookup.flatten_tables(list(self.weights))

    def forward(self, values_N: Tensor, offsets: Tensor, per_sample_weights_N: Tensor | None = None) -> Tensor:
        values_N, offsets, per_sample_weights_N = _checked(self.spec, values_N, offsets, per_sample_weights_N)
        weights, backend = list(self.weights), "pytorch" if self.backend == "pytorch" else None
        if not self.spec.pooled:
            return lookup.sequence_lookup(weights, self.spec.lane_tables, values_N, offsets, backend)
        return lookup.pooled_lookup(weights, self.spec.lane_tables, values_N, offsets, per_sample_weights_N, backend)

    def table_weights(self) -> list[Tensor]:
        return [weight.detach() for weight in self.weights]

    def optimizer_state(self) -> list[dict[str, Tensor]]:
        return [{} for _ in self.weights]

    def memory_bytes(self) -> dict[str, int]:
        return _memory_bytes(self)

    def extra_repr(self) -> str:
        return _describe(self)


class FusedKernel(nn.Module):
    """Tables that `optimizers.update_rows` updates during backward; the forward is PyTorch's or FBGEMM's."""

    def __init__(self, spec: KernelSpec, device: torch.device, backend: str, reason: str) -> None:
        super().__init__()
        self.spec, self.backend, self.backend_reason = spec, backend, reason
        tables = _zero_tables(spec, device)
        for index, table in enumerate(tables):
            self.register_buffer(f"weight_{index}", table, persistent=False)
            for name, state in new_state(spec.optimizer.kind, spec.tables[index], device).items():
                self.register_buffer(f"{name}_{index}", state, persistent=False)
        self._steps = torch.zeros(1, dtype=torch.int64)  # on the host: formulas need it as a number
        self.learning_rate = spec.optimizer.learning_rate
        # Backward must run although no input needs a gradient; this leaf asks for it and never gets one.
        self._trigger = torch.zeros((), requires_grad=True)
        lookup.flatten_tables(self.table_weights())

    def _apply(self, function, recurse: bool = True):
        super()._apply(function, recurse)
        lookup.flatten_tables(self.table_weights())
        return self

    def forward(self, values_N: Tensor, offsets: Tensor, per_sample_weights_N: Tensor | None = None) -> Tensor:
        values_N, offsets, per_sample_weights_N = _checked(self.spec, values_N, offsets, per_sample_weights_N)
        return _FusedLookup.apply(self._trigger, per_sample_weights_N, self, values_N, offsets)

    def update(
        self,
        learning_rate: float,
        values_N: Tensor,
        offsets: Tensor,
        per_sample_weights_N: Tensor | None,
        gradient: Tensor,
    ) -> None:
        """One optimizer step, given the gradient of a forward's output."""
        spec = self.spec
        self._steps += 1
        step = int(self._steps)
        bounds = reference.lane_bounds(offsets, len(spec.lane_tables))
        tables = zip(self.table_weights(), self.optimizer_state())
        for index, (weights_RD, state) in enumerate(tables):
            if index not in spec.lane_tables:
                continue
            rows_U, gradients_UD = reference.row_gradients(
                index,
                spec.pooled,
                spec.lane_tables,
                spec.lane_dims,
                values_N,
                offsets,
                bounds,
                per_sample_weights_N,
                gradient,
            )
            update_rows(spec.optimizer, learning_rate, step, weights_RD, state, rows_U, gradients_UD)

    @property
    def step_count(self) -> int:
        """How many backward passes have updated the tables; settable, for checkpoints."""
        return int(self._steps)

    @step_count.setter
    def step_count(self, steps: int) -> None:
        self._steps.fill_(steps)

    def table_weights(self) -> list[Tensor]:
        return [getattr(self, f"weight_{index}") for index in range(len(self.spec.tables))]

    def optimizer_state(self) -> list[dict[str, Tensor]]:
        optimizer = ROW_OPTIMIZERS[self.spec.optimizer.kind]
        counter = {"iter": self._steps} if optimizer.counts_steps else {}
        return [
            {name: getattr(self, f"{name}_{index}") for name in optimizer.state} | counter
            for index in range(len(self.spec.tables))
        ]

    def memory_bytes(self) -> dict[str, int]:
        return _memory_bytes(self)

    def extra_repr(self) -> str:
        return _describe(self)


class _FusedLookup(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        trigger: Tensor,
        per_sample_weights_N: Tensor | None,
        kernel: FusedKernel,
        values_N: Tensor,
        offsets: Tensor,
    ) -> Tensor:
        ctx.kernel, ctx.learning_rate = kernel, kernel.learning_rate
        ctx.save_for_backward(values_N, offsets, per_sample_weights_N)
        weights, lanes = kernel.table_weights(), kernel.spec.lane_tables
        backend = "pytorch" if kernel.backend == "pytorch" else None
        if not kernel.spec.pooled:
            return lookup.sequence_lookup(weights, lanes, values_N, offsets, backend)
        return lookup.pooled_lookup(weights, lanes, values_N, offsets, per_sample_weights_N, backend)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        kernel = ctx.kernel
        values_N, offsets, per_sample_weights_N = ctx.saved_tensors
        sample_gradients = None
        if ctx.needs_input_grad[1]:  # before the update: the weights that the forward saw
            sample_gradients = reference.sample_weight_gradients(
                kernel.table_weights(), kernel.spec.lane_tables, values_N, offsets, gradient
            )
        kernel.update(ctx.learning_rate, values_N, offsets, per_sample_weights_N, gradient)
        return None, sample_gradients, None, None, None


class FbgemmFusedKernel(nn.Module):
    """Tables that FBGEMM looks up and updates."""

    def __init__(self, spec: KernelSpec, device: torch.device, reason: str) -> None:
        super().__init__()
        self.spec, self.backend, self.backend_reason = spec, "fbgemm", reason
        self.fused = FbgemmFusedTables(spec, device)
        unused = [index for index in range(len(spec.tables)) if index not in spec.lane_tables]
        for index in unused:  # FBGEMM wants a lane for each table: tables without one are kept here
            table = spec.tables[index]
            weights = torch.zeros(table.num_rows, table.dim, dtype=weight_dtype(spec.data_type), device=device)
            self.register_buffer(f"weight_{index}", weights, persistent=False)
            for name, state in new_state(spec.optimizer.kind, table, device).items():
                self.register_buffer(f"{name}_{index}", state, persistent=False)

    def forward(self, values_N: Tensor, offsets: Tensor, per_sample_weights_N: Tensor | None = None) -> Tensor:
        values_N, offsets, per_sample_weights_N = _checked(self.spec, values_N, offsets, per_sample_weights_N)
        if offsets.numel() == 1:  # B = 0: nothing to look up, and FBGEMM cannot divide by it
            width = self.spec.output_dim
            return torch.zeros(0, width, device=values_N.device, requires_grad=torch.is_grad_enabled())
        return self.fused.lookup(values_N, offsets, per_sample_weights_N)

    def settle(self) -> None:
        """Make the live weights current; see FbgemmFusedTables."""
        self.fused.settle()

    @property
    def learning_rate(self) -> float:
        return self.fused.tbe.get_learning_rate()

    @learning_rate.setter
    def learning_rate(self, learning_rate: float) -> None:
        self.fused.tbe.set_learning_rate(learning_rate)

    @property
    def step_count(self) -> int:
        """How many steps FBGEMM has counted; settable, for checkpoints."""
        return int(self.fused.steps)

    @step_count.setter
    def step_count(self, steps: int) -> None:
        self.fused.steps.fill_(steps)

    def table_weights(self) -> list[Tensor]:
        used = self.fused.weights()
        return [used[i] if i in used else getattr(self, f"weight_{i}") for i in range(len(self.spec.tables))]

    def optimizer_state(self) -> list[dict[str, Tensor]]:
        optimizer, used = ROW_OPTIMIZERS[self.spec.optimizer.kind], self.fused.optimizer_state(self.spec.optimizer.kind)
        counter = {"iter": self.fused.steps} if optimizer.counts_steps else {}
        return [
            (used[i] if i in used else {name: getattr(self, f"{name}_{i}") for name in optimizer.state}) | counter
            for i in range(len(self.spec.tables))
        ]

    def memory_bytes(self) -> dict[str, int]:
        return _memory_bytes(self)

    def extra_repr(self) -> str:
        return _describe(self)


def _zero_tables(spec: KernelSpec, device: torch.device) -> list[Tensor]:
    """Views of one zeroed buffer."""
    sizes = [table.num_rows * table.dim for table in spec.tables]
    pieces = torch.zeros(sum(sizes), dtype=weight_dtype(spec.data_type), device=device).split(sizes)
    return [piece.view(table.num_rows, table.dim) for piece, table in zip(pieces, spec.tables)]


def _checked(
    spec: KernelSpec, values_N: Tensor, offsets: Tensor, per_sample_weights_N: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    if per_sample_weights_N is not None and not spec.pooled:
        raise ValueError("a sequence lookup has no bags to weight: multiply its output instead")
    if per_sample_weights_N is not None and per_sample_weights_N.shape != values_N.shape:
        raise ValueError(f"{values_N.numel()} ids need as many sample weights, got {per_sample_weights_N.numel()}")
    values_N, offsets, per_sample_weights_N = lookup.prepare(values_N, offsets, per_sample_weights_N)
    num_lanes = len(spec.lane_tables)
    reference.batch_size_of(offsets, num_lanes)  # raises where offsets and lanes disagree
    if spec.validate_ids:
        features = spec.lane_features or tuple(f"lane {lane}" for lane in range(num_lanes))
        bounds = reference.lane_bounds(offsets, num_lanes)
        if bool((offsets[1:] < offsets[:-1]).any()):  # host sync: a bag of negative length reads foreign memory
            raise ValueError("offsets decrease: a bag has a negative length")
        check_ids(values_N, bounds, features, spec.lane_table_names, spec.lane_rows)
    return values_N, offsets, per_sample_weights_N


def _memory_bytes(kernel: Kernel) -> dict[str, int]:
    """Bytes that a kernel's tables and their optimizer state hold."""
    weights = sum(weight.numel() * weight.element_size() for weight in kernel.table_weights())
    states = {id(t): t for state in kernel.optimizer_state() for t in state.values()}.values()
    return {"weights": weights, "optimizer_state": sum(t.numel() * t.element_size() for t in states)}


def _describe(kernel: Kernel) -> str:
    spec = kernel.spec
    optimizer = spec.optimizer.kind if spec.optimizer else "none (gradients)"
    return (
        f"{len(spec.tables)} tables, {len(spec.lane_tables)} lanes, {'pooled' if spec.pooled else 'sequence'}, "
        f"{spec.data_type}, optimizer {optimizer}, backend {kernel.backend} ({kernel.backend_reason})"
    )
