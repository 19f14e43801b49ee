"""Data-parallel tables: a whole copy on every rank.

Without an optimizer in backward they are ordinary parameters: looked up where the batch is, gradients averaged by DDP.
With one they are trained like shards: every rank looks up the ids of all ranks, keeps the answers to its own, and in
backward gets everybody's gradients. All copies apply the same update to the same rows in the same order, so they stay
equal to the bit, and what travels is the touched rows, not the table.

Counterpart: torchrec's data_parallel sharding (dense compute kernel).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from recsys_edu.distributed.exchange import Exchange
from recsys_edu.distributed.flight import Flight, KernelAnswer
from recsys_edu.distributed.routing import offsets_of
from recsys_edu.distributed.tables import Tables
from recsys_edu.kernels import Kernel, make_kernel
from recsys_edu.kernels.jagged_ops import permute_2d
from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor


class Replicas:
    """The dense kernels of a module's data-parallel tables, and the order of what this rank's own copies answer."""

    def __init__(self, tables: Tables, device: torch.device, weighted: bool = False) -> None:
        self._device, self._weighted = device, weighted
        self.kernels = [make_kernel(spec, device) for spec in tables.replica_specs().values()]
        self._features = [kernel.spec.lane_features for kernel in self.kernels]
        dense = [o for t in tables.replica_specs() for o in tables.replica_outputs() if o.table.data_type is t]
        # Kernel order inside a rank is the same on all ranks, so rank 0's lanes speak for every copy.
        copies = [lane.output for lane in tables.layout.lanes_W[0] if lane.output.table.everywhere]
        self._lane_of_output = [[*dense, *copies].index(output) for output in tables.local_outputs]
        self._copy_features = [output.feature for output in copies]
        self._copy_widths = [output.table.num_columns for output in copies]
        self._pooled = tables.layout.pooled

    def keep(self, flight: Flight, copies: list[KernelAnswer], exchange: Exchange) -> None:
        """With the lookup: of what the trained copies gave for all ranks, keep this rank's own."""
        for index, answer in enumerate(copies):
            label = f"gradients of copies {index}"
            flight.kept.append((KeepOwn.apply(answer.rows, answer, flight, exchange, label), answer, label))

    def finish(self, flight: Flight, exchange: Exchange) -> Tensor | None:
        """This rank's own answers, output after output: pooled sums [B, columns], or one row per id; or None."""
        kjt = flight.kjt
        kept = [TellAll.apply(rows, answer, flight, exchange, label) for rows, answer, label in flight.kept]
        answers = [self._lookup(kernel, features, kjt) for kernel, features in zip(self.kernels, self._features)]
        if len(answers) + len(kept) < 2:
            return answers[0][0] if answers else (kept[0] if kept else None)
        dim = 1 if self._pooled else 0
        pieces = [piece for answer, sizes in answers for piece in answer.split(sizes, dim)]
        if kept:
            counts, keys = kjt.length_per_key(), kjt.keys()
            rows = [counts[keys.index(feature)] for feature in self._copy_features]
            pieces += torch.cat(list(kept), dim).split(self._copy_widths if self._pooled else rows, dim)
        return torch.cat([pieces[lane] for lane in self._lane_of_output], dim)

    def _lookup(self, kernel: Kernel, features: Sequence[str], kjt: KeyedJaggedTensor) -> tuple[Tensor, list[int]]:
        """A kernel's answer and the size of each lane in it."""
        keys = kjt.keys()
        rows = [keys.index(feature) for feature in features]
        lengths_LB, values, weights = permute_2d(
            torch.tensor(rows, device=self._device),
            kjt.lengths().view(len(keys), -1),
            kjt.values(),
            kjt.weights() if self._weighted else None,
        )
        counts = kjt.length_per_key()
        sizes = list(kernel.spec.lane_dims) if kernel.spec.pooled else [counts[row] for row in rows]
        return kernel(values, offsets_of(lengths_LB), weights), sizes

    def parameters(self) -> dict[str, nn.Parameter]:
        """The replicated weight of each table."""
        return {
            table.name: weight for kernel in self.kernels for table, weight in zip(kernel.spec.tables, kernel.weights)
        }


class KeepOwn(torch.autograd.Function):
    """Of a kernel's answers to all ranks' ids, those to this rank's own; backward waits for everybody's gradients.

    `label` names the transfer of gradients, one per kernel.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, answer: KernelAnswer, flight: Flight, exchange: Exchange, label: str) -> Tensor:
        ctx.flight, ctx.label, ctx.world_size = flight, label, exchange.world_size
        ctx.shape, ctx.permutation = rows.shape, answer.permutation
        own = slice(sum(answer.counts_W[: exchange.rank]), sum(answer.counts_W[: exchange.rank + 1]))
        return rows[own].clone() if answer.permutation is None else rows[answer.permutation[own]]

    @staticmethod
    def backward(ctx, placeholder: Tensor):
        gradient = ctx.flight.under_way[ctx.label].wait().view(ctx.shape) / ctx.world_size
        if ctx.permutation is not None:
            gradient = torch.empty_like(gradient).index_copy_(0, ctx.permutation, gradient)
        return gradient, None, None, None, None


class TellAll(torch.autograd.Function):
    """Nothing forward; backward starts to send the gradient of this rank's answers to every rank."""

    @staticmethod
    def forward(ctx, kept: Tensor, answer: KernelAnswer, flight: Flight, exchange: Exchange, label: str) -> Tensor:
        ctx.flight, ctx.exchange, ctx.counts_W, ctx.label = flight, exchange, answer.counts_W, label
        return kept.view_as(kept)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        width, world_size = gradient.shape[1], ctx.exchange.world_size
        send = gradient.flatten().repeat(world_size)
        ctx.flight.under_way[ctx.label] = ctx.exchange.start(
            send, [gradient.numel()] * world_size, [count * width for count in ctx.counts_W], ctx.label
        )
        return gradient, None, None, None, None
