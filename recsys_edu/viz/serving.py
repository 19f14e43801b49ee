"""Serving as pictures: what a larger batch costs and gives, and what clients see as more of them come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from recsys_edu.viz.theme import BLUE, colour, styled

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from recsys_edu.inference.load_test import LoadResult


def batch_figure(
    ms_of_batch: Mapping[int, float], title: str = "One batch through the model", height: int = 380
) -> Figure:
    """Milliseconds by batch size on the left, examples per second on the right.

    >>> [tuple(panel.y) for panel in batch_figure({1: 2.0, 10: 4.0}).data]
    [(2.0, 4.0), (500.0, 2500.0)]
    """
    from plotly.subplots import make_subplots

    sizes = list(ms_of_batch)
    figure = make_subplots(1, 2, horizontal_spacing=0.14)
    rates = [size / ms_of_batch[size] * 1e3 for size in sizes]
    for column, values in ((1, list(ms_of_batch.values())), (2, rates)):
        figure.add_scatter(
            x=sizes, y=values, mode="lines+markers", line={"color": BLUE}, marker={"size": 8}, showlegend=False,
            row=1, col=column,
        )  # fmt: skip
    styled(figure, title, height=height)
    figure.update_xaxes(type="log", title="examples in the batch", dtick=1)
    figure.update_yaxes(title="ms per batch", rangemode="tozero", col=1)
    figure.update_yaxes(title="examples per second", rangemode="tozero", col=2)
    return figure


def load_figure(
    results: Mapping[str, Sequence[LoadResult]], title: str = "Latency against throughput", height: int = 460
) -> Figure:
    """One curve per server: answers per second across, milliseconds up; the numbers at the points are clients.

    Solid lines are medians, dotted ones 99th percentiles.
    """
    import plotly.graph_objects as go

    figure = go.Figure()
    for index, (name, loads) in enumerate(results.items()):
        rates = [load.per_second for load in loads]
        for percent, dash, shown in ((50, "solid", "median"), (99, "dot", "99th percentile")):
            figure.add_scatter(
                x=rates,
                y=[load.percentile_ms(percent) for load in loads],
                mode="lines+markers+text" if percent == 50 else "lines+markers",
                text=[str(load.clients) for load in loads],
                textposition=("bottom right", "top left")[index % 2],  # lone clients of two servers see nearly the same
                line={"color": colour(index), "dash": dash},
                marker={"size": 8, "symbol": ["circle", "square", "diamond"][index % 3]},
                name=f"{name}, {shown}",
            )
    across = "answers per second (the number at a point: clients that ask)"
    styled(figure, title, across, "ms per answer (logarithmic)", height, legend=True)
    figure.update_yaxes(type="log", dtick=1, minor={"showgrid": True, "dtick": "D1"})
    figure.update_xaxes(rangemode="tozero")
    return figure
