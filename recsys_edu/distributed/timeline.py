"""What ran when: steps recorded through torch.profiler, rank by rank, and how much communication they hid.

    timeline = record_timeline(lambda: [pipeline.progress(batches) for _ in range(4)])
    timeline.frame()                                   # rank, stream, name, start_ms, duration_ms, bytes, depth
    timeline.overlap()                                 # in flight 31.0 ms, waited for 9.2 ms: 70 % hidden
    timeline.save("trace.json")                        # for https://ui.perfetto.dev or chrome://tracing
    merge(timelines_of_all_ranks)                      # on one clock, for viz/timeline.py

A rank has a stream "host", what its Python thread did (spans.py), and a stream "network", one span per exchange from
its start until it had arrived. With CUDA, kernels and copies lie on streams of their own. (That part has been tested on
made-up events and has not been run on a GPU.)
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    import polars

HOST, NETWORK = "host", "network"
PIPELINE_SPANS = frozenset(
    {"load batch", "copy batch", "start input", "exchange input", "forward", "backward", "optimizer"}
)
ENGINE_SPANS = frozenset({"lookup", "output_dist"})
START, WAIT, SLOW = "start ", "wait ", "slow link | "
SAME_BURST_MS = 0.02  # kernels with smaller gaps between them are drawn as one


@dataclass(frozen=True)
class Span:
    """Something that took a while on one stream of one rank; `depth` counts the host spans that enclose it."""

    rank: int
    stream: str
    name: str
    start_ms: float
    duration_ms: float
    num_bytes: int = 0
    depth: int = 0

    @property
    def end_ms(self) -> float:
        return self.start_ms + self.duration_ms


@dataclass(frozen=True)
class Overlap:
    """How long exchanges were in flight, and for how much of that time the host stood and waited.

    >>> Overlap(in_flight_ms=40.0, waited_ms=10.0).hidden_ms
    30.0
    """

    in_flight_ms: float
    waited_ms: float

    @property
    def hidden_ms(self) -> float:
        """In flight while the host did something else."""
        return self.in_flight_ms - self.waited_ms

    @property
    def hidden_percent(self) -> float:
        return 100.0 * self.hidden_ms / self.in_flight_ms if self.in_flight_ms else 0.0

    def __str__(self) -> str:
        return (
            f"in flight {self.in_flight_ms:.1f} ms, waited for {self.waited_ms:.1f} ms: "
            f"{self.hidden_ms:.1f} ms hidden ({self.hidden_percent:.0f} %)"
        )


@dataclass(frozen=True)
class Timeline:
    """Spans of one rank or more, in order of their start; times are milliseconds after `zero_ns` (Unix clock)."""

    spans: tuple[Span, ...]
    zero_ns: int = 0

    @property
    def ranks(self) -> list[int]:
        return sorted({span.rank for span in self.spans})

    @property
    def end_ms(self) -> float:
        return max((span.end_ms for span in self.spans), default=0.0)

    def of(self, rank: int) -> Timeline:
        """One rank alone, on the same clock."""
        return replace(self, spans=tuple(span for span in self.spans if span.rank == rank))

    def frame(self) -> polars.DataFrame:
        """One row per span: rank, stream, name, start_ms, duration_ms, bytes, depth."""
        import polars

        columns = ("rank", "stream", "name", "start_ms", "duration_ms", "num_bytes", "depth")
        frame = polars.DataFrame({column: [getattr(span, column) for span in self.spans] for column in columns})
        return frame.rename({"num_bytes": "bytes"})

    def overlap(self) -> Overlap:
        """The communication of all ranks, added up; that of one: `timeline.of(rank).overlap()`.

        Counted are the exchanges of sharded modules. Ranks that are early wait in an exchange for those that are late,
        and that counts too. DDP's all-reduce is drawn but not counted: where it waits is out of sight.
        """
        in_flight = waited = 0.0
        for rank in self.ranks:
            spans = [span for span in self.spans if span.rank == rank]
            flying = _union((s.start_ms, s.end_ms) for s in spans if s.stream == NETWORK and not _is_other(s.name))
            waiting = _union((s.start_ms, s.end_ms) for s in spans if s.stream == HOST and s.name.startswith(WAIT))
            in_flight += _length(flying)
            waited += _length(_both(flying, waiting))
        return Overlap(in_flight, waited)

    def step_ms(self) -> float:
        """Time per step: from the end of the first optimizer span to that of the last, averaged over steps and ranks.

        Raises:
            ValueError: fewer than two steps were recorded.
        """
        ends: dict[int, list[float]] = defaultdict(list)
        for span in self.spans:
            if span.name.partition(" #")[0] == "optimizer":
                ends[span.rank].append(span.end_ms)
        if not ends or min(map(len, ends.values())) < 2:
            raise ValueError("a time per step needs two recorded steps or more, each with a span 'optimizer'")
        each = [(max(times) - min(times)) / (len(times) - 1) for times in ends.values()]
        return sum(each) / len(each)

    def save(self, path: str | Path) -> Path:
        """Write Chrome's trace format (JSON), a process per rank and a thread per stream."""
        path = Path(path)
        streams = sorted({(span.rank, span.stream) for span in self.spans})
        events: list[dict[str, Any]] = []
        for thread, (rank, stream) in enumerate(streams):
            for kind, name in (("process_name", f"rank {rank}"), ("thread_name", stream)):
                events.append({"ph": "M", "name": kind, "pid": rank, "tid": thread, "args": {"name": name}})
        for span in self.spans:
            place = {"pid": span.rank, "tid": streams.index((span.rank, span.stream))}
            times = {"ts": span.start_ms * 1e3, "dur": span.duration_ms * 1e3}
            events.append({"ph": "X", "name": span.name, **place, **times, "args": {"bytes": span.num_bytes}})
        aside = path.with_name(path.name + ".tmp")
        aside.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
        os.replace(aside, path)
        return path


