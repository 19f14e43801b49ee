"""Figures of notebook 02: what an embedding lookup moves, and the roof that memory puts over it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from recsys_edu.viz.theme import BLUE, GREEN, MUTED, OKABE_ITO, ORANGE, SKY, VERMILLION, styled

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

MARKERS = ("circle", "square", "diamond", "triangle-up", "star", "cross", "x", "pentagon")


@dataclass(frozen=True)
class LookupShape:
    """A pooled lookup over many tables: `pooling` ids per bag, rows of `dim` float32 numbers, 64-bit ids.

    >>> LookupShape(num_tables=26, batch_size=2048, pooling=1, dim=64).row_bytes
    13631488
    """

    num_tables: int
    batch_size: int
    pooling: int
    dim: int

    @property
    def num_ids(self) -> int:
        """All ids of a batch."""
        return self.num_tables * self.batch_size * self.pooling

    @property
    def row_bytes(self) -> int:
        """Bytes of table rows that are read."""
        return self.num_ids * self.dim * 4

    @property
    def id_bytes(self) -> int:
        """Bytes of ids and offsets that are read."""
        return self.num_ids * 8 + self.num_tables * self.batch_size * 8

    @property
    def output_bytes(self) -> int:
        """Bytes of pooled vectors that are written."""
        return self.num_tables * self.batch_size * self.dim * 4

    @property
    def total_bytes(self) -> int:
        """Everything that moves."""
        return self.row_bytes + self.id_bytes + self.output_bytes

    @property
    def additions(self) -> int:
        """Floating-point operations: each row read is added to its bag."""
        return self.num_ids * self.dim

    @property
    def intensity(self) -> float:
        """Floating-point operations per byte moved; below one quarter, always."""
        return self.additions / self.total_bytes


def lookup_cost(shape: LookupShape, gather_gb_s: float, copy_gb_s: float) -> Figure:
    """What one lookup moves, by kind, and the least time that a memory of these speeds needs for it."""
    import plotly.graph_objects as go

    parts = {
        "table rows (random)": shape.row_bytes,
        "ids and offsets": shape.id_bytes,
        "pooled output": shape.output_bytes,
    }
    figure = go.Figure()
    for (name, num_bytes), fill in zip(parts.items(), (BLUE, ORANGE, GREEN)):
        label = f"{num_bytes / 2**20:,.1f} MiB"
        figure.add_bar(x=[num_bytes / 2**20], y=[name], orientation="h", marker_color=fill, text=label, name=name)
    figure.update_traces(textposition="auto", textfont_size=14)
    least_ms = (shape.row_bytes / gather_gb_s + (shape.id_bytes + shape.output_bytes) / copy_gb_s) / 1e6
    subtitle = (
        f"{shape.num_ids:,} ids, {shape.intensity:.2f} additions per byte; at {gather_gb_s:.1f} GB/s gathering and "
        f"{copy_gb_s:.1f} GB/s streaming at least {least_ms:.2f} ms"
    )
    styled(figure, f"What one lookup moves<br>{subtitle}", "MiB moved", height=300, legend=False)
    figure.update_yaxes(autorange="reversed")
    figure.update_layout(margin_l=150)
    return figure


def gather_curve(row_bytes: Sequence[int], gb_s: Sequence[float], copy_gb_s: float) -> Figure:
    """Random-gather bandwidth over the length of a row, under the roof of streaming."""
    import plotly.graph_objects as go

    figure = go.Figure()
    figure.add_scatter(x=list(row_bytes), y=list(gb_s), mode="lines+markers", name="random rows", line_color=BLUE)
    figure.add_hline(
        y=copy_gb_s, line={"dash": "dash", "color": VERMILLION}, annotation_text=f"streaming: {copy_gb_s:.1f} GB/s"
    )
    styled(
        figure,
        "Memory likes long rows<br>the shorter a row, the more of each fetch is thrown away",
        "bytes per row",
        "GB/s, read and written",
        height=380,
    )
    figure.update_xaxes(type="log", tickvals=list(row_bytes))
    figure.update_yaxes(range=[0, 1.15 * max(copy_gb_s, *gb_s)])
    return figure


def roofline(points: Mapping[str, tuple[float, float]], copy_gb_s: float, peak_gflop_s: float) -> Figure:
    """Measured kernels under the roof: `points` is name: (operations per byte, GFLOP/s reached)."""
    import plotly.graph_objects as go

    ridge = peak_gflop_s / copy_gb_s
    intensities = np.geomspace(0.02, max(100.0, 4 * ridge), 200)
    figure = go.Figure()
    figure.add_scatter(
        x=intensities,
        y=np.minimum(intensities * copy_gb_s, peak_gflop_s),
        mode="lines",
        line={"color": MUTED, "width": 3},
        name=f"roof: {copy_gb_s:.0f} GB/s, {peak_gflop_s:.0f} GFLOP/s",
    )
    for index, (name, (intensity, gflop_s)) in enumerate(points.items()):
        marker = {
            "size": 13,
            "color": OKABE_ITO[index],
            "symbol": MARKERS[index],
            "line": {"width": 1, "color": "#222"},
        }
        figure.add_scatter(x=[intensity], y=[gflop_s], mode="markers", marker=marker, name=name)
    figure.add_vline(x=ridge, line={"dash": "dot", "color": MUTED})
    where = {"x": np.log10(ridge), "y": 0, "yref": "paper", "xanchor": "left", "yanchor": "bottom"}  # log axis: log10
    figure.add_annotation(text=" arithmetic sets the pace", showarrow=False, font={"color": MUTED}, **where)
    styled(
        figure,
        "Lookups live on the left<br>left of the dotted line memory sets the pace, right of it arithmetic",
        "floating-point operations per byte moved",
        "GFLOP/s",
        height=450,
    )
    figure.update_xaxes(type="log", dtick=1)
    figure.update_yaxes(type="log", dtick="D2")
    return figure


def lines_over_batch(batch_sizes: Sequence[int], microseconds: Mapping[str, Sequence[float]]) -> Figure:
    """Time per call over the batch size, one line per way of doing it; both axes logarithmic."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for index, (name, times) in enumerate(microseconds.items()):
        marker = {"symbol": MARKERS[index], "size": 9}
        figure.add_scatter(
            x=list(batch_sizes),
            y=list(times),
            mode="lines+markers",
            name=name,
            line_color=OKABE_ITO[index],
            marker=marker,
        )
    styled(
        figure,
        "Small batches pay for calls, large ones for bytes<br>one lookup over all tables; less is better",
        "batch size",
        "microseconds",
        height=400,
    )
    figure.update_xaxes(type="log", tickvals=list(batch_sizes))
    figure.update_yaxes(type="log", dtick="D2")
    return figure


