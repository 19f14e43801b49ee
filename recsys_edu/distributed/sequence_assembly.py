"""Sequence assembly: one row piece per id comes back, and each goes to the place its id came from.

The same lanes as on the way in, backwards: un-permute, all-to-all with the sizes swapped, scatter by source position.
Start and wait are two autograd functions, as in pooled_assembly.py.

Suffixes: D columns, W ranks, N ids sent, M ids received, l lanes of this rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from recsys_edu.distributed.exchange import Block, Exchange, start_rows, used_codecs
from recsys_edu.distributed.flight import Flight, KernelAnswer
from recsys_edu.distributed.layout import Layout
from recsys_edu.distributed.types import QuantizedCommCodecs


@dataclass(frozen=True)
class RowRun:
    """Neighbouring lanes of one rank that hold the same columns: their rows come back side by side."""

    rank: int
    lanes: slice
    columns: slice
    everywhere: bool = False
    """Copies of data-parallel tables: they answer only their own rank, and nothing comes back."""

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
            run = RowRun(rank, slice(index, index + 1), columns, lane.output.table.everywhere)
            if runs and replace(runs[-1], lanes=run.lanes) == run:
                run = replace(run, lanes=slice(runs.pop().lanes.start, index + 1))
            runs.append(run)
            index += 1
    return tuple(runs)


@dataclass(frozen=True)
class Places:
    """For one batch: how many rows every run brings, where each goes, and what comes from whom."""

    num_rows: int
    rows_of_run: list[int]
    place_of_run: tuple[Tensor, ...]
    returned_W: list[list[Block]]
    local_rows: list[slice]


class SequenceAssembly:
    """The constants of sequence assembly for one layout.

    All tables of a sequence collection are D columns wide. The output is one [rows, D] tensor: the rows of output 0,
    then those of output 1, and so on.
    """

    def __init__(self, layout: Layout, codecs: QuantizedCommCodecs | None = None) -> None:
        self.layout = layout
        self.forward_codec, self.backward_codec = used_codecs(codecs)
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
            if output.table.everywhere or not output.table.shards:
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
        returned_W: list[list[Block]] = [[] for _ in range(self.layout.world_size)]
        for run, rows in zip(self.runs, rows_of_run):
            if not run.everywhere:
                returned_W[run.rank].append((rows, run.width))
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
        pieces = gradient.new_empty(sum(rows * columns for blocks in places.returned_W for rows, columns in blocks))
        for run, place, piece in self._pieces(pieces, places):
            piece.copy_(gradient[:, run.columns].index_select(0, place))
        return pieces

    def _pieces(self, pieces: Tensor, places: Places) -> Iterator[tuple[RowRun, Tensor, Tensor]]:
        first = 0
        for run, place in zip(self.runs, places.place_of_run):
            if not run.everywhere:
                size = place.numel() * run.width
                yield run, place, pieces[first : first + size].view(-1, run.width)
                first += size


class WireOrder:
    """Packs a rank's looked-up rows in the order in which their ids arrived, and unpacks their gradients."""

    def __init__(self, answers: list[KernelAnswer], world_size: int) -> None:
        self.answers = answers
        self.blocks_W = [[(answer.counts_W[r], answer.rows.shape[1]) for answer in answers] for r in range(world_size)]

    def pack(self) -> Tensor:
        """Rows of all kernels, flat, destination rank after destination rank."""
        parts = []
        for answer in self.answers:
            rows = answer.rows if answer.permutation is None else answer.rows[answer.permutation]
            parts.append(rows.split(answer.counts_W))
        return torch.cat([part.flatten() for of_rank in zip(*parts) for part in of_rank])

    def unpack(self, flat: Tensor) -> list[Tensor]:
        """The adjoint of `pack`: gradients of every kernel's rows, as the kernel gave them."""
        sizes_Wk = [[rows * columns for rows, columns in blocks] for blocks in self.blocks_W]
        pieces_Wk = [piece.split(sizes) for piece, sizes in zip(flat.split([sum(s) for s in sizes_Wk]), sizes_Wk)]
        gradients = []
        for k, answer in enumerate(self.answers):
            wire = torch.cat([pieces[k] for pieces in pieces_Wk]).view(answer.rows.shape)
            order = answer.permutation
            gradients.append(wire if order is None else torch.empty_like(wire).index_copy_(0, order, wire))
        return gradients


class StartSequence(torch.autograd.Function):
    """Start to return looked-up rows to the ranks whose ids they answer; backward waits for their gradients."""

    @staticmethod
    def forward(ctx, anchor: Tensor, flight: Flight, exchange: Exchange, assembly: SequenceAssembly, answers, *rows):
        ctx.flight, ctx.order = flight, WireOrder(answers, exchange.world_size)
        flight.answered_W = ctx.order.blocks_W
        send = ctx.order.pack() if answers else anchor.detach()
        transfer = start_rows(
            exchange, assembly.forward_codec, send, ctx.order.blocks_W, flight.places.returned_W, "sequence embeddings"
        )
        flight.under_way["rows"] = transfer
        return transfer.received.view(-1)

    @staticmethod
    def backward(ctx, placeholder: Tensor):
        flat = ctx.flight.under_way["gradients of rows"].wait()
        return None, None, None, None, None, *(ctx.order.unpack(flat) if ctx.order.answers else ())


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
        codec = ctx.assembly.backward_codec
        flight.under_way["gradients of rows"] = start_rows(
            exchange, codec, pieces, flight.places.returned_W, flight.answered_W, "gradients of sequence embeddings"
        )
        local = torch.cat([gradient[rows] for rows in flight.places.local_rows]) if ctx.has_local else None
        return pieces, local, None, None, None
