"""Pictures of sequence models: who looks at whom, and how learning went.

attention_heatmap(...)     weights between the films of one history, head by head
learning_curve(...)        loss and Hit@10 over epochs, with the baselines as lines
padding_waste(...)         lengths of a batch: real positions and what padding would add
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from recsys_edu.viz.theme import BLUE, FAINT, GREEN, MUTED, ORANGE, PURPLE, VERMILLION, styled

if TYPE_CHECKING:
    from plotly.graph_objects import Figure
    from torch import Tensor

_DASHES = ("dash", "dot", "dashdot")


def attention_heatmap(labels: Sequence[str], query_P: Tensor, key_P: Tensor, weights_PH: Tensor, title: str) -> Figure:
    """One panel per head: row q, column k holds the share of attention that position q gives to position k.

    labels: one per position, oldest first. Pairs that may not see each other stay white.
    """
    from plotly.subplots import make_subplots

    num_heads = weights_PH.size(1)
    short = [f"{place}. {label if len(label) <= 22 else label[:21] + '…'}" for place, label in enumerate(labels, 1)]
    names = [f"head {head + 1}" for head in range(num_heads)]
    figure = make_subplots(1, num_heads, subplot_titles=names, shared_yaxes=True, horizontal_spacing=0.04)
    for head in range(num_heads):
        share_QK = weights_PH.new_full((len(labels), len(labels)), float("nan"))
        share_QK[query_P, key_P] = weights_PH[:, head]
        figure.add_heatmap(
            z=[[None if value != value else value for value in row] for row in share_QK.tolist()],
            x=short, y=short, coloraxis="coloraxis", row=1, col=head + 1,
            hovertemplate="%{y}<br>looks at %{x}<br>%{z:.1%}<extra></extra>",
        )  # fmt: skip
    styled(figure, title, height=520)
    figure.update_layout(coloraxis={"colorscale": "Cividis_r", "cmin": 0, "colorbar": {
        "title": "share", "tickformat": ".0%"}}, margin={"l": 190, "b": 190, "t": 100})  # fmt: skip
    figure.update_xaxes(title_text="looks at", tickangle=-60, showgrid=False)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    figure.update_yaxes(title_text="position", col=1)
    return figure


def learning_curve(
    losses: Sequence[float], hits: Mapping[int, float], baselines: Mapping[str, float], title: str
) -> Figure:
    """Loss of every epoch above, Hit@10 of some epochs below, with dashed lines for what needs no training."""
    from plotly.subplots import make_subplots

    figure = make_subplots(2, 1, shared_xaxes=True, vertical_spacing=0.08)
    epochs = list(range(1, len(losses) + 1))
    figure.add_scatter(x=epochs, y=list(losses), mode="lines+markers", line={"color": ORANGE, "width": 2},
                       marker={"symbol": "square"}, name="loss", showlegend=False, row=1, col=1)  # fmt: skip
    figure.add_scatter(x=list(hits), y=list(hits.values()), mode="lines+markers", line={"color": BLUE, "width": 3},
                       name="this model", showlegend=False, row=2, col=1)  # fmt: skip
    for number, (name, value) in enumerate(baselines.items()):
        figure.add_hline(
            y=value, row=2, col=1, line={"color": (VERMILLION, GREEN, PURPLE)[number % 3], "dash": _DASHES[number % 3]},
            annotation_text=f"{name} {value:.3f}", annotation_position="top left", annotation_font_size=12,
        )  # fmt: skip
    styled(figure, title, height=520)
    figure.update_yaxes(title_text="loss, nats", row=1, col=1)
    figure.update_yaxes(title_text="Hit@10, validation", rangemode="tozero", row=2, col=1)
    figure.update_xaxes(title_text="epoch", row=2, col=1)
    return figure


def padding_waste(lengths: Sequence[int], title: str) -> Figure:
    """A bar per row of a batch, longest first: what is there, and what padding to the longest row would add."""
    import plotly.graph_objects as go

    ordered = sorted(lengths, reverse=True)
    rows = list(range(1, len(ordered) + 1))
    figure = go.Figure()
    figure.add_bar(x=rows, y=ordered, name="films", marker={"color": BLUE})
    figure.add_bar(x=rows, y=[ordered[0] - length for length in ordered], name="padding",
                   marker={"color": FAINT, "line": {"color": MUTED, "width": 0.5}})  # fmt: skip
    styled(figure, title, "row of the batch, longest first", "positions")
    figure.update_layout(barmode="stack", bargap=0)
    return figure
