"""A slow network on one machine: everything that a sharded module exchanges arrives later.

with slow_link(model, delay_ms=20):
    pipeline.progress(batches)
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from recsys_edu.distributed.exchange import Exchange, Transfer
from recsys_edu.distributed.spans import span


class SlowLink:
    """Makes what an exchange starts arrive `delay_ms` later, whatever is computed meanwhile; `close` undoes it.

    Like latency, delays of several exchanges run at the same time. The sender is not held up.
    """

    def __init__(self, exchange: Exchange, delay_ms: float = 0.0) -> None:
        self.delay_ms, self._exchange, self._start = delay_ms, exchange, exchange.start
        exchange.start = self.start  # type: ignore[method-assign]

    def start(self, send: Tensor, send_W: Sequence[int], receive_W: Sequence[int], label: str, *more: Any) -> Transfer:
        due = time.perf_counter() + self.delay_ms / 1e3
        with span("slow link |", self.delay_ms, "ms"):
            transfer = self._start(send, send_W, receive_W, label, *more)

        def finish() -> None:
            with span("wait", label):  # the exchange's own span lies inside; a timeline takes both for one
                transfer.finish()
                if (rest := due - time.perf_counter()) > 0:
                    time.sleep(rest)

        return Transfer(transfer.received, finish)

    def close(self) -> None:
        del self._exchange.start  # the class's own shows again


@contextmanager
def slow_link(model: nn.Module, delay_ms: float) -> Iterator[None]:
    """Inside, exchanges of all sharded modules in `model` take `delay_ms` longer. DDP's all-reduce does not."""
    exchanges = {id(module.shards.exchange): module.shards.exchange for module in model.modules() if _has(module)}
    with ExitStack() as stack:
        for exchange in exchanges.values():
            stack.callback(SlowLink(exchange, delay_ms).close)
        yield


def _has(module: nn.Module) -> bool:
    return hasattr(getattr(module, "shards", None), "exchange")
