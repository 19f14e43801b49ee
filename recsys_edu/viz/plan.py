"""Pictures of a sharding plan: what every rank holds, how long it works, and what memory buys.

plan_figure(plan)      ranks x resources as a heat map: how full, how busy with what
tables_figure(plan)    the memory of every rank, table by table
times_figure(plan)     the time of every rank, phase by phase, with the bound that no plan beats
pareto_figure(plan)    plans for the same model between "fast" and "frugal"
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from recsys_edu.distributed.planner.cost import COUNTED, PHASES
from recsys_edu.distributed.planner.options import CACHED_KERNELS
from recsys_edu.distributed.planner.placement import place_all
from recsys_edu.distributed.planner.search import PRICES, SHARES, choose
from recsys_edu.distributed.planner.utils import show_bytes
from recsys_edu.viz.theme import BLUE, FAINT, GREEN, INK, MUTED, ORANGE, PURPLE, SKY, VERMILLION, YELLOW, styled

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from recsys_edu.distributed.planner.report import PlannedSharding

MOST_NAMED = 8  # tables that get a rectangle of their own; the others share one per sharding type
MOST_NUMBERED = 16  # ranks up to which every cell of the heat map carries its number
MOST_OUTLINED = 32  # ranks up to which bars have gaps and rectangles outlines: thinner ones would alias
SHADES = (1.0, 0.7, 0.85, 0.55)  # tell tables of one sharding type apart
PHASE_NAMES = {
    "fwd_compute": "lookup",
    "fwd_comms": "answers travel",
    "bwd_compute": "backward",
    "bwd_comms": "gradients travel",
    "input_dist_comms": "ids travel",
    "prefetch_compute": "prefetch",
}
PHASE_COLOURS = dict(zip(PHASES, (BLUE, SKY, ORANGE, YELLOW, GREEN, PURPLE)))
TYPE_COLOURS = {
    "table_wise": BLUE,
    "column_wise": SKY,
    "row_wise": ORANGE,
    "table_row_wise": VERMILLION,
    "table_column_wise": GREEN,
    "grid_shard": PURPLE,
    "data_parallel": MUTED,
}


def _memory_kind(plan: PlannedSharding) -> tuple[int, str]:
    return (1, "host memory") if plan.topology.compute_device == "cpu" else (0, "HBM")


def plan_figure(plan: PlannedSharding) -> Figure:
    """Ranks across, resources down: the share of the memory in use, and the share of the busiest rank's time.

    A good plan is even along the line "all of it"; a dark cell elsewhere shows what that rank is busy with.
    """
    import plotly.graph_objects as go

    kind, memory = _memory_kind(plan)
    caps_W = np.maximum([(d.storage.hbm, d.storage.ddr)[kind] for d in plan.usable.devices], 1)
    phases_WP, cost = plan.phases_WP, plan.cost_ms
    lines = {f"{memory} in use": plan.used_bytes_W2[:, kind] / caps_W}
    if kind == 0 and plan.used_bytes_W2[:, 1].any():
        lines["host memory in use"] = plan.used_bytes_W2[:, 1] / [max(d.storage.ddr, 1) for d in plan.usable.devices]
    lines["time: all of it"] = phases_WP[:, COUNTED].sum(axis=1) / cost
    for p in COUNTED:
        if phases_WP[:, p].any():
            lines[f"time: {PHASE_NAMES[PHASES[p]]}"] = phases_WP[:, p] / cost
    shares = np.stack(list(lines.values())[::-1])
    names, world = list(lines)[::-1], shares.shape[1]
    figure = go.Figure(
        go.Heatmap(
            z=shares * 100,
            x=list(range(world)),
            y=names,
            zmin=0,
            zmax=100,
            colorscale=[[0, "#FFFFFF"], [0.5, SKY], [1, BLUE]],
            colorbar={"title": "%", "thickness": 14},
            text=[[f"{share:.0%}" for share in line] for line in shares] if world <= MOST_NUMBERED else None,
            texttemplate="%{text}" if world <= MOST_NUMBERED else None,
            hovertemplate="rank %{x}<br>%{y}: %{z:.1f}%<extra></extra>",
        )
    )
    note = f"memory: of what is left for tables; time: of the busiest rank's {cost:.3g} ms per step"
    styled(figure, f"How full and how busy every rank is<br>{note}", "rank", height=190 + 42 * len(names))
    figure.update_layout(margin={"l": 150, "t": 90})
    figure.update_xaxes(showgrid=False, **({"dtick": 1} if world <= MOST_NUMBERED else {}))  # there is no rank 0.5
    figure.update_yaxes(showgrid=False)
    return figure


def tables_figure(plan: PlannedSharding) -> Figure:
    """The memory of every rank as rectangles: the largest tables by name, the others together by sharding type."""
    import plotly.graph_objects as go

    placement, (kind, memory) = plan.found.placement, _memory_kind(plan)
    problem, world = placement.problem, placement.problem.world_size
    grid = problem.grid
    named: dict[str, tuple[float, str, np.ndarray]] = {}
    others: dict[str, np.ndarray] = {}
    total_U = problem.bytes_UJ2[np.arange(len(problem.units)), placement.choice_U].sum(axis=1)
    total_U = total_U * problem.count_UJ[np.arange(len(problem.units)), placement.choice_U]
    largest = set(np.argsort(-total_U, kind="stable")[:MOST_NAMED].tolist())
    for unit, tables in enumerate(problem.units):
        column, bytes_W = int(placement.choice_U[unit]), np.zeros(world)
        np.add.at(bytes_W, placement.ranks_U[unit], problem.bytes_UJ2[unit, column, kind])
        sharding_type, kernel = grid.pairs[column]
        if unit in largest:
            name = " + ".join(grid.workload.tables[i].name for i in tables[:2]) + (" ..." if len(tables) > 2 else "")
            name = f"cache of {name}" if kernel in CACHED_KERNELS else name
            named[f"{name}, {sharding_type}"] = (-float(bytes_W.sum()), sharding_type, bytes_W)
        else:
            others[sharding_type] = others.get(sharding_type, np.zeros(world)) + bytes_W
    figure = go.Figure()
    shade = dict.fromkeys(TYPE_COLOURS, 0)
    for name, (_, sharding_type, bytes_W) in sorted(named.items(), key=lambda item: item[1][0]):
        _stack(figure, name, TYPE_COLOURS[sharding_type], bytes_W, SHADES[shade[sharding_type] % len(SHADES)])
        shade[sharding_type] += 1
    for sharding_type, bytes_W in others.items():
        label = f"other tables, {sharding_type}" if named else sharding_type
        _stack(figure, label, TYPE_COLOURS[sharding_type], bytes_W)
    caps_W = [(d.storage.hbm, d.storage.ddr)[kind] for d in plan.usable.devices]
    fullest = plan.used_bytes_W2[:, kind].max()
    shown = max(caps_W) < 3 * fullest  # else the line would flatten everything below it
    note = f"{show_bytes(max(caps_W))} of {memory} per rank {'(dotted) ' if shown else ''}is left for tables"
    if kind == 0 and plan.used_bytes_W2[:, 1].any():
        note += f"; besides, up to {show_bytes(plan.used_bytes_W2[:, 1].max())} of host memory"
    styled(figure, f"What every rank holds<br>{note}", "rank", "GiB", height=460)
    ranks = np.arange(world)
    edges, levels = np.stack([ranks - 0.5, ranks + 0.5], axis=1).ravel(), np.repeat(caps_W, 2) / 2**30
    if shown:
        line = {"color": INK, "dash": "dot", "width": 1.5}
        figure.add_trace(go.Scatter(x=edges, y=levels, mode="lines", line=line, name="there", hoverinfo="skip"))
    bargap = 0 if world > MOST_OUTLINED else 0.15
    figure.update_layout(barmode="stack", bargap=bargap, legend={"traceorder": "reversed"})
    return figure


def _stack(figure: Figure, name: str, colour: str, bytes_W: np.ndarray, shade: float = 1.0) -> None:
    import plotly.graph_objects as go

    figure.add_trace(
        go.Bar(
            x=list(range(len(bytes_W))),
            y=bytes_W / 2**30,
            name=name,
            marker={
                "color": _shaded(colour, shade),
                "line": {"color": "#FFFFFF", "width": 0.8 if len(bytes_W) <= MOST_OUTLINED else 0},
            },
            customdata=[show_bytes(b) for b in bytes_W],
            hovertemplate=f"rank %{{x}}<br>{name}: %{{customdata}}<extra></extra>",
        )
    )


def _shaded(colour: str, share: float) -> str:
    """Of "#RRGGBB", so much with white."""
    parts = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(255 - share * (255 - part)):02X}" for part in parts)


def times_figure(plan: PlannedSharding) -> Figure:
    """Milliseconds of every rank in a step, phase by phase; the bound is what the busiest rank takes at least."""
    import plotly.graph_objects as go

    phases_WP = plan.phases_WP
    figure = go.Figure()
    for p in COUNTED:
        if phases_WP[:, p].any():
            figure.add_trace(
                go.Bar(
                    x=list(range(len(phases_WP))),
                    y=phases_WP[:, p],
                    name=PHASE_NAMES[PHASES[p]],
                    marker={"color": PHASE_COLOURS[PHASES[p]], "line": {"width": 0}},
                    hovertemplate="rank %{x}: %{y:.4g} ms<extra>" + PHASE_NAMES[PHASES[p]] + "</extra>",
                )
            )
    figure.add_hline(y=plan.lower_bound_ms, line={"color": INK, "dash": "dot", "width": 1.5})
    note = (
        f"the busiest rank takes {plan.cost_ms:.4g} ms; the dotted line, {plan.lower_bound_ms:.4g} ms, is what it "
        "takes at least in any plan"
    )
    styled(figure, f"How long every rank works<br>{note}", "rank", "ms per step", height=430)
    figure.update_layout(barmode="stack", bargap=0 if len(phases_WP) > MOST_OUTLINED else 0.15)
    return figure


def pareto_points(plan: PlannedSharding) -> list[tuple[float, float]]:
    """(bytes of the fullest rank, milliseconds of the busiest) of plans that weigh memory more and more."""
    problem, (kind, _) = plan.found.placement.problem, _memory_kind(plan)
    scale = float(np.where(problem.valid_UJ, problem.work_UJ, np.inf).min(axis=1).sum())
    heights = np.unique(problem.ms_UJ[problem.valid_UJ])
    floor = np.where(problem.valid_UJ, problem.ms_UJ, np.inf).min(axis=1).max()
    heights = heights[heights >= floor]
    picked = heights[np.unique(np.linspace(0, len(heights) - 1, 10).round().astype(int))]
    points = {(float(plan.used_bytes_W2[:, kind].max()), plan.cost_ms)}
    for price in PRICES:
        for ceiling in picked:
            for share in SHARES:
                placed = place_all(problem, choose(problem, float(ceiling), price * scale, share), by_memory=True)
                if not isinstance(placed, int):
                    used_W = (problem.caps_W2 - placed.free_W2)[:, kind]
                    points.add((float(used_W.max()), placed.cost_ms))
    return sorted(points)


def pareto_figure(plan: PlannedSharding) -> Figure:
    """Memory against time: each dot is a plan for the same model; on the line none is better in both."""
    import plotly.graph_objects as go

    points, front = pareto_points(plan), []
    for used, cost in points:
        if not front or cost < front[-1][1]:
            front.append((used, cost))
    kind, memory = _memory_kind(plan)
    figure = go.Figure()
    hover = "%{x:.3g} GiB, %{y:.4g} ms<extra></extra>"
    figure.add_trace(
        go.Scatter(
            x=[used / 2**30 for used, _ in points],
            y=[cost for _, cost in points],
            mode="markers",
            marker={"color": FAINT, "size": 9, "line": {"color": MUTED, "width": 1}},
            name="plans",
            hovertemplate=hover,
        )
    )
    figure.add_trace(
        go.Scatter(
            x=[used / 2**30 for used, _ in front],
            y=[cost for _, cost in front],
            mode="lines+markers",
            line={"color": BLUE, "shape": "hv"},
            marker={"size": 9},
            name="none is better in both",
            hovertemplate=hover,
        )
    )
    figure.add_trace(
        go.Scatter(
            x=[plan.used_bytes_W2[:, kind].max() / 2**30],
            y=[plan.cost_ms],
            mode="markers",
            marker={"color": VERMILLION, "size": 14, "symbol": "star"},
            name="the plan",
            hovertemplate=hover,
        )
    )
    styled(
        figure,
        "What memory buys<br>each dot is a plan for the same model and machines",
        f"GiB of {memory} on the fullest rank",
        "ms per step of the busiest rank",
        height=430,
    )
    figure.update_yaxes(rangemode="tozero")
    return figure
