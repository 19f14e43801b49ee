"""The figures show the numbers that the kernels make."""

from __future__ import annotations

import pytest
import torch

from recsys_edu.types import DataType
from recsys_edu.viz.quantization import cost_figure, grid_figure, row_error_figure, row_errors


def test_grid_figure_shows_one_type_at_a_time() -> None:
    row = torch.tensor([0.0, 0.4, 2.0, 3.0])
    figure = grid_figure(row)
    stored = [trace for trace in figure.data if trace.name == "as stored"]
    assert [list(trace.y) for trace in stored[:1]] == [[0.0, 0.0, 2.0, 3.0]]  # INT2: 0, 1, 2, 3
    assert [trace.visible for trace in stored] == [False, True, False]
    assert [step.label for step in figure.layout.sliders[0].steps] == ["INT2", "INT4", "INT8"]
    assert "INT4: 16 values" in figure.layout.title.text
    with pytest.raises(ValueError, match=r"one row of 4, 8, 12"):
        grid_figure(torch.rand(2, 4))


def test_row_error_figure_has_a_series_and_a_bound_per_type() -> None:
    weight = torch.randn(40, 8) * torch.logspace(-2, 0, 40)[:, None]
    weight[3] = 0  # exact in every type: not on a logarithmic axis
    figure = row_error_figure(weight, (DataType.INT8, DataType.INT4))
    points, bounds = figure.data[1::2], figure.data[0::2]
    assert [trace.name for trace in points] == ["INT8", "INT4"]
    for trace, bound in zip(points, bounds):
        assert len(trace.x) == 39 and all(error <= most for error, most in zip(trace.y, bound.y))
    errors, limits = row_errors(weight, DataType.INT8)
    assert bool((errors <= limits).all()) and errors[3] == 0


def test_cost_figure_draws_gates() -> None:
    figure = cost_figure({"INT8": (20.0, 1e-5), "INT4": (12.0, 1e-3)}, gates={"INT4": 0.005})
    assert list(figure.data[0].text) == ["INT8", "INT4"] and len(figure.layout.shapes) == 2
    assert figure.layout.annotations[0].text == "INT4: at most 0.005"
