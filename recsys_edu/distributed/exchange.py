"""Exchange: all-to-all with a start and a wait. The only file of the engine that moves tensors between ranks.

`GroupExchange` speaks to real ranks through a process group (gloo or NCCL). `LocalExchange` connects the ranks of
a `SimulatedWorld`, which live in one process: a start puts pieces into mailboxes, a wait takes them out. So one
notebook cell can run phase k on every rank, print every rank's tensors, and go on to phase k + 1.

Suffix: W ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from recsys_edu.distributed.spans import span
from recsys_edu.distributed.types import NoOpQuantizedCommCodec, QuantizedCommCodec, QuantizedCommCodecs


@dataclass(frozen=True)
class TransferRecord:
    """What one rank sent in one exchange: its purpose and bytes per destination rank."""

    label: str
    bytes_W: tuple[int, ...]

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes_W)


@dataclass(frozen=True)
class Transfer:
    """A started exchange: the buffer being filled, and the function that blocks until it is."""

    received: Tensor
    finish: Callable[[], None]

    def wait(self) -> Tensor:
        self.finish()
        return self.received


def arrived(values: Tensor) -> Transfer:
    """A transfer that is over before it began: where the plan leaves nothing to send, no rank starts an exchange."""
    return Transfer(values, _nothing)


class Exchange(Protocol):
    """All-to-all between the ranks of one sharded module. `log`, when a list, collects what is sent."""

    rank: int
    world_size: int
    log: list[TransferRecord] | None

    def start(
        self, send: Tensor, send_W: Sequence[int], receive_W: Sequence[int], label: str, into: Tensor | None = None
    ) -> Transfer:
        """Begin to send `send_W[r]` elements of the 1-D tensor `send` to every rank r, in rank order.

        What arrives is written to `into`, memory that nobody reads any more, or to memory of the exchange's choice.
        """
        ...

    def recycle(self, buffer: Tensor) -> None:
        """Hand over memory that nobody will read any more; a later transfer may arrive in it."""
        ...


MOST_SPARE = 3  # as many batches as a pipeline has in flight

Block = tuple[int, int]  # rows, columns


def used_codecs(
    codecs: QuantizedCommCodecs | None,
) -> tuple[QuantizedCommCodec | None, QuantizedCommCodec | None]:
    """The codecs for forward and backward, None where nothing is to be encoded."""
    pair = (codecs.forward, codecs.backward) if codecs else (None, None)
    return tuple(None if isinstance(codec, NoOpQuantizedCommCodec) else codec for codec in pair)


def start_rows(
    exchange: Exchange,
    codec: QuantizedCommCodec | None,
    send: Tensor,
    send_blocks_W: Sequence[Sequence[Block]],
    receive_blocks_W: Sequence[Sequence[Block]],
    label: str,
    into: Tensor | None = None,
) -> Transfer:
    """Start to exchange blocks of float rows, in the precision of `codec` (None: as they are).

    Args:
        send: 1-D, the blocks for rank 0, then those for rank 1, ...
        send_blocks_W, receive_blocks_W: (rows, columns) of each block, per rank.
        into: 1-D memory for what arrives; None: new memory.
    """
    if codec is None:
        return exchange.start(send, _sizes(send_blocks_W), _sizes(receive_blocks_W), label, into)
    width = codec.calc_quantized_size
    encoded = [codec.encode(rows).flatten() for rows in _views(send, send_blocks_W, int)]
    packed = torch.cat(encoded) if encoded else send.new_empty(0, dtype=codec.quantized_dtype)
    transfer = exchange.start(packed, _sizes(send_blocks_W, width), _sizes(receive_blocks_W, width), label)
    received = send.new_empty(sum(_sizes(receive_blocks_W))) if into is None else into

    def finish() -> None:
        transfer.finish()
        places = _views(received.detach(), receive_blocks_W, int)
        for place, rows in zip(places, _views(transfer.received, receive_blocks_W, width)):
            place.copy_(codec.decode(rows))

    return Transfer(received, finish)


def _sizes(blocks_W: Sequence[Sequence[Block]], width: Callable[[int], int] = int) -> list[int]:
    return [sum(rows * width(columns) for rows, columns in blocks) for blocks in blocks_W]


def _views(flat: Tensor, blocks_W: Sequence[Sequence[Block]], width: Callable[[int], int]) -> list[Tensor]:
    shapes = [(rows, width(columns)) for blocks in blocks_W for rows, columns in blocks]
    return [part.view(shape) for part, shape in zip(flat.split([r * c for r, c in shapes]), shapes)]


@dataclass
class GroupExchange:
    """Exchange through a process group; with one rank, or without a group, nothing leaves the process.

    Raises:
        RuntimeError: another rank failed or did not arrive in time; the message says in which exchange.
    """

    group: dist.ProcessGroup | None
    timeout: timedelta | None = None
    log: list[TransferRecord] | None = None
    rank: int = field(init=False)
    world_size: int = field(init=False)
    _spare: list[Tensor] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.rank = dist.get_rank(self.group) if self.group is not None else 0
        self.world_size = dist.get_world_size(self.group) if self.group is not None else 1

    def __deepcopy__(self, memo: dict[int, object]) -> GroupExchange:
        """A copy of a model talks to the same ranks."""
        return GroupExchange(self.group, self.timeout)

    def start(
        self, send: Tensor, send_W: Sequence[int], receive_W: Sequence[int], label: str, into: Tensor | None = None
    ) -> Transfer:
        if self.log is not None:
            self.log.append(_record(label, send, send_W))
        if self.world_size == 1:
            return arrived(send)
        received = self._memory(send, sum(receive_W)) if into is None else into
        try:
            with span("start", label, "|", send.nbytes, "bytes"):
                work = dist.all_to_all_single(
                    received, send, list(receive_W), list(send_W), group=self.group, async_op=True
                )
        except RuntimeError as error:
            raise self._broken(label, error) from error

        def finish() -> None:
            try:
                with span("wait", label):
                    work.wait(self.timeout) if self.timeout is not None else work.wait()
            except RuntimeError as error:
                raise self._broken(label, error) from error

        return Transfer(received, finish)

    def recycle(self, buffer: Tensor) -> None:
        # Fresh host memory costs a page fault every 4 KiB, which takes longer than the transfer's own work on it. The
        # allocator of a device keeps what it had.
        if buffer.numel() and buffer.device.type == "cpu":
            self._spare = [*self._spare[1 - MOST_SPARE :], buffer]

    def _memory(self, like: Tensor, size: int) -> Tensor:
        for index, buffer in enumerate(self._spare):
            if buffer.numel() == size and buffer.dtype == like.dtype:
                return self._spare.pop(index)
        return like.new_empty(size)

    def _broken(self, label: str, error: RuntimeError) -> RuntimeError:
        return RuntimeError(
            f"rank {self.rank} of {self.world_size}: the exchange {label!r} broke off: another rank failed, left, or "
            f"did not reach it in time. Look for the first error among the other ranks. ({error})"
        )


class SimulatedWorld:
    """W ranks in one process, without threads or process groups: `exchange(r)` is rank r's end.

    >>> world = SimulatedWorld(2)
    >>> ends = [world.exchange(rank) for rank in range(2)]
    >>> transfers = [end.start(torch.tensor([end.rank, end.rank]), [1, 1], [1, 1], "demo") for end in ends]
    >>> [transfer.wait().tolist() for transfer in transfers]
    [[0, 1], [0, 1]]
    """

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.mailboxes: dict[tuple[int, int, int], Tensor] = {}

    def exchange(self, rank: int) -> LocalExchange:
        return LocalExchange(self, rank)


class LocalExchange:
    """One simulated rank's end of a `SimulatedWorld`.

    The n-th start of every rank belongs together, as in a process group.

    Raises:
        RuntimeError: a wait comes before every other rank has started the same exchange.
    """

    def __init__(self, world: SimulatedWorld, rank: int) -> None:
        self.world, self.rank, self.world_size = world, rank, world.world_size
        self.log: list[TransferRecord] | None = None
        self._num_started = 0

    def start(
        self, send: Tensor, send_W: Sequence[int], receive_W: Sequence[int], label: str, into: Tensor | None = None
    ) -> Transfer:
        if self.log is not None:
            self.log.append(_record(label, send, send_W))
        number = self._num_started
        self._num_started += 1
        for destination, piece in enumerate(send.detach().split(list(send_W))):
            self.world.mailboxes[number, self.rank, destination] = piece
        received = send.new_empty(sum(receive_W)) if into is None else into
        finished = False

        def finish() -> None:
            nonlocal finished
            if finished:  # as with a process group, waiting once more is harmless
                return
            for source, place in enumerate(received.detach().split(list(receive_W))):
                piece = self.world.mailboxes.pop((number, source, self.rank), None)
                if piece is None:
                    raise RuntimeError(
                        f"simulated rank {self.rank} waits for rank {source} in exchange {number} ({label!r}), which "
                        "it has not started: run each phase on every rank before the next phase"
                    )
                place.copy_(piece)
            finished = True

        return Transfer(received, finish)

    def recycle(self, buffer: Tensor) -> None:
        """Nothing: a mailbox may still hold a part of it."""


def _record(label: str, send: Tensor, send_W: Sequence[int]) -> TransferRecord:
    return TransferRecord(label, tuple(count * send.element_size() for count in send_W))


def _nothing() -> None:
    return None


def gather_objects(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """Every rank's small Python value, in rank order; without a group just this one."""
    if group is None or dist.get_world_size(group) == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def check_same_on_every_rank(exchange: Exchange, facts: object, what: str) -> None:
    """Refuse to start where ranks disagree: `facts` (anything with a stable repr) has to be equal on all of them.

    Raises:
        ValueError: on every rank alike, naming the ranks that differ from rank 0.
    """
    if not isinstance(exchange, GroupExchange):
        return
    digests = gather_objects(hashlib.sha256(repr(facts).encode()).hexdigest(), exchange.group)
    different = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if different:
        raise ValueError(
            f"{what}: ranks {different} differ from rank 0. Build configs and plan identically on every rank "
            "(same order, same sizes), or make the plan on one rank and broadcast it"
        )


def average(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Set every tensor, in place, to its mean over the ranks of `group`; one all-reduce per dtype."""
    for parts in _by_dtype(tensors):
        flat = torch.cat([part.flatten() for part in parts])
        dist.all_reduce(flat, group=group)
        _unpack(flat / dist.get_world_size(group), parts)


def copy_from_first(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Set every tensor, in place, to what it is on the first rank of `group`; one broadcast per dtype."""
    for parts in _by_dtype(tensors):
        flat = torch.cat([part.flatten() for part in parts])
        dist.broadcast(flat, dist.get_global_rank(group, 0), group=group)
        _unpack(flat, parts)


def _by_dtype(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    return list(groups.values())


@torch.no_grad()
def _unpack(flat: Tensor, parts: Sequence[Tensor]) -> None:
    for part, values in zip(parts, flat.split([part.numel() for part in parts])):
        part.copy_(values.view(part.shape))
