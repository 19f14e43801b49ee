"""Pictures of predictions: a step that nobody has run, and what more ranks would buy.

step_figure(predicted)         a Gantt chart, drawn as a measured timeline is (viz/timeline.py)
scaling_figure(weak, strong)   milliseconds and examples per second from a few ranks to thousands
errors_figure(rows)            predicted beside measured steps
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from recsys_edu.viz.theme import BLUE, MUTED, ORANGE, SKY, VERMILLION, styled
from recsys_edu.viz.timeline import timeline_figure

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from recsys_edu.distributed.planner.scaling import ScalingPoint
    from recsys_edu.distributed.planner.step_simulator import PredictedStep


def step_figure(steps: PredictedStep | Mapping[str, PredictedStep], ranks: Sequence[int] = (0, 1)) -> Figure:
    """Two predicted steps of some ranks, one panel per prediction."""
    steps = steps if isinstance(steps, Mapping) else {"": steps}
    panels = {
        f"{name or 'predicted'} ({step.step_ms:.3g} ms per step)": step.timeline(ranks) for name, step in steps.items()
    }
    return timeline_figure(panels, title="A training step, predicted")


def scaling_figure(weak: Sequence[ScalingPoint], strong: Sequence[ScalingPoint], name: str = "") -> Figure:
    """Left: time per step, with the part in which the busiest rank computes; right: examples per second.

    Dotted: what perfect scaling from the smallest world would give. Worlds in which nothing fits are left out.
    """
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=1, cols=2, subplot_titles=["time per step", "throughput"], horizontal_spacing=0.12)
    for label, points, colour, dash in (("weak", weak, BLUE, "solid"), ("strong", strong, ORANGE, "dash")):
        points = [point for point in points if point.step_ms is not None]
        if not points:
            continue
        worlds, first = [point.world_size for point in points], points[0]
        line = {"color": colour, "dash": dash}
        each = f"{first.batch_size:,} examples per rank" if label == "weak" else "one global batch"
        common = {"x": worlds, "legendgroup": label, "name": f"{label}: {each}"}
        figure.add_scatter(
            **common,
            y=[point.step_ms for point in points],
            mode="lines+markers",
            line=line,
            hovertemplate="%{x} ranks: %{y:.4g} ms<extra></extra>",
            row=1,
            col=1,
        )
        figure.add_scatter(
            x=worlds,
            y=[point.work_ms for point in points],
            mode="lines",
            line={"color": colour, "width": 1},
            name=f"{label}: of it computing",
            hovertemplate="%{x} ranks: %{y:.4g} ms computing<extra></extra>",
            row=1,
            col=1,
        )
        figure.add_scatter(
            **common,
            y=[point.examples_per_s for point in points],
            mode="lines+markers",
            line=line,
            showlegend=False,
            hovertemplate="%{x} ranks: %{y:.3s} examples per second<extra></extra>",
            row=1,
            col=2,
        )
        figure.add_scatter(
            x=worlds,
            y=[first.examples_per_s * point.world_size / first.world_size for point in points],
            mode="lines",
            line={"color": MUTED, "dash": "dot"},
            name="perfect",
            showlegend=label == "weak",
            hoverinfo="skip",
            row=1,
            col=2,
        )
    missing = [p.world_size for p in weak if p.step_ms is None]
    note = f"; nothing fits on {', '.join(map(str, missing))} ranks" if missing else ""
    title = f"Scaling{f' of {name}' if name else ''}<br>predicted, planned anew for every number of ranks{note}"
    styled(figure, title, height=500)
    figure.update_xaxes(type="log", dtick=0.30103, tickformat="d", title_text="ranks", tickangle=-60)
    figure.update_yaxes(type="log", row=1, col=1, title_text="ms per step", dtick=0.30103, tickformat=".2~g")
    figure.update_yaxes(type="log", row=1, col=2, title_text="examples per second", dtick=1, exponentformat="SI")
    figure.update_layout(legend={"orientation": "h", "y": -0.42}, margin={"t": 110, "b": 150})
    return figure


def errors_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Measured beside predicted milliseconds; each row has `name`, `measured ms` and `predicted ms`."""
    import plotly.graph_objects as go

    names = [row["name"] for row in rows]
    figure = go.Figure()
    for kind, colour in (("measured", SKY), ("predicted", VERMILLION)):
        values = [row[f"{kind} ms"] for row in rows]
        figure.add_bar(x=names, y=values, name=kind, marker={"color": colour}, text=[f"{v:.0f}" for v in values])
    errors = [row["predicted ms"] / row["measured ms"] - 1 for row in rows]
    note = "errors: " + ", ".join(f"{error:+.0%}" for error in errors)
    return styled(figure, f"Predicted and measured steps<br>{note}", None, "ms per step", height=400)
