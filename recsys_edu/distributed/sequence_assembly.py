"""Sequence assembly: one row piece per id comes back, and each goes to the place its id came from.

The same lanes as on the way in, backwards: un-permute, all-to-all with the sizes swapped, scatter by source position.
Start and wait are two autograd functions, as in assembly.py.

Suffixes: D columns, W ranks, N ids sent, M ids received, l lanes of this rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from recsys_edu.distributed.exchange import Exchange
from recsys_edu.distributed.flight import Flight
from recsys_edu.distributed.layout import Layout


@dataclass(frozen=True)
class RowRun:
    """Neighbouring lanes of one rank that hold the same columns: their rows come back side by side."""

    rank: int
    lanes: slice
    columns: slice

    @property
    def width(self) -> int:
        return self.columns.stop - self.columns.start


def row_runs(layout: Layout) -> tuple[RowRun, ...]:
    """The lanes of all ranks as runs of equal columns, in wire order."""
    runs: list[RowRun] = []
    index = 0
    for rank, lanes in enumerate(layout.lanes_W):
        for lane in lanes:
            columns = slice(lane.shard.columns.start, lane.shard.columns.stop)
            if runs and runs[-1].rank == rank and runs[-1].columns == columns:
                runs[-1] = RowRun(rank, slice(runs[-1].lanes.start, index + 1), columns)
            else:
                runs.append(RowRun(rank, slice(index, index + 1), columns))
            index += 1
    return tuple(runs)


@dataclass(frozen=True)
class Places:
    """For one batch: how many rows every run brings, where each goes, and what comes from whom."""

    num_rows: int
    rows_of_run: list[int]
    place_of_run: tuple[Tensor, ...]
    returned_W: list[int]
    local_rows: list[slice]


class SequenceAssembly:
    """The constants of sequence assembly for one layout.

    All tables of a sequence collection are D columns wide. The output is one [rows, D] tensor: the rows of output 0,
    then those of output 1, and so on.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.runs = row_runs(layout)
        self.num_columns = layout.tables[0].num_columns if layout.tables else 0

    def places(self, flight: Flight) -> Places:
        """Where this rank's returned rows go, from the batch alone."""
        kjt = flight.kjt
        position = {key: index for index, key in enumerate(kjt.keys())}
        rows_of_key, first_of_key = kjt.length_per_key(), kjt.offset_per_key()
        shift_of_output, num_rows, local_rows = {}, 0, []
        for output in self.layout.outputs:
            key = position[output.feature]
            shift_of_output[output] = num_rows - first_of_key[key]
            if not output.table.shards:
                local_rows.append(slice(num_rows, num_rows + rows_of_key[key]))
            num_rows += rows_of_key[key]
        totals_L = [rows_of_key[position[lane.output.feature]] for lane in self.layout.lanes]
        if any(lane.output.table.num_row_blocks > 1 for lane in self.layout.lanes):
            totals_L = flight.wire.lengths_LB.sum(1).tolist()  # host sync: row blocks depend on the ids
        place_N = flight.wire.source_N
        shifts = [shift_of_output[lane.output] for lane in self.layout.lanes]
        if any(shifts):
            shift_L, total_L = (torch.tensor(values, device=place_N.device) for values in (shifts, totals_L))
            place_N = place_N + torch.repeat_interleave(shift_L, total_L, output_size=place_N.numel())
        rows_of_run = [sum(totals_L[run.lanes]) for run in self.runs]
        returned_W = [0] * self.layout.world_size
        for run, rows in zip(self.runs, rows_of_run):
            returned_W[run.rank] += rows * run.width
        return Places(num_rows, rows_of_run, place_N.split(rows_of_run), returned_W, local_rows)

    def scatter(self, pieces: Tensor, local: Tensor | None, places: Places) -> Tensor:
        """Returned row pieces to their places, [rows, D]: of a row-split table every row comes from one rank."""
        answer = pieces.new_empty(places.num_rows, self.num_columns)
        if local is not None:
            for rows, piece in zip(places.local_rows, local.split([r.stop - r.start for r in places.local_rows])):
                answer[rows] = piece
        for run, place, piece in self._pieces(pieces, places):
            answer[:, run.columns].index_copy_(0, place, piece)
        return answer

    def gather(self, gradient: Tensor, places: Places) -> Tensor:
        """The adjoint of `scatter`: every returned row piece gets the gradient of the place it went to."""
        pieces = gradient.new_empty(sum(places.returned_W))
        for run, place, piece in self._pieces(pieces, places):
            piece.copy_(gradient[:, run.columns].index_select(0, place))
        return pieces

    def _pieces(self, pieces: Tensor, places: Places) -> Iterator[tuple[RowRun, Tensor, Tensor]]:
        parts = pieces.split([rows * run.width for run, rows in zip(self.runs, places.rows_of_run)])
        for run, place, part in zip(self.runs, places.place_of_run, parts):
            yield run, place, part.view(-1, run.width)