def record_timeline(run: Callable[[], Any], rank: int | None = None) -> Timeline:
    """Call `run` under torch.profiler and return this rank's timeline.

    Let a few steps run before: the first ones allocate memory and fill pipelines. Recording itself costs a step some
    tenths of a millisecond, for the profiler notes every operation of torch.

    Args:
        run: the steps; what it returns is dropped.
        rank: default: that of the default process group, or 0.
    """
    if rank is None:
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profile = torch.profiler.profile(activities=activities)
    with _without_stderr():
        profile.start()
    try:
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # host sync: kernels that are still running belong to the recording
    finally:
        with _without_stderr():
            profile.stop()
    return timeline_of_events(profile.profiler.kineto_results.events(), rank)


@contextmanager
def _without_stderr() -> Iterator[None]:
    """torch 2.13's profiler prints remarks from C++ at each start and stop, past Python's sys.stderr."""
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def merge(timelines: Iterable[Timeline]) -> Timeline:
    """Several ranks' timelines as one, which begins with the first span of any.

    All are placed by the clock of their host. On several hosts they are off by as much as these clocks are.
    """
    timelines = list(timelines)
    zero = min((timeline.zero_ns for timeline in timelines), default=0)
    spans = [
        replace(span, start_ms=span.start_ms + (timeline.zero_ns - zero) / 1e6)
        for timeline in timelines
        for span in timeline.spans
    ]
    return Timeline(tuple(sorted(spans, key=lambda span: span.start_ms)), zero)


def timeline_of_events(events: Sequence[Any], rank: int) -> Timeline:
    """The spans among a profile's Kineto events: those of spans.py, transfers, and what ran on a GPU."""
    events = sorted(events, key=lambda event: event.start_ns())
    zero = min((event.start_ns() for event in events if _is_named(event.name())), default=0)
    if not zero:
        return Timeline(())

    def made(event: Any, stream: str, name: str, num_bytes: int = 0) -> Span:
        return Span(rank, stream, name, (event.start_ns() - zero) / 1e6, event.duration_ns() / 1e6, num_bytes)

    on_cpu = [event for event in events if "CPU" in str(event.device_type())]
    host = [made(event, HOST, *_name_and_bytes(event.name())) for event in on_cpu if _is_named(event.name())]
    taken_up = [made(event, NETWORK, event.name()) for event in on_cpu if event.name().startswith("gloo:")]
    on_gpu = [
        made(event, f"GPU stream {event.device_resource_id()}", event.name())
        for event in events
        if "CUDA" in str(event.device_type()) and not _is_named(event.name())  # our spans are mirrored there
    ]
    slow = [span for span in host if span.name.startswith(SLOW)]
    spans = [*_with_depth([s for s in host if s not in slow]), *_transfers(host, taken_up, slow), *_gpu_spans(on_gpu)]
    return Timeline(tuple(sorted(spans, key=lambda span: span.start_ms)), zero)


