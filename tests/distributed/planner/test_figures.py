"""Figures of plans: the numbers in them are the plan's."""

from __future__ import annotations

import numpy as np
import pytest
from planner_cases import collection, plan_for, random_shapes

pytest.importorskip("plotly")

from recsys_edu.viz.plan import pareto_figure, pareto_points, plan_figure, tables_figure, times_figure


def test_heat_map_shows_the_busiest_rank_full() -> None:
    plan = plan_for(collection(random_shapes(5, 9)), 4, 2)
    heat = plan_figure(plan).data[0]
    line = dict(zip(heat.y, np.array(heat.z)))
    assert line["time: all of it"].max() == pytest.approx(100)
    assert line["HBM in use"].max() <= 100
    assert plan.figure().data[0].y == heat.y


def test_bars_add_up_to_the_plans_memory_and_time() -> None:
    for device in ("cuda", "cpu"):
        plan = plan_for(collection(random_shapes(5, 12)), 4, 2, device=device)
        held = sum(np.array(bar.y) for bar in tables_figure(plan).data if bar.type == "bar") * 2**30
        np.testing.assert_allclose(held, plan.used_bytes_W2[:, 1 if device == "cpu" else 0])
        busy = sum(np.array(bar.y) for bar in times_figure(plan).data)
        assert busy.max() == pytest.approx(plan.cost_ms)


def test_pareto_has_the_plan_and_a_falling_front() -> None:
    plan = plan_for(collection(random_shapes(5, 9)), 4, 2)
    points = pareto_points(plan)
    assert (plan.used_bytes_W2[:, 0].max(), plan.cost_ms) in points and len(points) > 3
    front = pareto_figure(plan).data[1]
    assert list(front.x) == sorted(front.x) and list(front.y) == sorted(front.y, reverse=True)
