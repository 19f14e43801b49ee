"""Quantisation as pictures: a row and the grid it is rounded to, the error of every row, what fewer bytes cost.

Shapes: R rows, D columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recsys_edu.kernels.quantized_rows import CODE_BITS, dequantize_rows, error_bound, quantize_rows
from recsys_edu.types import DataType
from recsys_edu.viz.theme import BLUE, FAINT, INK, MUTED, ORANGE, colour, styled

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def row_errors(weight_RD: Tensor, data_type: DataType) -> tuple[Tensor, Tensor]:
    """For every row the largest error of a number, and the bound that it stays below: [R] each.

    >>> errors, bounds = row_errors(torch.tensor([[0.0, 0.4, 2.0, 3.0]]), DataType.INT2)
    >>> round(errors.item(), 3), bool(errors <= bounds)
    (0.4, True)
    """
    rows = quantize_rows(weight_RD, data_type)
    errors_R = (dequantize_rows(rows, data_type, weight_RD.shape[1]) - weight_RD.float()).abs().amax(1)
    return errors_R, error_bound(rows, data_type, weight_RD.shape[1])


def grid_figure(row_D: Tensor, title: str = "One row, and the grid it is rounded to", height: int = 440) -> Figure:
    """The numbers of one row and what they become; a slider picks the type (it works in a saved page, too).

    Lines across are the values that the row's codes can stand for; sticks are errors.

    Raises:
        ValueError: not one row of at least four numbers, a multiple of four.
    """
    import plotly.graph_objects as go

    if row_D.dim() != 1 or row_D.numel() < 4 or row_D.numel() % 4:
        raise ValueError(f"expected one row of 4, 8, 12 ... numbers, got shape {tuple(row_D.shape)}")
    figure, kinds = go.Figure(), (DataType.INT2, DataType.INT4, DataType.INT8)
    first = 1  # what the slider shows before anybody drags
    columns = list(range(row_D.numel()))
    steps = []
    for index, kind in enumerate(kinds):
        stored_D = dequantize_rows(quantize_rows(row_D.detach()[None], kind), kind, row_D.numel())[0]
        error = (stored_D - row_D).abs().max().item()
        grid_x, grid_y = _grid(row_D, kind)
        sticks_x = [x for column in columns for x in (column, column, None)]
        sticks_y = [y for a, b in zip(row_D.tolist(), stored_D.tolist()) for y in (a, b, None)]
        shown = index == first
        figure.add_scatter(x=grid_x, y=grid_y, mode="lines", line={"color": FAINT, "width": 1}, hoverinfo="skip",
                           name="values that a code can mean", visible=shown)  # fmt: skip
        figure.add_scatter(x=sticks_x, y=sticks_y, mode="lines", line={"color": INK, "width": 2}, hoverinfo="skip",
                           name="error", visible=shown)  # fmt: skip
        figure.add_scatter(x=columns, y=row_D.tolist(), mode="markers", marker={"color": BLUE, "size": 10},
                           name="number", visible=shown)  # fmt: skip
        figure.add_scatter(x=columns, y=stored_D.tolist(), mode="markers", name="as stored", visible=shown,
                           marker={"color": ORANGE, "size": 9, "symbol": "diamond"})  # fmt: skip
        visible = [place // 4 == index for place in range(4 * len(kinds))]
        heading = _heading(title, kind, error)
        steps.append({"label": str(kind), "method": "update", "args": [{"visible": visible}, {"title.text": heading}]})
        if shown:
            start = heading
    styled(figure, title, "column", "value", height)
    figure.update_xaxes(showgrid=False, zeroline=False)
    figure.update_yaxes(showgrid=False, zeroline=False)
    figure.update_layout(
        title={"text": start},
        sliders=[{"active": first, "steps": steps, "currentvalue": {"prefix": "stored as "}, "pad": {"t": 45}}],
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 1, "xanchor": "right"},
        margin={"t": 110},
    )
    return figure


def _heading(title: str, kind: DataType, error: float) -> str:
    note = f"{kind}: {2 ** CODE_BITS[kind]} values, largest error {error:.3g}"
    return f'<b>{title}</b><br><span style="font-size:13px">{note}</span>'


def _grid(row_D: Tensor, kind: DataType) -> tuple[list[float | None], list[float | None]]:
    low, high, count = row_D.min().item(), row_D.max().item(), 2 ** CODE_BITS[kind]
    levels = torch.linspace(low, high, count).tolist()
    across = (-0.5, row_D.numel() - 0.5, None)
    return [x for _ in levels for x in across], [y for level in levels for y in (level, level, None)]


def row_error_figure(
    weight_RD: Tensor,
    data_types: Sequence[DataType] = (DataType.INT2, DataType.INT4, DataType.NFP8, DataType.INT8, DataType.FP16),
    title: str = "Error of every row",
    height: int = 460,
    most_rows: int = 500,
) -> Figure:
    """Largest error of each row (points, logarithmic) against the row's range; lines are the bounds.

    Rows that keep every number exactly cannot be shown on a logarithmic axis and are left out. Of a large table
    `most_rows` rows are drawn, evenly spaced by range.
    """
    import plotly.graph_objects as go

    weight_RD = weight_RD.detach().float()
    order = (weight_RD.amax(1) - weight_RD.amin(1)).argsort()
    order = order[torch.linspace(0, len(order) - 1, min(most_rows, len(order))).long()]
    rows_RD = weight_RD[order]
    range_R = rows_RD.amax(1) - rows_RD.amin(1)
    figure = go.Figure()
    for index, kind in enumerate(data_types):
        errors_R, bounds_R = row_errors(rows_RD, kind)
        kept = (errors_R > 0) & (range_R > 0)
        if not kept.any():
            continue
        style = {"color": colour(index)}
        x = range_R[kept].tolist()
        figure.add_scatter(x=x, y=bounds_R[kept].tolist(), mode="lines", line=style | {"width": 1}, showlegend=False,
                           hoverinfo="skip")  # fmt: skip
        marker = style | {"size": 5, "symbol": index}
        figure.add_scatter(x=x, y=errors_R[kept].tolist(), mode="markers", name=str(kind), marker=marker,
                           hovertemplate="range %{x:.3g}, error %{y:.3g}")  # fmt: skip
    heading = f"{title}<br>lines: the bound that the error stays below"
    styled(figure, heading, "range of the row (largest minus smallest)", "largest error in the row", height)
    figure.update_xaxes(type="log", exponentformat="power")
    figure.update_yaxes(type="log", exponentformat="power")
    return figure


def cost_figure(
    points: Mapping[str, tuple[float, float]],
    title: str = "What fewer bytes cost",
    y: str = "AUC lost",
    gates: Mapping[str, float] | None = None,
    height: int = 420,
) -> Figure:
    """One point per type: its bytes against what it loses. `gates` draws a line at the most that a type may lose.

    >>> cost_figure({"INT8": (20.0, 1e-5), "INT4": (12.0, 1e-3)}).data[0].x
    (20.0, 12.0)
    """
    import plotly.graph_objects as go

    figure = go.Figure()
    names = list(points)
    figure.add_scatter(
        x=[points[name][0] for name in names],
        y=[points[name][1] for name in names],
        mode="markers+text",
        text=names,
        textposition="top center",
        marker={"size": 12, "color": BLUE},
        showlegend=False,
    )
    for name, most in (gates or {}).items():
        figure.add_hline(y=most, line={"color": MUTED, "dash": "dash"})
        figure.add_annotation(x=0.8, xref="paper", xanchor="right", y=most, yanchor="bottom", showarrow=False,
                              text=f"{name}: at most {most:g}", font={"color": MUTED})  # fmt: skip
    figure.add_hline(y=0, line={"color": INK, "width": 1})
    styled(figure, title, "bytes per row", y, height)
    low, high = min(x for x, _ in points.values()), max(x for x, _ in points.values())
    figure.update_xaxes(range=[low - 0.1 * high, 1.1 * high])
    return figure