def _is_named(name: str) -> bool:
    return name in PIPELINE_SPANS or name in ENGINE_SPANS or name.startswith((START, WAIT, SLOW))


def _is_other(name: str) -> bool:
    """Whether a network span is no exchange of a sharded module."""
    return name.startswith("gloo:")


def _name_and_bytes(name: str) -> tuple[str, int]:
    """
    >>> _name_and_bytes("start sizes | 64 bytes"), _name_and_bytes("forward")
    (('start sizes', 64), ('forward', 0))
    """
    first, _, rest = name.partition(" | ")
    number = rest.removesuffix(" bytes")
    return (first, int(number)) if rest.endswith(" bytes") and number.isdigit() else (name, 0)


def _with_depth(host: Sequence[Span]) -> list[Span]:
    """`host`, sorted by start, with the number of spans around each; a wait inside the same wait is one with it."""
    around: list[Span] = []
    found = []
    for span in host:
        while around and around[-1].end_ms <= span.start_ms:
            around.pop()
        if around and span.name.startswith(WAIT) and span.name == around[-1].name:
            continue
        found.append(replace(span, depth=len(around)))
        around.append(span)
    return found


def _transfers(host: Sequence[Span], taken_up: Sequence[Span], slow: Sequence[Span]) -> list[Span]:
    """A span per transfer, named after the exchange that started it; what a slow link adds is part of it."""
    all_to_alls = [span for span in taken_up if span.name == "gloo:all_to_all"]
    found = [span for span in taken_up if span.name != "gloo:all_to_all"]
    for start in (span for span in host if span.name.startswith(START) and span.name not in PIPELINE_SPANS):
        transfer = next((span for span in all_to_alls if span.start_ms >= start.start_ms), None)
        if transfer is None:
            continue  # it had not arrived when the recording ended
        all_to_alls.remove(transfer)
        begin, end = start.start_ms, transfer.end_ms
        for link in slow:
            if link.start_ms <= begin <= link.end_ms:
                end = max(end, begin + float(link.name.removeprefix(SLOW).removesuffix(" ms")))
        name = start.name.removeprefix(START)
        found.append(Span(start.rank, NETWORK, name, begin, end - begin, start.num_bytes))
    return found


def _gpu_spans(events: Sequence[Span]) -> list[Span]:
    """Copies and NCCL by name, runs of other kernels as one span each."""
    found: list[Span] = []
    last: dict[str, int] = {}
    for event in events:
        name = event.name
        if "nccl" in name.lower():
            found.append(replace(event, stream=NETWORK, name=name.split("(")[0]))
        elif name.startswith(("Memcpy", "Memset")):
            found.append(event)
        else:
            index = last.get(event.stream)
            if index is not None and event.start_ms - found[index].end_ms < SAME_BURST_MS:
                found[index] = replace(found[index], duration_ms=event.end_ms - found[index].start_ms)
            else:
                last[event.stream] = len(found)
                found.append(replace(event, name="kernels"))
    return found


# ---------------------------------------------------------------- sets of times

Times = list[tuple[float, float]]


def _union(times: Iterable[tuple[float, float]]) -> Times:
    """Sorted and without overlaps.

    >>> _union([(4, 6), (0, 2), (1, 3)])
    [(0, 3), (4, 6)]
    """
    merged: Times = []
    for start, end in sorted(times):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _both(first: Times, second: Times) -> Times:
    """
    >>> _both([(0, 3), (4, 6)], [(2, 5)])
    [(2, 3), (4, 5)]
    """
    common = [(max(a, c), min(b, d)) for a, b in first for c, d in second]
    return [(start, end) for start, end in common if start < end]


def _length(times: Times) -> float:
    return sum(end - start for start, end in times)
