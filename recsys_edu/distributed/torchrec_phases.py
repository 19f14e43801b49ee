"""The phases of a sharded collection under TorchRec's names, for programs that call them one by one.

    ctx = module.create_context()                     a Flight will live in it
    sizes = module.input_dist(ctx, kjt)               start_input
    ids = sizes.wait()                                exchange_input
    answer = module.compute(ctx, ids.wait())          lookup
    answer = module.output_dist(ctx, answer)          the answer, pending until it is read

What TorchRec hands from one phase to the next (a KJTList, a list of tensors) is here the Flight itself. The functions
are methods of both sharded collections, whose own four phases (`start_input` and so on) they call.

Counterpart: torchrec.distributed.types.ShardedModule.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from recsys_edu.distributed.awaitable import Awaitable, NoWait
from recsys_edu.distributed.flight import Flight
from recsys_edu.distributed.spans import span
from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor


@dataclass
class FlightContext:
    """What `create_context` gives: the batch's flight, once `input_dist` has started it."""

    flight: Flight | None = None

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the batch's memory until `stream` has used it."""
        if self.flight is not None:
            self.flight.kjt.record_stream(stream)


class _Sizes(Awaitable[Awaitable[Flight]]):
    """The sizes under way; waiting for them starts the ids."""

    def __init__(self, module: Any, flight: Flight) -> None:
        super().__init__()
        self._module, self._flight = module, flight

    def _wait_impl(self) -> Awaitable[Flight]:
        self._module.exchange_input(self._flight)
        return NoWait(self._flight)


def create_context(self: Any) -> FlightContext:
    """Room for one batch's flight."""
    return FlightContext()


def input_dist(self: Any, ctx: FlightContext, features: KeyedJaggedTensor) -> Awaitable[Awaitable[Flight]]:
    """Route the batch and tell every rank how many ids are coming; the first wait sends them."""
    ctx.flight = self.start_input(features)
    return _Sizes(self, ctx.flight)


def compute(self: Any, ctx: FlightContext, dist_input: Flight) -> Flight:
    """Look up this rank's shards and start to return what was asked for."""
    with span("lookup"):
        self.lookup(dist_input)
    return dist_input


def output_dist(self: Any, ctx: FlightContext, output: Flight) -> Any:
    """The pending answer: a KeyedTensor, or a mapping to JaggedTensors; `.wait()` or reading it finishes the flight."""
    return self(output)


def compute_and_output_dist(self: Any, ctx: FlightContext, input: Flight) -> Any:
    """`compute`, then `output_dist`."""
    return self.output_dist(ctx, self.compute(ctx, input))