def bars(values: Mapping[str, float], title: str, unit: str, digits: int = 1, start: float = 0.0) -> Figure:
    """One horizontal bar per name, with its value written on it; bars begin at `start` (0.5 suits AUC: a coin)."""
    import plotly.graph_objects as go

    names = list(values)
    figure = go.Figure()
    figure.add_bar(
        x=[value - start for value in values.values()],
        base=start,
        y=names,
        orientation="h",
        marker_color=[OKABE_ITO[index % 8] for index in range(len(names))],
        text=[f"{value:,.{digits}f}" for value in values.values()],
        textposition="outside",
        cliponaxis=False,
    )
    styled(figure, title, unit, height=130 + 46 * len(names), legend=False)
    figure.update_yaxes(autorange="reversed", automargin=True)
    figure.update_layout(margin_r=80)
    if start:
        figure.update_xaxes(range=[start, start + 1.12 * (max(values.values()) - start)])
    return figure


def tables_side_by_side(num_tables: int, dim: int) -> Figure:
    """The same lookup as one call per table, and as one call over all tables laid end to end."""
    import plotly.graph_objects as go

    figure = go.Figure()
    shown = min(num_tables, 6)
    for index in range(shown):
        fill = OKABE_ITO[index % 8]
        _block(figure, index * 1.5, 2.2, 1.0, 1.0, fill, f"table {index}")
        figure.add_annotation(
            x=index * 1.5 + 0.5, y=1.75, text=f"call {index + 1}", showarrow=False, font={"color": MUTED, "size": 12}
        )
        _block(figure, index * 1.0 + 1.2, 0.2, 1.0, 0.8, fill, "")
    figure.add_annotation(
        x=1.2 + shown / 2, y=-0.15, text="one call: rows of every table, one flat tensor of ids", showarrow=False
    )
    figure.add_annotation(x=-0.2, y=3.5, text="<b>one module per table</b>", showarrow=False, xanchor="left")
    figure.add_annotation(x=-0.2, y=1.25, text="<b>table-batched</b>", showarrow=False, xanchor="left")
    styled(
        figure,
        f"{num_tables} tables of dim {dim}: {num_tables} calls, or one<br>"
        "every call pays for dispatch, autograd and threads again",
        height=300,
        legend=False,
    )
    figure.update_layout(margin_b=10)
    figure.update_xaxes(visible=False, range=[-0.4, shown * 1.5])
    figure.update_yaxes(visible=False, range=[-0.5, 3.8])
    return figure


def _block(figure: Figure, x: float, y: float, width: float, height: float, fill: str, text: str) -> None:
    line = {"color": SKY if fill == BLUE else "#FFFFFF", "width": 1}
    figure.add_shape(type="rect", x0=x, x1=x + width, y0=y, y1=y + height, fillcolor=fill, line=line, opacity=0.85)
    if text:
        figure.add_annotation(x=x + width / 2, y=y + height / 2, text=text, showarrow=False, font={"size": 12})
