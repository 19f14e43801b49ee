"""Pooled assembly: how the pieces that come back become the answer, and how its gradient becomes pieces again.

Every rank returns, for each bag of mine, the columns of its lanes. A column of a table with whole rows comes back once
and is copied; one of a row-split table comes back once per row block and is added up. That is one exchange forward and
one backward, whatever the mix of sharding types. (Sequences, one row per id: sequence_assembly.py.)

The exchange is cut in two autograd functions, start and wait, with the receive buffer as the value between them. What
a model computes in between overlaps with it, and what it computed in between overlaps again in backward, where wait
starts the exchange of gradients and start waits for it.

Suffixes: B local batch, D columns, W ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from recsys_edu.distributed.exchange import Exchange
from recsys_edu.distributed.flight import Flight
from recsys_edu.distributed.layout import Lane, Layout


@dataclass(frozen=True)
class ColumnRun:
    """Neighbouring columns that come back side by side and stay side by side.

    `received` are columns of the piece from `rank`, `answer` columns of the module's output. Runs of a table's first
    row block are written, those of later ones added.
    """

    rank: int
    received: slice
    answer: slice
    add: bool


def column_runs(layout: Layout) -> tuple[ColumnRun, ...]:
    """The fewest runs that take every returned column to its place; writes before additions, blocks in row order."""
    runs: list[tuple[int, ColumnRun]] = []
    for rank, lanes in enumerate(layout.lanes_W):
        received = 0
        for lane in lanes:
            columns = slice(lane.first_column, lane.first_column + lane.width)
            run = ColumnRun(rank, slice(received, received + lane.width), columns, lane.row_block > 0)
            received += lane.width
            if runs and _continues(runs[-1], lane, run):
                _, last = runs.pop()
                received_columns = slice(last.received.start, run.received.stop)
                run = ColumnRun(rank, received_columns, slice(last.answer.start, columns.stop), run.add)
            runs.append((lane.row_block, run))
    return tuple(run for _, run in sorted(runs, key=lambda pair: pair[0]))


def _continues(previous: tuple[int, ColumnRun], lane: Lane, run: ColumnRun) -> bool:
    block, last = previous
    return last.rank == run.rank and block == lane.row_block and last.answer.stop == run.answer.start


class PooledAssembly:
    """The constants of pooled assembly for one layout: where columns go, which are means.

    Args:
        layout: the lanes.
        local_columns: output columns filled from this rank's own replicas (data-parallel tables), in order.
    """

    def __init__(self, layout: Layout, local_columns: tuple[slice, ...] = ()) -> None:
        self.width_W = layout.width_W
        self.runs = column_runs(layout)
        self.local_columns = local_columns
        self.num_columns = layout.num_columns
        self.means = [
            (output.feature, slice(output.column, output.column + output.table.num_columns))
            for output in layout.outputs
            if output.table.mean
        ]

    def scatter(self, pieces: Tensor, local_BD: Tensor | None, batch_size: int) -> Tensor:
        """Returned pieces, rank after rank, to the output [B, D] of sums."""
        answer_BD = pieces.new_empty(batch_size, self.num_columns)
        blocks = self._blocks(pieces, batch_size)
        for run in self.runs:
            target, piece = answer_BD[:, run.answer], blocks[run.rank][:, run.received]
            target.add_(piece) if run.add else target.copy_(piece)
        first = 0
        for columns in self.local_columns:
            width = columns.stop - columns.start
            answer_BD[:, columns] = local_BD[:, first : first + width]
            first += width
        return answer_BD

    def gather(self, gradient_BD: Tensor) -> Tensor:
        """The adjoint of `scatter`: every returned column gets the gradient of the column it went into."""
        batch_size = gradient_BD.shape[0]
        pieces = gradient_BD.new_empty(batch_size * sum(self.width_W))
        blocks = self._blocks(pieces, batch_size)
        for run in self.runs:
            blocks[run.rank][:, run.received] = gradient_BD[:, run.answer]
        return pieces

    def _blocks(self, pieces: Tensor, batch_size: int) -> list[Tensor]:
        parts = pieces.split([batch_size * width for width in self.width_W])
        return [part.view(batch_size, width) for part, width in zip(parts, self.width_W)]

    def divide_means(self, answer_BD: Tensor, flight: Flight) -> None:
        """Turn the sums of MEAN tables into means, in place; an empty bag stays zero."""
        for feature, columns in self.means:
            lengths_B = flight.kjt.lengths().view(-1, flight.batch_size)[flight.kjt.keys().index(feature)]
            answer_BD[:, columns] /= lengths_B.clamp(min=1).unsqueeze(1)


class StartPooled(torch.autograd.Function):
    """Start to return pooled columns to the ranks whose bags they are; backward waits for their gradients.

    `anchor` requires a gradient even where no local table does, so that every rank joins the backward exchange.
    """

    @staticmethod
    def forward(ctx, pooled: Tensor, anchor: Tensor, flight: Flight, exchange: Exchange, assembly: PooledAssembly):
        ctx.flight, ctx.shape = flight, pooled.shape
        width = pooled.shape[1]
        send_W = [batch_size * width for batch_size in flight.batch_sizes_W]
        receive_W = [flight.batch_size * width for width in assembly.width_W]
        flight.answer = exchange.start(pooled.flatten(), send_W, receive_W, "pooled embeddings")
        return flight.answer.received.view(-1)

    @staticmethod
    def backward(ctx, placeholder: Tensor):
        return ctx.flight.gradient.wait().view(ctx.shape), None, None, None, None


class WaitPooled(torch.autograd.Function):
    """Wait for the returned columns and assemble the output; backward starts the exchange of gradients."""

    @staticmethod
    def forward(ctx, returned: Tensor, local_BD, flight: Flight, exchange: Exchange, assembly: PooledAssembly):
        ctx.flight, ctx.exchange, ctx.assembly, ctx.has_local = flight, exchange, assembly, local_BD is not None
        answer_BD = assembly.scatter(flight.answer.wait(), local_BD, flight.batch_size)
        assembly.divide_means(answer_BD, flight)
        return answer_BD

    @staticmethod
    def backward(ctx, gradient_BD: Tensor):
        flight, exchange, assembly = ctx.flight, ctx.exchange, ctx.assembly
        if assembly.means:
            gradient_BD = gradient_BD.clone()
            assembly.divide_means(gradient_BD, flight)
        local = torch.cat([gradient_BD[:, columns] for columns in assembly.local_columns], 1) if ctx.has_local else None
        # One process with W times the batch would divide its mean loss by W times as many examples; so does DDP.
        pieces = assembly.gather(gradient_BD)
        if exchange.world_size > 1:
            pieces.div_(exchange.world_size)
        width = assembly.width_W[exchange.rank]
        send_W = [flight.batch_size * width for width in assembly.width_W]
        receive_W = [batch_size * width for batch_size in flight.batch_sizes_W]
        flight.gradient = exchange.start(pieces, send_W, receive_W, "gradients of pooled embeddings")
        return pieces, local, None, None, None
