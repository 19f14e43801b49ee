"""Figures of notebooks 00 and 03: the data, the model, how it learns, and whether its probabilities can be trusted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from recsys_edu.viz.theme import BLUE, GREEN, INK, MUTED, ORANGE, PURPLE, SKY, VERMILLION, colour, styled, text_on

if TYPE_CHECKING:
    from plotly.graph_objects import Figure
    from torch import Tensor


def dlrm_diagram(
    num_dense: int, num_sparse: int, dim: int, dense_layers: Sequence[int], over_layers: Sequence[int]
) -> Figure:
    """DLRM from its inputs (below) to the probability of a click (above), with the shape at every arrow."""
    import plotly.graph_objects as go

    vectors = num_sparse + 1
    pairs = vectors * (vectors - 1) // 2
    figure = go.Figure()
    boxes = (
        (0.0, 0.0, 3.2, f"{num_dense} dense numbers", SKY),
        (4.0, 0.0, 5.2, f"{num_sparse} sparse features (ragged ids)", SKY),
        (0.0, 1.5, 3.2, f"dense arch: MLP {list(dense_layers)}", BLUE),
        (4.0, 1.5, 5.2, f"sparse arch: {num_sparse} embedding bags of dim {dim}", GREEN),
        (1.4, 3.0, 6.4, f"interaction: {pairs} dot products of {vectors} vectors", ORANGE),
        (1.4, 4.5, 6.4, f"over arch: MLP {list(over_layers)}", BLUE),
        (2.6, 6.0, 4.0, "logit, sigmoid: P(click)", PURPLE),
    )
    for x, y, width, text, fill in boxes:
        figure.add_shape(
            type="rect", x0=x, x1=x + width, y0=y, y1=y + 0.8, fillcolor=fill, line={"color": "#FFFFFF", "width": 1}
        )
        font = {"color": text_on(fill), "size": 14}
        figure.add_annotation(x=x + width / 2, y=y + 0.4, text=text, showarrow=False, font=font)
    arrows = (  # from, to, where the shape stands
        (1.6, 0.8, 1.6, 1.5, 1.72, f"[B, {num_dense}]"),
        (6.6, 0.8, 6.6, 1.5, 6.72, "KeyedJaggedTensor"),
        (1.6, 2.3, 3.0, 3.0, 2.75, f"[B, {dim}]"),
        (6.6, 2.3, 5.8, 3.0, 6.45, f"[B, {num_sparse}, {dim}]"),
        (4.6, 3.8, 4.6, 4.5, 4.72, f"[B, {dim} + {pairs}]"),
        (4.6, 5.3, 4.6, 6.0, 4.72, "[B, 1]"),
    )
    for x0, y0, x1, y1, label_x, text in arrows:
        ends = {"x": x1, "y": y1, "ax": x0, "ay": y0, "xref": "x", "yref": "y", "axref": "x", "ayref": "y"}
        figure.add_annotation(arrowhead=2, arrowcolor=INK, text="", **ends)
        font = {"size": 12, "color": MUTED}
        figure.add_annotation(x=label_x, y=(y0 + y1) / 2, text=text, showarrow=False, xanchor="left", font=font)
    styled(
        figure, "DLRM<br>read it from below: two kinds of input become vectors, vectors meet", height=480, legend=False
    )
    figure.update_layout(margin_b=10)
    figure.update_xaxes(visible=False, range=[-0.3, 9.5])
    figure.update_yaxes(visible=False, range=[-0.3, 7.1])
    return figure


def learning_curve(
    examples: Sequence[int],
    values: Sequence[float],
    references: Mapping[str, float],
    title: str = "Learning",
    metric: str = "AUC",
    height: int = 400,
) -> Figure:
    """A metric over training examples seen, between reference lines (a baseline, the best that can be reached)."""
    import plotly.graph_objects as go

    figure = go.Figure()
    figure.add_scatter(x=list(examples), y=list(values), mode="lines+markers", name="model", line_color=BLUE)
    for index, (name, value) in enumerate(references.items()):
        line = {"dash": "dash", "color": colour(index + 2)}
        figure.add_hline(
            y=value,
            line=line,
            annotation={"text": f"{name}: {value:.4f}", "font": {"color": INK}},
            annotation_position="bottom right",
        )
    every = [*values, *references.values()]
    space = 0.08 * (max(every) - min(every) or 0.01)
    styled(figure, title, "training examples seen", metric, height=height, legend=False)
    figure.update_yaxes(range=[min(every) - space, max(every) + space])
    return figure


def calibration_points(predictions: Tensor, labels: Tensor, num_bins: int = 15) -> tuple[np.ndarray, np.ndarray]:
    """Mean prediction and share of clicks in each of `num_bins` groups of equal size, by ascending prediction."""
    scores, clicks = (tensor.detach().double().flatten().numpy() for tensor in (predictions, labels))
    groups = np.array_split(np.argsort(scores, kind="stable"), num_bins)
    groups = [group for group in groups if len(group)]
    return np.array([scores[g].mean() for g in groups]), np.array([clicks[g].mean() for g in groups])


def calibration_curve(predictions: Tensor, labels: Tensor, title: str = "Can the probabilities be trusted?") -> Figure:
    """Predicted against observed click rates; on the diagonal, a prediction of 30% clicks in 30% of cases."""
    import plotly.graph_objects as go

    predicted, observed = calibration_points(predictions, labels)
    top = 1.08 * max(predicted.max(), observed.max())
    figure = go.Figure()
    figure.add_scatter(
        x=[0, top], y=[0, top], mode="lines", line={"dash": "dash", "color": MUTED}, name="perfectly calibrated"
    )
    marker = {"size": 10, "color": VERMILLION}
    figure.add_scatter(
        x=predicted, y=observed, mode="lines+markers", name="model", line_color=VERMILLION, marker=marker
    )
    subtitle = f"each point: one of {len(predicted)} groups of equal size"
    styled(figure, f"{title}<br>{subtitle}", "mean predicted probability", "share of positives", height=430)
    figure.update_xaxes(range=[0, top])
    figure.update_yaxes(range=[0, top])
    return figure


def score_separation(predictions: Tensor, labels: Tensor) -> Figure:
    """The predictions of positives and of negatives: AUC is how often a positive one lies to the right."""
    import plotly.graph_objects as go

    scores, clicks = (tensor.detach().flatten().numpy() for tensor in (predictions, labels))
    figure = go.Figure()
    for name, chosen, fill in (("negatives", clicks < 0.5, ORANGE), ("positives", clicks >= 0.5, BLUE)):
        figure.add_histogram(
            x=scores[chosen], name=name, marker_color=fill, opacity=0.65, nbinsx=50, histnorm="probability density"
        )
    figure.update_layout(barmode="overlay")
    return styled(
        figure,
        "What the model says about positives and negatives<br>the more they part, the higher the AUC",
        "predicted probability",
        "density",
        height=380,
    )


def long_tail(counts: Sequence[int], title: str, x: str, y: str) -> Figure:
    """Counts in descending order: a few things are everywhere, most are rare."""
    import plotly.graph_objects as go

    ordered = np.sort(np.asarray(counts))[::-1]
    half = int(np.searchsorted(np.cumsum(ordered), ordered.sum() / 2)) + 1
    figure = go.Figure()
    figure.add_scatter(y=ordered, mode="lines", fill="tozeroy", line_color=BLUE, name="count")
    figure.add_vline(
        x=half, line={"dash": "dash", "color": VERMILLION}, annotation_text=f"half of everything: the first {half:,}"
    )
    return styled(figure, title, x, y, height=360, legend=False)
