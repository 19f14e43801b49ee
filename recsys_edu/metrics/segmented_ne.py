"""Normalised entropy of each group of examples, for example one per country or per age of the model.

A column of group numbers comes with each batch; several such columns can be watched at once.

Counterpart: torchrec.metrics.segmented_ne
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recsys_edu.metrics.metrics_namespace import MetricName, MetricNamespace
from recsys_edu.metrics.ne import ETA, compute_cross_entropy, compute_logloss, compute_ne
from recsys_edu.metrics.rec_metric import RecMetric, RecMetricException, SumMetricComputation, required_input

SUMS = ("cross_entropy_sum", "weighted_num_samples", "pos_labels", "neg_labels")


@dataclass
class GroupingKeyConfig:
    """One column of group numbers 0 .. num_groups - 1; ``cast_keys_to_int`` accepts a float column."""

    name: str
    num_groups: int = 1
    cast_keys_to_int: bool = False


def grouping_configs(
    grouping_keys: str | Sequence[str | dict[str, Any] | GroupingKeyConfig], num_groups: int, cast_keys_to_int: bool
) -> list[GroupingKeyConfig]:
    """Whatever way the columns were named, one config each.

    >>> grouping_configs("country", 3, False)
    [GroupingKeyConfig(name='country', num_groups=3, cast_keys_to_int=False)]
    """
    given = [grouping_keys] if isinstance(grouping_keys, str) else list(grouping_keys)
    configs = []
    for key in given:
        if isinstance(key, str):
            key = GroupingKeyConfig(key, num_groups, cast_keys_to_int)
        configs.append(key if isinstance(key, GroupingKeyConfig) else GroupingKeyConfig(**key))
    return configs


def get_segemented_ne_states(
    labels: Tensor, predictions: Tensor, weights: Tensor, grouping_keys: Tensor, eta: float, num_groups: int
) -> dict[str, Tensor]:
    """NE's sums per group, ``[T, G]`` each, from tensors ``[T, B]`` and group numbers ``[B]``."""
    terms = (
        compute_cross_entropy(labels, predictions, weights, eta),
        weights,
        weights * labels,
        weights * (1 - labels),
    )
    zeros_TG = torch.zeros(len(labels), num_groups, dtype=torch.float64, device=labels.device)
    return {name: zeros_TG.index_add(1, grouping_keys, term.double()) for name, term in zip(SUMS, terms)}


class SegmentedNEMetricComputation(SumMetricComputation):
    """NE's sums by group; with several columns each state has the column's name in front."""

    def __init__(
        self,
        *args: Any,
        include_logloss: bool = False,
        num_groups: int = 1,
        grouping_keys: str | list[str] | list[dict[str, Any]] | list[GroupingKeyConfig] = "grouping_keys",
        cast_keys_to_int: bool = False,
        **kwargs: Any,
    ) -> None:
        configs = grouping_configs(grouping_keys, num_groups, cast_keys_to_int)
        is_one = isinstance(grouping_keys, str)
        widths = {f"{'' if is_one else f'{c.name}_'}{name}": c.num_groups for c in configs for name in SUMS}
        super().__init__(*args, state_names=tuple(widths), widths=widths, **kwargs)
        self._configs, self._is_one, self._include_logloss = configs, is_one, include_logloss

    def _prefix(self, config: GroupingKeyConfig) -> str:
        return "" if self._is_one else f"{config.name}_"

    def batch_sums(self, labels: Tensor, predictions: Tensor, weights: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        sums = {}
        for config in self._configs:
            groups_B = self._groups(required_input(kwargs, config.name, self).reshape(-1), config)
            found = get_segemented_ne_states(labels, predictions, weights, groups_B, ETA, config.num_groups)
            sums.update({f"{self._prefix(config)}{name}": value for name, value in found.items()})
        return sums

    @staticmethod
    def _groups(groups_B: Tensor, config: GroupingKeyConfig) -> Tensor:
        if groups_B.is_floating_point() and not config.cast_keys_to_int:
            raise RecMetricException(
                f"the group column {config.name!r} is {groups_B.dtype}: whole numbers are needed;"
                " pass cast_keys_to_int=True to cut off the fraction"
            )
        groups_B = groups_B.long()
        # host sync: a group outside the range would be counted elsewhere or crash a CUDA kernel
        if len(groups_B) and not 0 <= int(groups_B.min()) <= int(groups_B.max()) < config.num_groups:
            raise RecMetricException(
                f"the group column {config.name!r} has values from {int(groups_B.min())} to {int(groups_B.max())};"
                f" expected 0 to {config.num_groups - 1} (num_groups={config.num_groups})"
            )
        return groups_B

    def values(self, sums: dict[str, Tensor]) -> dict[Any, Tensor]:
        values: dict[Any, Tensor] = {}
        for config in self._configs:
            ce, count, pos, neg = (sums[f"{self._prefix(config)}{name}"] for name in SUMS)
            found = {MetricName.SEGMENTED_NE: compute_ne(ce, count, pos, neg, ETA)}
            if self._include_logloss:
                found[MetricName.LOG_LOSS] = compute_logloss(ce, pos, neg, ETA)
            column = "" if self._is_one else f"@{config.name}"
            for name, value_TG in found.items():
                values.update({(name, f"_{g}{column}"): value_TG[:, g] for g in range(config.num_groups)})
        return values


class SegmentedNEMetric(RecMetric):
    """``segmented_ne-<task>|lifetime_segmented_ne_<group>`` and ``|window_...``; ``...@<column>`` with several columns.

    Needs the group columns.
    """

    _namespace = MetricNamespace.SEGMENTED_NE
    _computation_class = SegmentedNEMetricComputation

    @staticmethod
    def _needed_columns(kwargs: dict[str, Any]) -> set[str]:
        return {config.name for config in grouping_configs(kwargs.get("grouping_keys", "grouping_keys"), 1, False)}
