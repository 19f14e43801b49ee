"""The first three phases of a sharded lookup, shared by pooled and sequence collections.

    start_input      route the batch, tell every rank how much is coming
    exchange_input   learn the sizes, send lengths and ids
    lookup           take what arrived, make it lane-major, run this rank's kernels

The fourth, `finish`, differs between pooled and sequence answers: pooled_assembly.py, sequence_assembly.py. A `Flight`
is one batch on its way through the phases; a pipeline holds several. Whatever the mix of sharding types, two exchanges
carry the whole input: the sizes and one payload; a third, differentiable, follows where features carry weights.

Suffixes: B local batch, W ranks, L lanes of all ranks, l lanes of this rank, N values sent, M values received.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recsys_edu.distributed.exchange import Block, Exchange, Transfer
from recsys_edu.distributed.layout import Layout
from recsys_edu.distributed.routing import Router, Wire, offsets_of, pad_to_common_batch
from recsys_edu.kernels import make_kernel
from recsys_edu.kernels.jagged_ops import permute_1d
from recsys_edu.sparse.checks import lengths_fit
from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor

if TYPE_CHECKING:
    from recsys_edu.distributed.index_dedup import Repeats
    from recsys_edu.distributed.sequence_assembly import Places

NUM_SIZES = 4  # what each rank tells each other: number of values, batch size, bad feature + 1 (or 0), bad id


class NoBatch(Exception):
    """Some ranks had no batch for this flight; `reason_W` has the number that each gave `start_absent`, 0 for a batch.

    Raised by `exchange_input` on every rank alike, before anything was looked up.
    """

    def __init__(self, reason_W: list[int]) -> None:
        super().__init__(reason_W)
        self.reason_W = reason_W


@dataclass(frozen=True)
class KernelAnswer:
    """What one kernel looked up for all ranks: pooled `[sum of B, columns]`, or one row per id, lane after lane.

    `counts_W` says how many rows each rank asked for. Pooled rows lie rank after rank; those of sequences lie lane
    after lane, and `permutation` picks them in the order in which their ids arrived (None: they lie so already).
    """

    rows: Tensor
    counts_W: list[int]
    permutation: Tensor | None = None


@dataclass
class Flight:
    """One batch in progress through a sharded module: what was started, and what is known so far."""

    kjt: KeyedJaggedTensor
    wire: Wire
    sizes: Transfer
    variable: KeyedJaggedTensor | None = None
    """The batch as it was given, where its features differ in batch size; `kjt` has them padded to a common one."""
    repeats: Repeats | None = None
    """The batch as it was given, where only its distinct ids travel; `kjt` has those, one bag per feature."""
    phase: int = 1
    sent_values_W: list[int] = field(default_factory=list)
    received_values_W: list[int] = field(default_factory=list)
    batch_sizes_W: list[int] = field(default_factory=list)
    payload: Transfer | None = None
    weights: Tensor | None = None
    lane_order_M: Tensor | None = None
    """For every value in lane-major order, its place among the received ones; None when they are the same."""
    totals_Wl: Tensor | None = None
    """How many values each rank sent for each lane of this one."""
    results: list[KernelAnswer] = field(default_factory=list)
    """One per kernel of this rank."""
    kept: list[tuple[Tensor, KernelAnswer, str]] = field(default_factory=list)
    """Per kernel of data-parallel copies this rank's own rows, all ranks' answer, and a label."""
    returned: tuple[Tensor, ...] = ()
    """Buffers that the answers arrive in."""
    under_way: dict[str, Transfer] = field(default_factory=dict)
    """Started transfers of answers and of gradients, by what they carry."""
    pooled: Tensor | None = None
    pieces: Tensor | None = None
    """Pooled columns that left this rank, and those that came: once read, their gradients travel in this memory."""
    places: Places | None = None
    answered_W: list[list[Block]] = field(default_factory=list)
    """Sequences only: where returned rows go, and the blocks of rows that each rank gets from this one."""
    landed: bool = False
    """The answer has been taken."""

    @property
    def batch_size(self) -> int:
        return self.wire.batch_size

    def land(self) -> tuple[Tensor, ...]:
        """The returned buffers, for the last phase; the flight, which autograd holds, lets go of their tensors.

        Raises:
            RuntimeError: the flight has landed before.
        """
        if self.landed:
            raise RuntimeError("this flight has landed, its answer was taken before: start_input(batch) begins another")
        self.landed = True
        returned, self.returned, self.results, self.kept, self.weights = self.returned, (), [], [], None
        return returned


class LaneLookup:
    """This rank's kernels and the three phases that feed them.

    Args:
        layout: the lanes, equal on every rank.
        exchange: this rank's end of the all-to-all.
        device: where batches and shards are.
        weighted: features carry per-sample weights.

    Raises:
        ValueError: from `exchange_input`, on every rank alike, when the lengths of any rank's batch miss its values.
        IndexError: from `exchange_input`, on every rank alike, when any rank's batch has an id that is not a row of
            its table; it names rank, feature, id and table, and nothing has been updated.
        NoBatch: from `exchange_input`, on every rank alike, when a rank called `start_absent`.
    """

    def __init__(self, layout: Layout, exchange: Exchange, device: torch.device, weighted: bool = False) -> None:
        self.layout, self.exchange, self.device, self.weighted = layout, exchange, device, weighted
        self.rank_kernels = layout.kernels_of_rank(exchange.rank)
        self.kernels = [make_kernel(kernel.spec, device) for kernel in self.rank_kernels]
        self.num_lanes = layout.num_lanes_W[exchange.rank]
        largest = max((shard.num_rows for table in layout.tables for shard in table.shards), default=0)
        self.wire_dtype = torch.int32 if largest < 2**31 else torch.int64
        self._routers: dict[tuple[str, ...], Router] = {}
        rows_of_feature: dict[str, int] = {}
        for output in layout.outputs:
            smallest = rows_of_feature.get(output.feature, output.table.num_rows)
            rows_of_feature[output.feature] = min(smallest, output.table.num_rows)
        self._rows_of_feature = rows_of_feature
        self._fewest_rows = min(rows_of_feature.values(), default=0)

    def start_input(self, kjt: KeyedJaggedTensor) -> Flight:
        """Phase 1: route the batch and start to tell every rank how much it will get."""
        variable = kjt if kjt.variable_stride_per_key() else None
        if variable is not None:
            kjt = pad_to_common_batch(kjt)
        if self.weighted and kjt.weights_or_none() is None:
            raise ValueError("this collection is_weighted, but the batch's KeyedJaggedTensor has no weights")
        problem_2 = self._find_bad_id(kjt)
        if bool(problem_2[0] > 0):  # host sync: ids that are no rows must not reach a kernel
            kjt = _without_values(kjt)
        return self._start_sizes(kjt, variable, problem_2)

    def start_absent(self, reason: int) -> Flight:
        """Phase 1 of a rank that has no batch to look up, so that the others learn it rather than wait for its ids.

        Args:
            reason: a positive number for the other ranks; `exchange_input` raises NoBatch with it on all of them.
        """
        nothing = torch.empty(0, dtype=torch.int64, device=self.device)
        weights = nothing.float() if self.weighted else None
        kjt = KeyedJaggedTensor(list(self.layout.features), nothing, weights, lengths=nothing, stride=0)
        return self._start_sizes(kjt, None, torch.tensor([-reason, 0], device=self.device))

    def _start_sizes(self, kjt: KeyedJaggedTensor, variable: KeyedJaggedTensor | None, problem_2: Tensor) -> Flight:
        wire = self._router(tuple(kjt.keys())).route(kjt, with_source=self.weighted or not self.layout.pooled)
        values_W = _sum_by_rank(wire.lengths_LB.sum(1), self.layout.num_lanes_W)
        sizes_W4 = torch.empty(self.exchange.world_size, NUM_SIZES, dtype=torch.int64, device=values_W.device)
        sizes_W4[:, 0] = values_W
        sizes_W4[:, 1] = wire.batch_size
        sizes_W4[:, 2:] = problem_2
        counts_W = [NUM_SIZES] * self.exchange.world_size
        sizes = self.exchange.start(sizes_W4.flatten(), counts_W, counts_W, "sizes")
        flight = Flight(kjt, wire, sizes, variable)
        flight.sent_values_W = values_W.tolist()  # host sync: all-to-all takes its split sizes from the host
        return flight

    def exchange_input(self, flight: Flight) -> None:
        """Phase 2: learn what is coming, then start to send lengths and ids, packed, one piece per rank."""
        flight.phase = 2
        received_W4 = flight.sizes.wait().view(-1, NUM_SIZES).tolist()  # host sync: sizes of the receive buffers
        self._raise_if_bad(received_W4)
        flight.received_values_W = [row[0] for row in received_W4]
        flight.batch_sizes_W = [row[1] for row in received_W4]
        wire, num_lanes_W = flight.wire, self.layout.num_lanes_W
        if self.exchange.world_size > 1 and self.layout.lanes:
            lengths_W = wire.lengths_LB.to(self.wire_dtype).split(num_lanes_W)
            values_W = wire.values_N.to(self.wire_dtype).split(flight.sent_values_W)
            send = torch.cat([part for pair in zip(lengths_W, values_W) for part in (pair[0].flatten(), pair[1])])
            send_W = [lanes * wire.batch_size + n for lanes, n in zip(num_lanes_W, flight.sent_values_W)]
            receive_W = [self.num_lanes * b + n for b, n in zip(flight.batch_sizes_W, flight.received_values_W)]
            flight.payload = self.exchange.start(send, send_W, receive_W, "lengths and ids")
        if self.weighted:
            weights = flight.kjt.weights()[wire.source_N]
            scale_N = self._weight_gradient_scale(flight)
            flight.weights = _StartWeights.apply(weights, flight, self.exchange, scale_N)

    def lookup(self, flight: Flight) -> None:
        """Phase 3: take what arrived, lane by lane, and run this rank's kernels over it."""
        flight.phase = 3
        lengths_lM, values_M = self._lane_major(flight)
        weights_M = None
        if self.weighted:
            weights_M = _WaitWeights.apply(flight.weights, flight, self.exchange)
            weights_M = weights_M if flight.lane_order_M is None else weights_M[flight.lane_order_M]
        if not self.kernels:
            flight.results = self._nothing_owned(flight, weights_M)
            return
        offsets, num_bags, first_lane = offsets_of(lengths_lM), lengths_lM.shape[1], 0
        for kernel, ranked in zip(self.kernels, self.rank_kernels):
            lanes = slice(first_lane, first_lane + len(ranked.lanes))
            part, start, stop = offsets, 0, values_M.numel()
            if len(self.kernels) > 1:
                part = offsets[lanes.start * num_bags : lanes.stop * num_bags + 1]
                start, stop = part[[0, -1]].tolist()  # host sync: where this kernel's values lie
                part = part - start
            weights = None if weights_M is None else weights_M[start:stop]
            rows = kernel(values_M[start:stop], part, weights)
            flight.results.append(self._answer(flight, rows, lanes, slice(start, stop)))
            first_lane = lanes.stop

    def _answer(self, flight: Flight, rows: Tensor, lanes: slice, values: slice) -> KernelAnswer:
        if self.layout.pooled:
            return KernelAnswer(rows, flight.batch_sizes_W)
        counts_W = flight.totals_Wl[:, lanes].sum(1).tolist()  # host sync: split sizes of the returned rows
        order = flight.lane_order_M
        return KernelAnswer(rows, counts_W, None if order is None else order[values].argsort())

    def _nothing_owned(self, flight: Flight, weights_M: Tensor | None) -> list[KernelAnswer]:
        """The answer of a rank without lanes: no columns, yet a part of the graph, so that it joins every backward."""
        if not self.layout.pooled:
            return []
        nothing = torch.zeros(sum(flight.batch_sizes_W), 0, device=self.device)
        rows = nothing if weights_M is None else nothing + 0.0 * weights_M.sum()
        return [KernelAnswer(rows, flight.batch_sizes_W)]

    def _lane_major(self, flight: Flight) -> tuple[Tensor, Tensor]:
        """What arrived, rank after rank, as lengths [l, sum of B] and values ordered by lane, then rank."""
        if flight.payload is None:
            flight.totals_Wl = flight.wire.lengths_LB.sum(1).unsqueeze(0)
            return flight.wire.lengths_LB, flight.wire.values_N
        lengths, values = [], []
        pieces = flight.payload.wait().split(
            [self.num_lanes * b + n for b, n in zip(flight.batch_sizes_W, flight.received_values_W)]
        )
        for piece, batch_size in zip(pieces, flight.batch_sizes_W):
            lengths.append(piece[: self.num_lanes * batch_size].view(self.num_lanes, batch_size))
            values.append(piece[self.num_lanes * batch_size :])
        received = torch.cat(values)
        flight.totals_Wl = totals_Wl = torch.stack([part.sum(1, dtype=self.wire_dtype) for part in lengths])
        if self.num_lanes < 2:
            return torch.cat(lengths, dim=1), received
        segments = torch.arange(totals_Wl.numel(), device=received.device).view(totals_Wl.shape).t().flatten()
        if self.weighted or not self.layout.pooled:
            places = torch.arange(received.numel(), device=received.device)
            _, flight.lane_order_M, _ = permute_1d(segments, totals_Wl.flatten(), places)
            return torch.cat(lengths, dim=1), received[flight.lane_order_M]
        _, values_M, _ = permute_1d(segments, totals_Wl.flatten(), received)
        return torch.cat(lengths, dim=1), values_M

    def _weight_gradient_scale(self, flight: Flight) -> Tensor | int:
        """What gradients of weights are multiplied with, one number per value sent or one for all.

        The gradient of the tables was divided by W on its way out, but these weights belong to this rank alone. Of
        a copied table every rank returns the same gradient, which makes it W times as large already.
        """
        world_size, lanes = self.exchange.world_size, self.layout.lanes
        if not any(lane.output.table.everywhere for lane in lanes):
            return world_size
        scales = [1 if lane.output.table.everywhere else world_size for lane in lanes]
        totals_L = flight.wire.lengths_LB.sum(1)
        return torch.repeat_interleave(
            torch.tensor(scales, device=totals_L.device), totals_L, output_size=flight.wire.values_N.numel()
        )

    def _router(self, keys: tuple[str, ...]) -> Router:
        if keys not in self._routers:
            self._routers[keys] = Router(self.layout, list(keys), self.device)
        return self._routers[keys]

    def _find_bad_id(self, kjt: KeyedJaggedTensor) -> Tensor:
        """[position of the feature + 1, id] of the first id that is no row of its table; [0, 0] when all are.

        A batch whose lengths do not fit its values answers with one feature more than there are.
        """
        values_N = kjt.values()
        nothing_bad = torch.zeros(2, dtype=torch.int64, device=values_N.device)
        if not lengths_fit(kjt):
            return nothing_bad + torch.tensor([len(self.layout.features) + 1, 0], device=values_N.device)
        if values_N.numel() == 0:
            return nothing_bad
        low, high = torch.stack(values_N.aminmax()).tolist()  # host sync: one pass tells most batches are fine
        if low >= 0 and high < self._fewest_rows:
            return nothing_bad
        no_limit = torch.iinfo(torch.int64).max
        keys = kjt.keys()
        limits = torch.tensor([self._rows_of_feature.get(key, no_limit) for key in keys], device=values_N.device)
        lengths_F = torch.tensor(kjt.length_per_key(), device=values_N.device)
        limit_N = torch.repeat_interleave(limits, lengths_F, output_size=values_N.numel())
        bad_N = (values_N < 0) & (limit_N < no_limit) | (values_N >= limit_N)
        if not bad_N.any():  # host sync: tables of different sizes end here
            return nothing_bad
        first = int(bad_N.int().argmax())
        feature = int(torch.searchsorted(lengths_F.cumsum(0), first, right=True))
        key = self.layout.features.index(keys[feature])
        return torch.stack([torch.tensor(key + 1), values_N[first].cpu().long()]).to(values_N.device)

    def _raise_if_bad(self, sizes_W4: list[list[int]]) -> None:
        if any(feature < 0 for _, _, feature, _ in sizes_W4):
            raise NoBatch([max(-feature, 0) for _, _, feature, _ in sizes_W4])
        for rank, (_, _, feature, bad_id) in enumerate(sizes_W4):
            if feature > len(self.layout.features):
                raise ValueError(
                    f"rank {rank}: the lengths of its batch are negative or do not add up to its number of values. No "
                    "rank looked anything up; recsys_edu.sparse.jagged_tensor_validator says what is wrong with it"
                )
            if feature:
                name = self.layout.features[feature - 1]
                table = min(
                    (output.table for output in self.layout.outputs if output.feature == name),
                    key=lambda table: table.num_rows,
                )
                raise IndexError(
                    f"rank {rank}: feature {name!r} has id {bad_id}, but table {table.name!r} has rows 0 to "
                    f"{table.num_rows - 1}. No rank looked anything up or updated anything; map ids into the table "
                    "(hash or remap them) or make the table larger"
                )


