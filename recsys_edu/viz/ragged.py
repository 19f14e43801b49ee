"""Figures of notebook 01: what padding costs, and how jagged tensors lie in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from recsys_edu.viz.theme import BLUE, FAINT, INK, MUTED, colour, styled, text_on

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

BYTES_PER_ID = 8


def padded_and_jagged(bags: Sequence[Sequence[object]]) -> Figure:
    """The same ragged rows twice: as a padded matrix with its empty slots, and end to end with offsets."""
    from plotly.subplots import make_subplots

    lengths = [len(bag) for bag in bags]
    width, num_values = max(lengths, default=0), sum(lengths)
    figure = make_subplots(
        rows=2,
        cols=1,
        row_heights=[0.68, 0.32],
        vertical_spacing=0.2,
        subplot_titles=("padded matrix [B, longest]", "jagged: values [N] end to end, offsets [B + 1] below"),
    )
    for row, bag in enumerate(bags):
        for column in range(width):
            real = column < len(bag)
            _box(figure, column, row, str(bag[column]) if real else "0", colour(row) if real else FAINT, subplot=1)
    position = 0
    for row, bag in enumerate(bags):
        for value in bag:
            _box(figure, position, 0, str(value), colour(row), subplot=2)
            position += 1
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    figure.update_xaxes(range=[-0.6, max(width, num_values) - 0.4], showgrid=False, zeroline=False)
    slots = width * len(bags)
    styled(
        figure,
        f"{num_values} values need {slots} slots when padded<br>grey slots hold nothing; "
        f"{slots - num_values} of {slots} are wasted",
        height=160 + 46 * (len(bags) + 3),
        legend=False,
    )
    figure.update_layout(margin_t=110)
    for heading in figure.layout.annotations[:2]:
        heading.update(x=0, xanchor="left", font={"size": 13, "color": MUTED})
    figure.update_xaxes(visible=False, row=1, col=1)
    figure.update_xaxes(tickvals=offsets - 0.5, ticktext=[str(o) for o in offsets], title_text="offset", row=2, col=1)
    samples = {"tickvals": list(range(len(bags))), "ticktext": [f"row {row}" for row in range(len(bags))]}
    figure.update_yaxes(
        showgrid=False, zeroline=False, ticks="", range=[len(bags) - 0.4, -0.6], row=1, col=1, **samples
    )
    figure.update_yaxes(visible=False, range=[0.6, -0.6], row=2, col=1)
    return figure


def padding_cost(lengths: Sequence[int], title: str = "What padding this batch costs", max_bars: int = 200) -> Figure:
    """Every row of a batch as a bar, longest first: ids that are there, and the slots that padding adds."""
    import plotly.graph_objects as go

    ordered = np.sort(np.asarray(lengths))[::-1]
    longest, num_values = int(ordered.max(initial=0)), int(ordered.sum())
    rows = np.linspace(0, len(ordered) - 1, min(max_bars, len(ordered))).astype(int)
    drawn = ordered[rows]
    padded_kib = longest * len(ordered) * BYTES_PER_ID / 1024
    jagged_kib = (num_values + len(ordered) + 1) * BYTES_PER_ID / 1024
    waste = 1 - num_values / max(1, longest * len(ordered))
    figure = go.Figure()
    figure.add_bar(x=rows, y=drawn, name="ids", marker_color=BLUE)
    figure.add_bar(x=rows, y=longest - drawn, name="padding", marker_color=FAINT, marker_line_width=0)
    figure.update_layout(barmode="stack", bargap=0)
    subtitle = f"padded {padded_kib:,.0f} KiB, jagged {jagged_kib:,.0f} KiB; {waste:.0%} of the matrix is padding"
    return styled(figure, f"{title}<br>{subtitle}", "row of the batch, longest first", "slots in the row", height=380)


def skewed_lengths(num_rows: int, skew: float, longest: int = 500, seed: int = 0) -> np.ndarray:
    """Lengths as clicks come: most rows short, a few very long. A larger `skew` gives shorter tails."""
    draws = np.random.default_rng(seed).pareto(skew, size=num_rows) * 4
    return np.minimum(draws.astype(int), longest)


def keyed_layout(bags_by_key: Mapping[str, Sequence[Sequence[object]]]) -> Figure:
    """How a KeyedJaggedTensor lies in memory: key after key, within a key row after row."""
    import plotly.graph_objects as go

    figure = go.Figure()
    position, ticks = 0, [0]
    for number, (key, bags) in enumerate(bags_by_key.items()):
        start = position
        for row, bag in enumerate(bags):
            for value in bag:
                _box(figure, position, 0, str(value), colour(number))
                position += 1
            ticks.append(position)
            middle = position - len(bag) / 2 - 0.5
            label = f"row {row}" if bag else f"row {row}: ∅"
            figure.add_annotation(
                x=middle, y=0.78 if bag else 1.08, text=label, showarrow=False, font={"size": 11, "color": MUTED}
            )
        figure.add_annotation(
            x=(start + position - 1) / 2,
            y=-0.85,
            text=f"<b>{key}</b>",
            showarrow=False,
            font={"color": INK, "size": 15},
        )
    unique = sorted(set(ticks))
    styled(
        figure,
        "One flat tensor holds every feature<br>feature-major: all rows of the first key, then all of the next",
        "offset",
        height=280,
        legend=False,
    )
    figure.update_xaxes(
        range=[-0.6, position - 0.4],
        tickvals=[tick - 0.5 for tick in unique],
        ticktext=[str(tick) for tick in unique],
        showgrid=False,
        zeroline=False,
    )
    figure.update_yaxes(visible=False, range=[1.4, -1.2])
    return figure


def _box(figure: Figure, x: float, y: float, text: str, fill: str, subplot: int | None = None) -> None:
    """One slot of memory: a filled square with its value in the middle."""
    where = {} if subplot is None else {"row": subplot, "col": 1}
    line = {"color": "#FFFFFF", "width": 2}
    figure.add_shape(type="rect", x0=x - 0.5, x1=x + 0.5, y0=y - 0.5, y1=y + 0.5, fillcolor=fill, line=line, **where)
    ink = MUTED if fill == FAINT else text_on(fill)
    figure.add_annotation(x=x, y=y, text=text, showarrow=False, font={"color": ink}, **where)
