"""Pooled assembly: how the pieces that come back become the answer, and how its gradient becomes pieces again.

Every rank returns, for each bag of mine, the columns of its lanes. A column of a table with whole rows comes back once
and is copied; one of a row-split table comes back once per row block and is added up. That is one exchange forward and
one backward, whatever the mix of sharding types. Columns whose rows lie on the ranks of one host are summed inside that
host first (host_sums.py) and come back once per host. (Sequences, one row per id: sequence_assembly.py.)

The exchange is cut in two autograd functions, start and wait, with the receive buffer as the value between them. What
a model computes in between overlaps with it, and what it computed in between overlaps again in backward, where wait
starts the exchange of gradients and start waits for it.

Suffixes: B local batch, D columns, W ranks, H hosts, S sources (ranks, then hosts).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from recsys_edu.distributed.exchange import Exchange, Transfer, arrived, start_rows, used_codecs
from recsys_edu.distributed.flight import Flight
from recsys_edu.distributed.layout import Lane, Layout
from recsys_edu.distributed.types import QuantizedCommCodecs


@dataclass(frozen=True)
class ColumnRun:
    """Neighbouring columns that come back side by side and stay side by side.

    `received` are columns of the piece from `source` (a rank, or the number of ranks plus a host), `answer` columns of
    the module's output. Runs of row block 0 are written, those of later blocks added.
    """

    source: int
    received: slice
    answer: slice
    row_block: int


def column_runs(layout: Layout) -> tuple[ColumnRun, ...]:
    """The fewest runs that take every returned column to its place; writes before additions, blocks in row order."""
    runs: list[ColumnRun] = []
    for rank, lanes in enumerate(layout.lanes_W):
        _add_runs(runs, rank, [(lane, lane.row_block) for lane in lanes if lane.returns_alone])
    for host in range(len(layout.width_H)):
        # What a host returns is summed over its row blocks, so its first rank's lanes speak for all.
        lanes = layout.lanes_W[host * layout.local_size]
        _add_runs(runs, layout.world_size + host, [(lane, 0) for lane in lanes if lane.host is not None])
    return tuple(sorted(runs, key=lambda run: run.row_block))


def _add_runs(runs: list[ColumnRun], source: int, lanes: list[tuple[Lane, int]]) -> None:
    received = 0
    for lane, row_block in lanes:
        first, last = lane.first_column, lane.first_column + lane.width
        previous = runs[-1] if runs else None
        if previous and (previous.source, previous.row_block, previous.answer.stop) == (source, row_block, first):
            columns = slice(previous.received.start, received + lane.width)
            runs[-1] = replace(previous, received=columns, answer=slice(previous.answer.start, last))
        else:
            runs.append(ColumnRun(source, slice(received, received + lane.width), slice(first, last), row_block))
        received += lane.width


@dataclass(frozen=True)
class Chunks:
    """The runs once more, cut into chunks of one width: then one gather of rows does what takes a copy per run.

        2 ranks, tables t0 t2 on rank 0 and t1 on rank 1, 64 columns each: a bag's answer is three chunks
            returned     rank 0: t0 t2    rank 1: t1
            answer       t0 t1 t2

    Many short runs, as tables dealt out in turn give, cost four times a plain copy of the memory; a gather costs no
    more than one.
    """

    width: int
    received_3C: tuple[tuple[int, ...], ...]
    """Where each of the C chunks of a bag's answer (its first row block) comes back: how many chunks of a bag the
    sources before its own return, its place among those of its own, and how many these are."""
    answers_S: tuple[tuple[int, ...], ...]
    """The other way round: of each chunk that a source returns for a bag, its place in the answer."""

    LEAST_WIDTH = 8  # columns; narrower ones are slower to gather than to copy run by run

    @classmethod
    def of(cls, runs: Sequence[ColumnRun], width_S: Sequence[int], num_columns: int) -> Chunks | None:
        """The chunks; None where the runs are few, or not cut evenly enough."""
        ends = [end for run in runs for end in (run.received.start, run.received.stop, run.answer.start)]
        width = math.gcd(num_columns, *width_S, *ends)
        if len(runs) <= 2 * len(width_S) or width < cls.LEAST_WIDTH:
            return None
        per_bag_S = [columns // width for columns in width_S]
        before_S = [0, *itertools.accumulate(per_bag_S)]
        received_C3 = [(0, 0, 0)] * (num_columns // width)  # stays so for columns that this rank fills itself
        answers_S = [[0] * count for count in per_bag_S]
        for run in runs:
            for chunk in range((run.answer.stop - run.answer.start) // width):
                received, answer = run.received.start // width + chunk, run.answer.start // width + chunk
                answers_S[run.source][received] = answer
                if run.row_block == 0:
                    received_C3[answer] = (before_S[run.source], received, per_bag_S[run.source])
        return cls(width, tuple(zip(*received_C3)), tuple(map(tuple, answers_S)))

    def received(self, batch_size: int, device: torch.device) -> Tensor:
        """For every chunk of the answer, bag after bag, its row among all returned chunks."""
        before_C, place_C, per_bag_C = torch.tensor(self.received_3C, device=device)
        bag_B1 = torch.arange(batch_size, device=device).unsqueeze(1)
        return torch.addcmul(before_C * batch_size + place_C, bag_B1, per_bag_C).flatten()

    def answers(self, batch_size: int, step: int, device: torch.device) -> Tensor:
        """For every returned chunk, source after source and bag after bag, its row among the chunks of the answer.

        `step`: from the first chunk of a bag to that of the next.
        """
        first_B1 = (torch.arange(batch_size, device=device) * step).unsqueeze(1)
        return torch.cat(
            [(first_B1 + torch.tensor(places, dtype=torch.long, device=device)).flatten() for places in self.answers_S]
        )


class PooledAssembly:
    """The constants of pooled assembly for one layout: where columns go, which are means.

    Args:
        layout: the lanes.
        codecs: precision of what travels; default: as computed.
        local_columns: output columns filled from this rank's own copies (data-parallel tables), in order.
    """

    def __init__(
        self, layout: Layout, local_columns: tuple[slice, ...] = (), codecs: QuantizedCommCodecs | None = None
    ) -> None:
        self.forward_codec, self.backward_codec = used_codecs(codecs)
        self.width_S = [*layout.width_W, *layout.width_H]
        self.width_W = layout.width_W
        self.runs = column_runs(layout)
        self.chunks = Chunks.of(self.runs, self.width_S, layout.num_columns)
        self.local_columns = local_columns
        self.num_columns = layout.num_columns
        self.means = [
            (output.feature, slice(output.column, output.column + output.table.num_columns))
            for output in layout.outputs
            if output.table.mean
        ]
        whole = slice(0, layout.num_columns)
        in_place = [(run.received, run.answer) for run in self.runs] == [(whole, whole)]
        self.is_identity = in_place and not self.means  # means divide the answer, which must then be a copy

    def start(self, exchange: Exchange, codec, pieces: Tensor, send_W, receive_W, label: str, into=None) -> Transfer:
        """`exchange.start_rows`, or nothing where no rank returns any column (all tables are data-parallel)."""
        if not any(self.width_S):
            return arrived(pieces)
        return start_rows(exchange, codec, pieces, send_W, receive_W, label, into)

    def scatter(self, pieces: Tensor, local_BD: Tensor | None, batch_size: int) -> Tensor:
        """Returned pieces, source after source, to the output [B, D] of sums."""
        if self.is_identity:
            return pieces.view(batch_size, self.num_columns)
        answer_BD = pieces.new_empty(batch_size, self.num_columns)
        blocks = self._blocks(pieces, batch_size)
        runs = self.runs
        if self.chunks is not None:
            width, places = self.chunks.width, self.chunks.received(batch_size, pieces.device)
            torch.index_select(pieces.view(-1, width), 0, places, out=answer_BD.view(-1, width))
            runs = [run for run in runs if run.row_block]
        for run in runs:
            target, piece = answer_BD[:, run.answer], blocks[run.source][:, run.received]
            target.add_(piece) if run.row_block else target.copy_(piece)
        first = 0
        for columns in self.local_columns:
            width = columns.stop - columns.start
            answer_BD[:, columns] = local_BD[:, first : first + width]
            first += width
        return answer_BD

    def gather(self, gradient_BD: Tensor, scale: float, pieces: Tensor | None) -> Tensor:
        """The adjoint of `scatter`, scaled: every returned column gets the gradient of the column it went into.

        Written to `pieces`, memory of the size of the returned pieces, or to new memory.
        """
        if self.is_identity and scale == 1:
            return gradient_BD.flatten()
        batch_size = gradient_BD.shape[0]
        if pieces is None:
            pieces = gradient_BD.new_empty(batch_size * sum(self.width_S))
        if self.chunks is not None:
            width = self.chunks.width
            chunks, step = _chunks_of(gradient_BD, width)
            places = self.chunks.answers(batch_size, step, pieces.device)
            return torch.index_select(chunks, 0, places, out=pieces.view(-1, width)).view(-1).mul_(scale)
        blocks = self._blocks(pieces, batch_size)
        for run in self.runs:
            torch.mul(gradient_BD[:, run.answer], scale, out=blocks[run.source][:, run.received])
        return pieces

    def _blocks(self, pieces: Tensor, batch_size: int) -> list[Tensor]:
        parts = pieces.split([batch_size * width for width in self.width_S])
        return [part.view(batch_size, width) for part, width in zip(parts, self.width_S)]

    def divide_means(self, answer_BD: Tensor, flight: Flight) -> None:
        """Turn the sums of MEAN tables into means, in place; an empty bag stays zero."""
        for feature, columns in self.means:
            lengths_B = flight.kjt.lengths().view(len(flight.kjt.keys()), -1)[flight.kjt.keys().index(feature)]
            # By the reciprocal, as the unsharded collection does it: the same bits.
            answer_BD[:, columns] *= lengths_B.clamp(min=1).to(answer_BD.dtype).reciprocal().unsqueeze(1)


def _chunks_of(gradient_BD: Tensor, width: int) -> tuple[Tensor, int]:
    """The gradient as rows of `width`, and how many rows apart two bags are.

    A gradient is often a slice of a wider one, as when a model puts the answer beside other columns; that is read in
    place. (B - 1) x step rows lie before the last bag's.
    """
    batch_size, num_columns = gradient_BD.shape
    if gradient_BD.stride(1) != 1 or gradient_BD.stride(0) % width or batch_size == 0:
        gradient_BD = gradient_BD.contiguous()
    step = gradient_BD.stride(0) // width
    num_rows = max(batch_size - 1, 0) * step + (num_columns // width if batch_size else 0)
    return gradient_BD.as_strided((num_rows, width), (width, 1)), step


class StartPooled(torch.autograd.Function):
    """Start to return pooled columns to the ranks whose bags they are; backward waits for their gradients.

    `anchor` requires a gradient even where no local table does, so that every rank joins the backward exchange.
    """

    @staticmethod
    def forward(ctx, pooled: Tensor, anchor: Tensor, flight: Flight, exchange: Exchange, assembly: PooledAssembly):
        ctx.flight, ctx.exchange, ctx.shape = flight, exchange, pooled.shape
        send_W = [[(batch_size, pooled.shape[1])] for batch_size in flight.batch_sizes_W]
        receive_W = [[(flight.batch_size, width)] for width in assembly.width_W]
        send = pooled.flatten()
        transfer = assembly.start(exchange, assembly.forward_codec, send, send_W, receive_W, "pooled embeddings")
        flight.under_way["pooled"] = transfer
        flight.pooled = send
        return transfer.received.view(-1)

    @staticmethod
    def backward(ctx, placeholder: Tensor):
        gradient = ctx.flight.under_way.pop("gradients of pooled").wait()
        _recycle(ctx.flight, ctx.exchange)
        return gradient.view(ctx.shape), None, None, None, None


class WaitPooled(torch.autograd.Function):
    """Wait for the returned columns and assemble the output; backward starts the exchange of gradients.

    Args:
        local_BD: what this rank's own copies of data-parallel tables gave, or None.
        hosts: the two-hop exchange of host sums, or None.
        returned: the buffer of StartPooled and, with hosts, that of SumBetweenHosts.
    """

    @staticmethod
    def forward(ctx, local_BD, flight: Flight, exchange: Exchange, assembly: PooledAssembly, hosts, *returned: Tensor):
        ctx.flight, ctx.exchange, ctx.assembly, ctx.hosts = flight, exchange, assembly, hosts
        ctx.has_local = local_BD is not None
        pieces = flight.under_way.pop("pooled").wait()
        if hosts is not None:
            pieces = torch.cat([pieces, flight.under_way["host sums"].wait()])
        answer_BD = assembly.scatter(pieces, local_BD, flight.batch_size)
        if not assembly.is_identity:  # where it is, the pieces are the answer
            flight.pieces = pieces
        if not any(ctx.needs_input_grad):
            flight.pooled = None
            _recycle(flight, exchange)
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
        pieces = assembly.gather(gradient_BD, 1 / exchange.world_size, flight.pieces)
        alone = flight.batch_size * sum(assembly.width_W)
        send_W = [[(flight.batch_size, width)] for width in assembly.width_W]
        receive_W = [[(batch_size, assembly.width_W[exchange.rank])] for batch_size in flight.batch_sizes_W]
        flight.under_way["gradients of pooled"] = assembly.start(
            exchange,
            assembly.backward_codec,
            pieces[:alone],
            send_W,
            receive_W,
            "gradients of pooled embeddings",
            flight.pooled,
        )
        flight.pooled = flight.pieces = None
        if ctx.hosts is None:
            flight.pieces = pieces
            return local, None, None, None, None, pieces
        ctx.hosts.start_gradients(pieces[alone:], flight, exchange)
        return local, None, None, None, None, pieces[:alone], pieces[alone:]


def _recycle(flight: Flight, exchange: Exchange) -> None:
    """Let a later flight use the memory of the pieces, which have been read or sent."""
    pieces, flight.pieces = flight.pieces, None
    if pieces is not None and exchange.world_size > 1:  # alone, what arrives is what was sent, and still to be read
        exchange.recycle(pieces)
