"""From a model's output dict to the tensors that metrics take.

Counterpart: torchrec.metrics.model_utils
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recsys_edu.metrics.metrics_config import RecTaskInfo


def is_empty_signals(labels: Tensor, predictions: Tensor, weights: Tensor) -> bool:
    """Whether all three have no element: this batch has nothing for the task."""
    return labels.numel() == 0 and predictions.numel() == 0 and weights.numel() == 0


def parse_model_outputs(
    label_name: str, prediction_name: str, weight_name: str, model_out: dict[str, Tensor]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Label, prediction and weight, flattened to ``[B]``.

    Prediction and weight are None when their name is empty. Raises ValueError for a name that is not in the output,
    AssertionError for sizes that differ.
    """
    found: list[Tensor | None] = []
    for what, name in (("label", label_name), ("prediction", prediction_name), ("weight", weight_name)):
        if name not in model_out and (name or what == "label"):
            raise ValueError(f"{what} {name!r} is not in the model output, which has {sorted(model_out)}")
        found.append(model_out[name].squeeze() if name else None)
    label = found[0]
    for name, value in ((prediction_name, found[1]), (weight_name, found[2])):
        if value is not None and value.shape != label.shape:
            raise AssertionError(
                f"{name!r} has shape {tuple(value.shape)}, label {label_name!r} {tuple(label.shape)}: must be equal"
            )
    return tuple(None if value is None else value.reshape(-1) for value in found)


def session_ids_to_tensor(session_ids: list[str], device: torch.device | None = None) -> Tensor:
    """Number the runs of equal ids from 1.

    >>> session_ids_to_tensor(["a", "a", "b", "a"])
    tensor([1, 1, 2, 3])
    """
    changes = [int(i == 0 or session_ids[i] != session_ids[i - 1]) for i in range(len(session_ids))]
    return torch.tensor(changes, dtype=torch.int64, device=device).cumsum(0)


def parse_required_inputs(
    model_out: dict[str, Any],
    required_inputs_list: list[str],
    ndcg_transform_input: bool = False,
    device: torch.device | None = None,
) -> dict[str, Tensor]:
    """The extra columns that metrics asked for, flattened; ``ndcg_transform_input`` numbers session names.

    Raises KeyError for a column that is not in the output.
    """
    columns = {}
    for name in required_inputs_list:
        if name not in model_out:
            raise KeyError(f"a metric needs the column {name!r}; the model output has {sorted(model_out)}")
        value = model_out[name]
        if ndcg_transform_input and not isinstance(value, Tensor):
            value = session_ids_to_tensor(value, device)
        columns[name] = value.reshape(-1)
    return columns


def parse_task_model_outputs(
    tasks: list[RecTaskInfo], model_out: dict[str, Tensor], required_inputs_list: list[str] | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Labels, predictions and weights by task name, and the extra columns; empty tasks are left out.

    >>> out = {"label": torch.ones(2), "prediction": torch.zeros(2), "weight": torch.ones(2)}
    >>> labels, predictions, weights, _ = parse_task_model_outputs([RecTaskInfo(name="click")], out)
    >>> labels
    {'click': tensor([1., 1.])}
    """
    labels, predictions, weights = {}, {}, {}
    for task in tasks:
        label, prediction, weight = parse_model_outputs(
            task.label_name, task.prediction_name, task.weight_name, model_out
        )
        if label.numel():
            labels[task.name] = label
            if prediction is not None:
                predictions[task.name] = prediction
            if weight is not None:
                weights[task.name] = weight
    return labels, predictions, weights, parse_required_inputs(model_out, required_inputs_list or [])
