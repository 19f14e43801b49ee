"""Host sums: partial sums of one host's ranks are added up before they cross the network.

The rows of a table-row-wise or grid table are split over the ranks of one host. Returned flat, every one of them would
send its partial sum of every bag to every rank. In two hops a bag crosses between hosts once:

    hop 1, inside the host     rank (h, i) sends (h, j) its partial sums of all bags of the ranks (*, j), who adds them
    hop 2, between hosts       rank (h, j) sends (g, j) the finished sums of its bags

so a fraction 1 / local_size of the bytes crosses the slow link. Both hops are all-to-alls of all ranks in which most
pieces are empty. Backward goes the same way back: gradients cross once and are copied inside the host. A codec, where
there is one, encodes what crosses between hosts; inside a host bytes are cheap and sums stay exact.

Suffixes: B local batch, W ranks, H hosts. (h, i) is the rank h * local_size + i.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recsys_edu.distributed.exchange import Block, Exchange, start_rows, used_codecs
from recsys_edu.distributed.flight import Flight
from recsys_edu.distributed.layout import Layout
from recsys_edu.distributed.types import QuantizedCommCodecs


class HostSums:
    """Who sends whom how much in the two hops, for one rank of one layout."""

    def __init__(self, layout: Layout, rank: int, codecs: QuantizedCommCodecs | None = None) -> None:
        self.forward_codec, self.backward_codec = used_codecs(codecs)
        self.world_size, self.local_size, self.width_H = layout.world_size, layout.local_size, layout.width_H
        self.host, self.local_rank = divmod(rank, layout.local_size)
        self.width = layout.width_H[self.host]

    def ranks_at(self, local_rank: int) -> range:
        """The ranks of all hosts that have this place in their host."""
        return range(local_rank, self.world_size, self.local_size)

    def bags_at(self, flight: Flight, local_rank: int) -> int:
        """How many bags those ranks have together."""
        return sum(flight.batch_sizes_W[rank] for rank in self.ranks_at(local_rank))

    def inside(self, size_of_local_rank: list[int]) -> list[int]:
        """Sizes per rank of the world, for an exchange inside this host."""
        sizes_W = [0] * self.world_size
        first = self.host * self.local_size
        sizes_W[first : first + self.local_size] = size_of_local_rank
        return sizes_W

    def between(self, block_of_host: list[Block]) -> list[list[Block]]:
        """Blocks per rank of the world, for an exchange among the ranks at this place of every host."""
        blocks_W: list[list[Block]] = [[] for _ in range(self.world_size)]
        blocks_W[self.local_rank :: self.local_size] = [[block] for block in block_of_host]
        return blocks_W

    def sums_of(self, flight: Flight) -> list[Block]:
        """The block of this rank's sums that belongs to the rank at its place on every host."""
        return [(flight.batch_sizes_W[rank], self.width) for rank in self.ranks_at(self.local_rank)]

    def answers_to(self, flight: Flight) -> list[Block]:
        """The block of sums that every host has for this rank."""
        return [(flight.batch_size, width) for width in self.width_H]

    def start_gradients(self, gradients: Tensor, flight: Flight, exchange: Exchange) -> None:
        """Backward of hop 2: this rank's gradients to the hosts whose sums they belong to."""
        send_W, receive_W = self.between(self.answers_to(flight)), self.between(self.sums_of(flight))
        flight.under_way["gradients of host sums"] = start_rows(
            exchange, self.backward_codec, gradients, send_W, receive_W, "gradients between hosts"
        )


class SumInsideHost(torch.autograd.Function):
    """Start hop 1. Backward waits for the gradients of this rank's partial sums."""

    @staticmethod
    def forward(ctx, partial: Tensor, anchor: Tensor, flight: Flight, exchange: Exchange, hosts: HostSums) -> Tensor:
        ctx.flight, ctx.hosts = flight, hosts
        rows_W = partial.split(flight.batch_sizes_W)
        order = [rank for place in range(hosts.local_size) for rank in hosts.ranks_at(place)]
        send = torch.cat([rows_W[rank] for rank in order]).flatten()
        send_W = hosts.inside([hosts.bags_at(flight, place) * hosts.width for place in range(hosts.local_size)])
        mine = hosts.bags_at(flight, hosts.local_rank) * hosts.width
        transfer = exchange.start(send, send_W, hosts.inside([mine] * hosts.local_size), "partial sums inside hosts")
        flight.under_way["partial sums"] = transfer
        return transfer.received.view(-1)

    @staticmethod
    def backward(ctx, placeholder: Tensor):
        flight, hosts = ctx.flight, ctx.hosts
        rows = flight.under_way["gradients of partial sums"].wait().view(sum(flight.batch_sizes_W), hosts.width)
        order = [rank for place in range(hosts.local_size) for rank in hosts.ranks_at(place)]
        pieces = dict(zip(order, rows.split([flight.batch_sizes_W[rank] for rank in order])))
        return torch.cat([pieces[rank] for rank in range(hosts.world_size)]), None, None, None, None


class SumBetweenHosts(torch.autograd.Function):
    """Add up hop 1 and start hop 2. Backward waits for hop 2's gradients and copies them inside the host."""

    @staticmethod
    def forward(ctx, received: Tensor, flight: Flight, exchange: Exchange, hosts: HostSums) -> Tensor:
        ctx.flight, ctx.exchange, ctx.hosts = flight, exchange, hosts
        sums = flight.under_way["partial sums"].wait().view(hosts.local_size, -1).sum(0)
        send_W, receive_W = hosts.between(hosts.sums_of(flight)), hosts.between(hosts.answers_to(flight))
        transfer = start_rows(exchange, hosts.forward_codec, sums, send_W, receive_W, "sums between hosts")
        flight.under_way["host sums"] = transfer
        return transfer.received.view(-1)

    @staticmethod
    def backward(ctx, placeholder: Tensor):
        flight, exchange, hosts = ctx.flight, ctx.exchange, ctx.hosts
        gradients = flight.under_way["gradients of host sums"].wait()
        send_W = hosts.inside([gradients.numel()] * hosts.local_size)
        receive_W = hosts.inside([hosts.bags_at(flight, place) * hosts.width for place in range(hosts.local_size)])
        flight.under_way["gradients of partial sums"] = exchange.start(
            gradients.repeat(hosts.local_size), send_W, receive_W, "gradients inside hosts"
        )
        return gradients.new_zeros(gradients.numel() * hosts.local_size), None, None, None