class _StartWeights(torch.autograd.Function):
    """Per-sample weights travel like ids; on the way back, their gradients arrive here."""

    @staticmethod
    def forward(ctx, weights_N: Tensor, flight: Flight, exchange: Exchange, scale_N: Tensor | int) -> Tensor:
        ctx.flight, ctx.scale_N = flight, scale_N
        transfer = exchange.start(weights_N, flight.sent_values_W, flight.received_values_W, "weights")
        flight.under_way["weights"] = transfer
        return transfer.received

    @staticmethod
    def backward(ctx, placeholder: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.flight.under_way["gradients of weights"].wait() * ctx.scale_N, None, None, None


class _WaitWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx, received_M: Tensor, flight: Flight, exchange: Exchange) -> Tensor:
        ctx.flight, ctx.exchange = flight, exchange
        return flight.under_way["weights"].wait().clone()

    @staticmethod
    def backward(ctx, gradient_M: Tensor) -> tuple[Tensor, None, None]:
        flight, exchange = ctx.flight, ctx.exchange
        flight.under_way["gradients of weights"] = exchange.start(
            gradient_M.contiguous(), flight.received_values_W, flight.sent_values_W, "gradients of weights"
        )
        return gradient_M, None, None


def _sum_by_rank(totals_L: Tensor, num_lanes_W: list[int]) -> Tensor:
    return torch.stack([part.sum() for part in totals_L.split(num_lanes_W)])


def _without_values(kjt: KeyedJaggedTensor) -> KeyedJaggedTensor:
    """The same keys and batch size with every bag empty: what a rank with a bad id sends while all ranks stop."""
    weights = kjt.weights_or_none()
    return KeyedJaggedTensor(
        kjt.keys(),
        kjt.values()[:0],
        None if weights is None else weights[:0],
        lengths=torch.zeros_like(kjt.lengths()),
        stride=kjt.stride(),
    )