class WireOrder:
    """Reorders a rank's looked-up rows from lane-major to the order in which their ids arrived, and back."""

    def __init__(self, flight: Flight, results: list[Tensor], kernel_lanes: list[int]) -> None:
        self.shapes = [rows.shape for rows in results]
        orders = [None] * len(results)
        if flight.lane_order_M is not None:
            orders = flight.lane_order_M.split([shape[0] for shape in self.shapes])
        self.permutations = [None if order is None else order.argsort() for order in orders]
        per_kernel = flight.totals_Wl.split(kernel_lanes, dim=1)
        counts_kW = (
            torch.stack([totals.sum(1) for totals in per_kernel]).tolist() if results else []
        )  # host sync: splits
        self.counts_kW = counts_kW
        self.elements_W = [
            sum(counts[rank] * shape[1] for counts, shape in zip(counts_kW, self.shapes))
            for rank in range(len(flight.batch_sizes_W))
        ]

    def pack(self, results: list[Tensor]) -> Tensor:
        """Rows of all kernels, flat, destination rank after destination rank."""
        parts = []
        for rows, permutation, counts_W in zip(results, self.permutations, self.counts_kW):
            parts.append((rows if permutation is None else rows[permutation]).split(counts_W))
        return torch.cat([part.flatten() for of_rank in zip(*parts) for part in of_rank])

    def unpack(self, flat: Tensor) -> list[Tensor]:
        """The adjoint of `pack`: gradients of every kernel's rows, lane-major."""
        pieces_Wk = [
            piece.split([counts[rank] * shape[1] for counts, shape in zip(self.counts_kW, self.shapes)])
            for rank, piece in enumerate(flat.split(self.elements_W))
        ]
        gradients = []
        for k, (shape, permutation) in enumerate(zip(self.shapes, self.permutations)):
            wire = torch.cat([pieces[k] for pieces in pieces_Wk]).view(shape)
            gradients.append(wire if permutation is None else torch.empty_like(wire).index_copy_(0, permutation, wire))
        return gradients


class StartSequence(torch.autograd.Function):
    """Start to return looked-up rows to the ranks whose ids they answer; backward waits for their gradients."""

    @staticmethod
    def forward(ctx, anchor: Tensor, flight: Flight, exchange: Exchange, kernel_lanes: list[int], *results: Tensor):
        ctx.flight, ctx.order = flight, WireOrder(flight, list(results), kernel_lanes)
        flight.answer_elements_W = ctx.order.elements_W
        send = ctx.order.pack(list(results)) if results else anchor.detach()
        transfer = exchange.start(send, ctx.order.elements_W, flight.places.returned_W, "sequence embeddings")
        flight.under_way["rows"] = transfer
        return transfer.received.view(-1)

    @staticmethod
    def backward(ctx, placeholder: Tensor):
        flat = ctx.flight.under_way["gradients of rows"].wait()
        return None, None, None, None, *(ctx.order.unpack(flat) if ctx.order.shapes else ())


class WaitSequence(torch.autograd.Function):
    """Wait for the returned rows and put each in its place; backward starts the exchange of gradients."""

    @staticmethod
    def forward(ctx, returned: Tensor, local, flight: Flight, exchange: Exchange, assembly: SequenceAssembly):
        ctx.flight, ctx.exchange, ctx.assembly = flight, exchange, assembly
        ctx.has_local = local is not None
        return assembly.scatter(flight.under_way["rows"].wait(), local, flight.places)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        flight, exchange = ctx.flight, ctx.exchange
        pieces = ctx.assembly.gather(gradient, flight.places)
        if exchange.world_size > 1:
            pieces.div_(exchange.world_size)  # as in WaitPooled: the mean over W batches
        flight.under_way["gradients of rows"] = exchange.start(
            pieces, flight.places.returned_W, flight.answer_elements_W, "gradients of sequence embeddings"
        )
        local = torch.cat([gradient[rows] for rows in flight.places.local_rows]) if ctx.has_local else None
        return pieces, local, None, None, None
