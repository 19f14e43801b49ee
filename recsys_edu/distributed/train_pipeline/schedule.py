"""A training step as a list of calls, and how long it takes: a simulation to try schedules out with.

    durations = {"sizes": 5, "ids": 5, "rows": 5, "gradients": 5, "bottom": 4, "top": 6, ...}      # milliseconds
    simulate_schedule(PLAIN, durations).step_ms(), simulate_schedule(SPARSE_DIST, durations).step_ms()

Calls name what they do and for which batch: "wait rows" is for the batch of this step, "start ids +1" for that of the
next. Work keeps the host busy. A transfer is under way from its start for as long as it takes, beside everything else;
a wait holds the host until it has arrived. This is DLRM on a network with latency; real steps: timeline.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from recsys_edu.distributed.timeline import HOST, NETWORK, Span, Timeline

WORK = {
    "load": "load batch",
    "lookup": "lookup",
    "bottom": "forward",
    "top": "forward",
    "backward top": "backward",
    "backward bottom": "backward",
    "update": "optimizer",
}
TRANSFERS = {
    "sizes": "sizes",
    "ids": "lengths and ids",
    "rows": "pooled embeddings",
    "gradients": "gradients of pooled embeddings",
}
# call: the calls for the same batch that have to come before it
NEEDS = {
    "load": (),
    "start sizes": ("load",),
    "wait sizes": ("start sizes",),
    "start ids": ("wait sizes",),
    "wait ids": ("start ids",),
    "lookup": ("wait ids",),
    "start rows": ("lookup",),
    "bottom": ("load",),
    "wait rows": ("start rows",),
    "top": ("bottom", "wait rows"),
    "backward top": ("top",),
    "start gradients": ("backward top",),
    "backward bottom": ("backward top",),
    "wait gradients": ("start gradients",),
    "update": ("backward bottom", "wait gradients"),
}

PLAIN = (
    "load", "start sizes", "wait sizes", "start ids", "wait ids", "lookup", "start rows", "wait rows", "bottom", "top",
    "backward top", "start gradients", "wait gradients", "backward bottom", "update",
)  # fmt: skip
"""Every transfer is waited for at once."""
OVERLAPPED = (
    "load", "start sizes", "wait sizes", "start ids", "wait ids", "lookup", "start rows", "bottom", "wait rows", "top",
    "backward top", "start gradients", "backward bottom", "wait gradients", "update",
)  # fmt: skip
"""Rows travel during the bottom MLP, gradients during its backward: a model on a sharded collection, unpipelined."""
SPARSE_DIST = (
    "start sizes +1", "load +2", "wait ids", "lookup", "start rows", "bottom", "wait rows", "top",
    "wait sizes +1", "start ids +1",
    "backward top", "start gradients", "backward bottom", "wait gradients", "update",
)  # fmt: skip
"""TrainPipelineSparseDist: the next batch's ids travel, too."""


@dataclass(frozen=True)
class Call:
    """`name` for the batch `ahead` steps later.

    >>> Call.parse("start ids +1")
    Call(name='start ids', ahead=1)
    """

    name: str
    ahead: int = 0

    @staticmethod
    def parse(text: str) -> Call:
        """
        Raises:
            ValueError: no call of that name.
        """
        name, _, ahead = text.partition("+")
        name = " ".join(name.split())
        if name not in NEEDS or (ahead and not ahead.strip().isdigit()):
            raise ValueError(f"no call {text!r}: expected one of {', '.join(NEEDS)}, and perhaps +1, +2, ...")
        return Call(name, int(ahead or 0))


def simulate_schedule(
    schedule: Sequence[str], durations_ms: Mapping[str, float], num_steps: int = 4, rank: int = 0
) -> Timeline:
    """Run `schedule` once per step; what it does for batches ahead is done before the first step as far as needed.

    Args:
        schedule: the calls of one step, in order.
        durations_ms: of the keys of WORK and TRANSFERS; what is missing takes no time.

    Raises:
        ValueError: an unknown, missing or repeated call; one that comes before another that it needs, for example a
            lookup before the last batch's update; or a transfer that is never waited for.
    """
    calls = [Call.parse(text) for text in schedule]
    _check_complete(calls)
    unknown = set(durations_ms) - {*WORK, *TRANSFERS}
    if unknown:
        raise ValueError(f"durations of {sorted(unknown)}: expected {', '.join([*WORK, *TRANSFERS])}")
    done: set[tuple[str, int]] = set()
    arrival_ms: dict[tuple[str, int], float] = {}
    spans: list[Span] = []
    now = 0.0
    for step in range(-max(call.ahead for call in calls), num_steps):
        for call in calls:
            batch = step + call.ahead
            if batch < 0:
                continue  # before the first step only what fills the pipeline
            _check_order(call, batch, done)
            done.add((call.name, batch))
            kind, _, label = call.name.partition(" ")
            if call.name in WORK:
                duration = durations_ms.get(call.name, 0.0)
                spans.append(Span(rank, HOST, f"{WORK[call.name]} #{batch}", now, duration))
                now += duration
            elif kind == "start":
                duration = durations_ms.get(label, 0.0)
                arrival_ms[label, batch] = now + duration
                spans.append(Span(rank, NETWORK, f"{TRANSFERS[label]} #{batch}", now, duration))
            else:
                rest = max(arrival_ms[label, batch] - now, 0.0)
                spans.append(Span(rank, HOST, f"wait {TRANSFERS[label]} #{batch}", now, rest))
                now += rest
    return Timeline(tuple(sorted((span for span in spans if span.duration_ms), key=lambda span: span.start_ms)))


def _check_complete(calls: Sequence[Call]) -> None:
    names = [call.name for call in calls]
    missing = [name for name in NEEDS if name not in names]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if missing or repeated:
        parts = [f"it lacks {', '.join(missing)}"] if missing else []
        parts += [f"it has {', '.join(repeated)} more than once"] if repeated else []
        raise ValueError(f"the schedule makes every call once per step, but {' and '.join(parts)}")


def _check_order(call: Call, batch: int, done: set[tuple[str, int]]) -> None:
    missing = [name for name in NEEDS[call.name] if (name, batch) not in done]
    if missing:
        raise ValueError(f"{call.name!r} of batch {batch} comes before its {missing[0]!r}")
    if call.name in ("lookup", "bottom") and batch and ("update", batch - 1) not in done:
        raise ValueError(
            f"{call.name!r} of batch {batch} comes before the 'update' of batch {batch - 1}: it would use old weights"
        )
