"""Timelines as pictures: a line per rank and stream, coloured by what was done, one panel per timeline.

    timeline_figure({"unpipelined": plain, "sparse-dist": pipelined})

Panels share one time axis, so that the same length is the same time. Of spans inside spans (a wait inside a lookup
inside a forward) the innermost shows. Transfers that are under way at the same time lie in lines of their own.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from recsys_edu.distributed.timeline import HOST, NETWORK, Span, Timeline
from recsys_edu.viz.theme import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PAPER,
    PURPLE,
    SKY,
    VERMILLION,
    YELLOW,
    styled,
    text_on,
)  # fmt: skip
from recsys_edu.viz.traffic import bytes_text

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

WAITING = "waiting"
INPUT_LABELS = ("sizes", "lengths and ids", "weights", "ids")
COLOURS = {
    "load and copy": SKY,
    "input_dist": ORANGE,
    "lookup": PURPLE,
    "forward": BLUE,
    "output_dist": YELLOW,
    WAITING: VERMILLION,
    "backward": GREEN,
    "gradient_dist": "#8C6D1F",
    "optimizer": INK,
    "DDP's all-reduce": MUTED,
    "kernels": BLUE,
    "other": MUTED,
}
LINE_HEIGHT = 0.84
_KIND_OF = {
    "load batch": "load and copy", "load": "load and copy", "copy batch": "load and copy", "copy": "load and copy",
    "start input": "input_dist", "exchange input": "input_dist",
    "gloo:all_reduce": "DDP's all-reduce",
}  # fmt: skip


def kind_of(span: Span) -> str:
    """What a span counts as, a key of COLOURS.

    >>> kind_of(Span(0, "host", "wait sizes", 0, 1)), kind_of(Span(0, "network", "lengths and ids", 0, 1))
    ('waiting', 'input_dist')
    """
    name = span.name.partition(" #")[0]  # simulated spans say which batch
    if name.startswith("wait "):
        return WAITING
    if name in _KIND_OF or name in COLOURS:
        return _KIND_OF.get(name, name)
    if name.startswith(("Memcpy", "Memset")):
        return "load and copy"
    label = name.removeprefix("start ")
    if label in INPUT_LABELS:
        return "input_dist"
    if label.startswith("gradients"):
        return "gradient_dist"
    if span.stream == NETWORK or name.startswith("start "):
        return "output_dist"
    return "other"


def timeline_figure(
    timelines: Timeline | Mapping[str, Timeline],
    title: str = "What runs when",
    window_ms: tuple[float, float] | None = None,
    height: int | None = None,
) -> Figure:
    """A Gantt chart with one panel per timeline; hover over a bar for its times and bytes.

    Args:
        timelines: one, or several with names.
        window_ms: the part to show, in milliseconds after each timeline's beginning; default: all.
    """
    from plotly.subplots import make_subplots

    timelines = {"": timelines} if isinstance(timelines, Timeline) else dict(timelines)
    lines = {name: _lines(timeline) for name, timeline in timelines.items()}
    counts = [max(len(found), 1) for found in lines.values()]
    height = height or 180 + 90 * len(counts) + 30 * sum(counts)
    figure = make_subplots(
        rows=len(counts),
        cols=1,
        shared_xaxes=True,
        row_heights=counts,
        vertical_spacing=min(70 / height, 0.9 / max(len(counts) - 1, 1)),
        subplot_titles=[f"{name}: {timeline.overlap()}" if name else "" for name, timeline in timelines.items()],
    )
    alone = str(timelines[""].overlap()) if "" in timelines else "each panel: time in exchanges, all ranks together"
    styled(figure, f"{title}<br>{alone}", height=height)
    last = max((timeline.end_ms for timeline in timelines.values()), default=1.0)
    window_ms = window_ms or (0.0, last)
    shown: set[str] = set()
    for row, found in enumerate(lines.values(), 1):
        _add_bars(figure, row, found, window_ms, shown)
    figure.update_xaxes(title_text="ms", row=len(counts), col=1)
    figure.update_xaxes(range=window_ms)
    for annotation in figure.layout.annotations:
        annotation.update(x=0, xanchor="left", font={"size": 13})
    figure.update_layout(
        barmode="overlay",
        bargap=0,
        margin={"l": 130, "t": 155, "b": 50},
        legend={"orientation": "h", "yref": "container", "y": 1 - 66 / height, "yanchor": "top", "x": 0},
        legend_font_size=12,
    )
    figure.update_layout(title={"yref": "container", "y": 1, "yanchor": "top", "pad": {"t": 16}})
    return figure


def _lines(timeline: Timeline) -> list[tuple[str, list[Span]]]:
    """(label, spans that do not overlap) from top to bottom: for each rank its host, GPU streams, and network."""
    found: list[tuple[str, list[Span]]] = []
    for rank in timeline.ranks:
        spans = [span for span in timeline.spans if span.rank == rank]
        streams = sorted(
            {span.stream for span in spans}, key=lambda stream: (stream == NETWORK, stream != HOST, stream)
        )
        for stream in streams:
            mine = [span for span in spans if span.stream == stream]
            parts = [innermost(mine)] if stream == HOST else side_by_side(mine)
            found += [(f"rank {rank} {stream}" if not turn else "", part) for turn, part in enumerate(parts)]
    return found


def innermost(spans: Sequence[Span]) -> list[Span]:
    """Nested spans as a sequence without overlaps, where at any time the deepest shows.

    >>> outer, inner = Span(0, "host", "forward", 0, 10), Span(0, "host", "lookup", 2, 3, depth=1)
    >>> [(span.name, span.start_ms, span.end_ms) for span in innermost([outer, inner])]
    [('forward', 0, 2), ('lookup', 2, 5), ('forward', 5, 10)]
    """
    cuts = sorted({time for span in spans for time in (span.start_ms, span.end_ms)})
    pieces: list[Span] = []
    for start, end in itertools.pairwise(cuts):
        covering = [span for span in spans if span.start_ms <= start and span.end_ms >= end]
        if not covering:
            continue
        top = max(covering, key=lambda span: (span.depth, span.start_ms))
        last = pieces[-1] if pieces else None
        if last is not None and last.end_ms == start and (last.name, last.depth) == (top.name, top.depth):
            pieces[-1] = Span(
                top.rank, top.stream, top.name, last.start_ms, end - last.start_ms, top.num_bytes, top.depth
            )
        else:
            pieces.append(Span(top.rank, top.stream, top.name, start, end - start, top.num_bytes, top.depth))
    return pieces


def side_by_side(spans: Sequence[Span]) -> list[list[Span]]:
    """The fewest lines on which no two spans overlap."""
    lines: list[list[Span]] = []
    for span in sorted(spans, key=lambda span: span.start_ms):
        line = next((line for line in lines if line[-1].end_ms <= span.start_ms), None)
        if line is None:
            lines.append([span])
        else:
            line.append(span)
    return lines


def _add_bars(
    figure: Figure, row: int, lines: list[tuple[str, list[Span]]], window_ms: tuple[float, float], shown: set[str]
) -> None:
    width = window_ms[1] - window_ms[0]
    by_kind: dict[str, list[tuple[int, Span]]] = {kind: [] for kind in COLOURS}
    for line, (_, spans) in enumerate(lines):
        for span in spans:
            if span.start_ms < window_ms[1] and span.end_ms > window_ms[0]:
                by_kind[kind_of(span)].append((line, span))
    for kind, found in by_kind.items():
        if not found:
            continue
        fill = COLOURS[kind]
        pattern = {
            "shape": "/" if kind == WAITING else "",
            "size": 6,
            "solidity": 0.5,
            "bgcolor": PAPER,
            "fgcolor": fill,
        }
        figure.add_bar(
            row=row,
            col=1,
            orientation="h",
            y=[line for line, _ in found],
            base=[span.start_ms for _, span in found],
            x=[span.duration_ms for _, span in found],
            width=LINE_HEIGHT,
            marker={"color": fill, "line": {"color": PAPER, "width": 0.5}, "pattern": pattern},
            name=kind,
            legendgroup=kind,
            showlegend=kind not in shown,
            text=[_short(span.name) if span.duration_ms > _room(span.name) * width else "" for _, span in found],
            textposition="inside",
            insidetextanchor="middle",
            textangle=0,
            constraintext="none",
            textfont={"size": 10, "color": INK if kind == WAITING else text_on(fill)},
            customdata=[_hover(span) for _, span in found],
            hovertemplate="%{customdata}<extra></extra>",
        )
        shown.add(kind)
    figure.update_yaxes(
        tickvals=list(range(len(lines))),
        ticktext=[label for label, _ in lines],
        range=[max(len(lines), 1) - 0.45, -0.55],
        showgrid=False,
        zeroline=False,
        ticks="",
        row=row,
        col=1,
    )


def _room(name: str) -> float:
    """The share of the figure's width that a label needs."""
    return 0.008 + 0.0062 * len(_short(name))


def _short(name: str) -> str:
    name = name.removeprefix("wait ")
    for long, short in (("gradients of ", "grad "), (" embeddings", ""), ("lengths and ids", "ids"), ("gloo:", "")):
        name = name.replace(long, short)
    return name


def _hover(span: Span) -> str:
    size = f"<br>{bytes_text(span.num_bytes)} ({span.num_bytes:,} bytes)" if span.num_bytes else ""
    return (
        f"<b>{span.name}</b><br>rank {span.rank}, {span.stream}<br>"
        f"{span.start_ms:.2f} to {span.end_ms:.2f} ms: {span.duration_ms:.2f} ms{size}"
    )
