"""The shape every metric has: sums over examples, a lifetime and a window of them, and a ratio at the end.

    update(batch)                          compute()
      per-example terms                      sync: add the sums of all ranks
      -> sums, one number per task           -> ratio of lifetime sums   "ne-click|lifetime_ne"
      -> add to the lifetime sums            -> ratio of window sums     "ne-click|window_ne"
      -> add to the window sums, drop the oldest batches

Sums add up over batches and over ranks; ratios do not. That is why only sums are stored, and why the value after
`compute` is the value over all examples of all ranks, not a mean of means. They are kept in float64: in float32 a
sum of ones stops growing at 16,777,216.

A new metric of this kind is a `SumMetricComputation` with a tuple of state names and two functions, and a two-line
`RecMetric`. Metrics that need the examples themselves (AUC) use `ExampleWindowComputation`.

Shapes: T tasks of one computation (1 in unfused mode), B examples of one batch.

Counterpart: torchrec.metrics.rec_metric
"""

from __future__ import annotations

import abc
import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torchmetrics import Metric

from recsys_edu.metrics.metrics_config import RecComputeMode, RecTaskInfo
from recsys_edu.metrics.metrics_namespace import (
    MetricNameBase,
    MetricNamespaceBase,
    MetricPrefix,
    compose_metric_key,
)

MAX_BUFFER_COUNT = 1000


class RecMetricException(Exception):
    """A metric was set up or fed in a way it cannot work with."""


@dataclass  # not frozen: torchmetrics refuses frozen dataclasses as results
class MetricComputationReport:
    """One value per task, before it gets its key."""

    name: MetricNameBase
    metric_prefix: MetricPrefix
    value: Tensor
    description: str | None = None


class WindowBuffer:
    """Remembers the sums of the last batches, so that a window can forget the oldest ones.

    >>> window, buffer = torch.zeros(1), WindowBuffer(max_size=8, max_buffer_count=100)
    >>> for batch_sum in (1.0, 2.0, 3.0):
    ...     buffer.aggregate_state(window, torch.tensor([batch_sum]), size=4)
    >>> window  # 8 examples are the last two batches
    tensor([5.])

    To bound memory, small batches share an entry of up to ``max_size / max_buffer_count`` examples and are forgotten
    together. The newest entry is always kept, even when it alone is larger than the window.
    """

    def __init__(self, max_size: int, max_buffer_count: int) -> None:
        self._max_size = max_size
        self._max_entry_size = max_size // max_buffer_count
        self._buffers: deque[Tensor] = deque()
        self._sizes: deque[int] = deque()

    @property
    def buffers(self) -> deque[Tensor]:
        return self._buffers

    def aggregate_state(self, window_state: Tensor, curr_state: Tensor, size: int) -> None:
        """Add ``curr_state``, the sums of ``size`` examples, to ``window_state`` in place and drop what is too old."""
        if self._sizes and self._sizes[-1] + size <= self._max_entry_size:
            self._buffers[-1] = self._buffers[-1] + curr_state
            self._sizes[-1] += size
        else:
            self._buffers.append(curr_state.detach().clone())
            self._sizes.append(size)
        window_state += curr_state
        while sum(self._sizes) > self._max_size and len(self._sizes) > 1:
            window_state -= self._buffers.popleft()
            self._sizes.popleft()


class RecMetricComputation(Metric, abc.ABC):
    """A torchmetrics metric for ``n_tasks`` tasks at once; inputs are ``[T, B]``, states ``[T]``.

    torchmetrics brings the states, their sync over the process group and the way back to local ones.
    ``window_size`` is in examples of this rank. Only rank 0 reports, unless ``compute_on_all_ranks``.
    """

    def __init__(
        self,
        my_rank: int,
        batch_size: int,
        n_tasks: int,
        window_size: int,
        compute_on_all_ranks: bool = False,
        should_validate_update: bool = False,
        compute_mode: RecComputeMode = RecComputeMode.UNFUSED_TASKS_COMPUTATION,
        process_group: ProcessGroup | None = None,
        fused_update_limit: int = 0,
        allow_missing_label_with_zero_weight: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        if kwargs or args:
            raise RecMetricException(f"{type(self).__name__} does not know the arguments {[*args, *kwargs]}")
        _refuse_fused_updates(fused_update_limit)
        super().__init__(process_group=process_group)
        self._my_rank = my_rank
        self._batch_size = batch_size
        self._n_tasks = n_tasks
        self._window_size = window_size
        self._compute_on_all_ranks = compute_on_all_ranks
        self._should_validate_update = should_validate_update
        self._compute_mode = compute_mode
        self._allow_missing_label_with_zero_weight = allow_missing_label_with_zero_weight

    @staticmethod
    def get_window_state_name(state_name: str) -> str:
        return f"window_{state_name}"

    def get_window_state(self, state_name: str) -> Tensor:
        return getattr(self, self.get_window_state_name(state_name))

    def pre_compute(self) -> None:
        """Called on every rank before the sync; for a computation that must settle something first."""

    @abc.abstractmethod
    def update(self, *, predictions: Tensor | None, labels: Tensor, weights: Tensor | None, **kwargs: Any) -> None: ...

    @abc.abstractmethod
    def _compute(self) -> list[MetricComputationReport]: ...

    def compute(self) -> list[MetricComputationReport]:
        """The values over all ranks: torchmetrics syncs the states before and restores them after."""
        return self._compute() if self._my_rank == 0 or self._compute_on_all_ranks else []

    def local_compute(self) -> list[MetricComputationReport]:
        """The values over this rank's examples only."""
        return self._compute()


class SumMetricComputation(RecMetricComputation):
    """A metric that is a function of sums. Subclasses say which sums, how a batch adds to them, and the function.

    Every state is a buffer ``[T]`` float64 under its own name, saved in the state dict, plus a ``window_...`` one that
    is not saved: after a restart the window fills anew. ``state_names`` and, for states that hold several numbers per
    task (``[T, width]``), ``widths`` may also be given to the constructor, where they depend on arguments.
    """

    state_names: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        *args: Any,
        state_names: tuple[str, ...] | None = None,
        widths: Mapping[str, int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if state_names is not None:
            self.state_names = state_names
        if self._should_validate_update:
            seen = torch.zeros(self._n_tasks, dtype=torch.uint8)
            self.add_state("has_valid_update", seen, dist_reduce_fx="max", persistent=True)
        self._window_buffers: dict[str, WindowBuffer] = {}
        for name in self.state_names:
            shape = (self._n_tasks, widths[name]) if widths and name in widths else (self._n_tasks,)
            zeros_T = torch.zeros(shape, dtype=torch.float64)
            self.add_state(name, zeros_T.clone(), dist_reduce_fx="sum", persistent=True)
            self.add_state(self.get_window_state_name(name), zeros_T, dist_reduce_fx="sum", persistent=False)
            self._window_buffers[name] = WindowBuffer(self._window_size, MAX_BUFFER_COUNT)

    @abc.abstractmethod
    def batch_sums(self, labels: Tensor, predictions: Tensor, weights: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        """The sums of one batch: ``[T, B]`` float64 in, one ``[T]`` tensor per state name out."""

    @abc.abstractmethod
    def values(self, sums: dict[str, Tensor]) -> dict[MetricNameBase | tuple[MetricNameBase, str], Tensor]:
        """From sums ``[T]`` to values ``[T]``; a key with a description is ``(name, description)``."""

    def update(self, *, predictions: Tensor | None, labels: Tensor, weights: Tensor | None, **kwargs: Any) -> None:
        labels_TB = labels.double()
        predictions_TB = None if predictions is None else predictions.double()
        weights_TB = torch.ones_like(labels_TB) if weights is None else weights.double()
        sums = self.batch_sums(labels_TB, predictions_TB, weights_TB, **kwargs)
        if self._should_validate_update:
            valid_T = (weights_TB != 0).any(dim=-1)
            self.has_valid_update |= valid_T.to(torch.uint8)
            sums = {
                name: torch.where(_like(valid_T, sum_T), sum_T, torch.zeros_like(sum_T)) for name, sum_T in sums.items()
            }
        for name in self.state_names:
            getattr(self, name).add_(sums[name])
            self._window_buffers[name].aggregate_state(self.get_window_state(name), sums[name], labels.shape[1])

    def _compute(self) -> list[MetricComputationReport]:
        lifetime = self.values({name: getattr(self, name) for name in self.state_names})
        window = self.values({name: self.get_window_state(name) for name in self.state_names})
        reports = []
        for prefix, values in ((MetricPrefix.LIFETIME, lifetime), (MetricPrefix.WINDOW, window)):
            for key, value_T in values.items():
                name, description = key if type(key) is tuple else (key, None)
                if self._should_validate_update:
                    seen_T = _like(self.has_valid_update.bool(), value_T)
                    value_T = torch.where(seen_T, value_T, torch.zeros_like(value_T))
                reports.append(MetricComputationReport(name, prefix, value_T, description))
        return reports

    def reset(self) -> None:
        super().reset()
        for name in self.state_names:
            self._window_buffers[name] = WindowBuffer(self._window_size, MAX_BUFFER_COUNT)


def _like(flag_T: Tensor, other: Tensor) -> Tensor:
    """A flag per task, with as many dimensions as `other`."""
    return flag_T.reshape(flag_T.shape + (1,) * (other.dim() - flag_T.dim()))


class ExampleWindowComputation(RecMetricComputation):
    """A metric that needs the examples themselves: it keeps those of the window, and reports no lifetime value.

    The list states ``predictions``, ``labels``, ``weights`` (and any of ``extra_states``) hold one tensor per batch,
    ``[B, T]``: the example dimension first, which is the one torchmetrics concatenates over batches and ranks.
    """

    def __init__(self, *args: Any, extra_states: tuple[str, ...] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._example_states = ("predictions", "labels", "weights", *extra_states)
        for name in self._example_states:
            self.add_state(name, [], dist_reduce_fx="cat", persistent=False)

    def update(self, *, predictions: Tensor | None, labels: Tensor, weights: Tensor | None, **kwargs: Any) -> None:
        weights = torch.ones_like(labels) if weights is None else weights
        for name, value_TB in (("predictions", predictions), ("labels", labels), ("weights", weights)):
            getattr(self, name).append(value_TB.detach().double().T)
        for name in self._example_states[3:]:
            getattr(self, name).append(required_input(kwargs, name, self).detach().long().reshape(-1, 1))
        surplus = sum(len(batch) for batch in self.labels) - self._window_size
        while surplus > 0:
            dropped = min(surplus, len(self.labels[0]))
            for name in self._example_states:
                oldest, *newer = getattr(self, name)
                setattr(self, name, [oldest[dropped:], *newer] if dropped < len(oldest) else newer)
            surplus -= dropped

    def sync(self, *args: Any, **kwargs: Any) -> None:
        # A rank without examples must still take part in the gather, with an empty tensor of the right width.
        for name in self._example_states:
            if isinstance(getattr(self, name), list) and not getattr(self, name):
                extra = name in self._example_states[3:]
                width, dtype = (1, torch.int64) if extra else (self._n_tasks, torch.float64)
                getattr(self, name).append(torch.zeros(0, width, dtype=dtype, device=self.device))
        super().sync(*args, **kwargs)

    def examples(self, name: str) -> Tensor:
        """The window of one state as ``[T, N]``, whether synced (a tensor) or local (a list of batches)."""
        state = getattr(self, name)
        if isinstance(state, Tensor):
            return state.T
        return torch.cat(list(state)).T if state else torch.zeros(self._n_tasks, 0, dtype=torch.float64)


def required_input(kwargs: dict[str, Any], key: str, computation: RecMetricComputation) -> Tensor:
    """The extra column ``key`` of ``update(..., required_inputs={key: tensor})``."""
    required = kwargs.get("required_inputs") or {}
    if key not in required:
        raise RecMetricException(
            f"{type(computation).__name__} needs the column {key!r}: pass update(...,"
            f" required_inputs={{{key!r}: tensor}}); got the columns {sorted(required)}"
        )
    return required[key]


class RecMetric(nn.Module, abc.ABC):
    """A metric over tasks: routes each task's tensors to a computation, and gives the values their keys.

    >>> from recsys_edu.metrics.ctr import CTRMetric
    >>> ctr = CTRMetric(world_size=1, my_rank=0, batch_size=4, tasks=[RecTaskInfo(name="click")])
    >>> labels, predictions = torch.tensor([1.0, 0, 0, 0]), torch.full((4,), 0.25)
    >>> ctr.update(predictions={"click": predictions}, labels={"click": labels}, weights=None)
    >>> ctr.compute()["ctr-click|lifetime_ctr"]
    tensor([0.2500], dtype=torch.float64)

    Unfused mode has one computation per task and wants dicts by task name; a task in none of the dicts is left out of
    that update. Fused mode has one computation whose tensors have a leading task dimension, and takes such tensors or
    dicts that hold every task.

    Subclasses set ``_namespace`` and ``_computation_class``; ``_needs_predictions = False`` where labels or columns are
    enough, ``_values_per_example = True`` where an example's prediction or label is a row, ``[B, C]`` per task. Further
    keyword arguments go to the computation.

    Raises ValueError for a batch larger than this rank's share of the window, RecMetricException for no tasks, for a
    task without labels or predictions, or with shapes that differ.
    """

    _namespace: MetricNamespaceBase
    _computation_class: type[RecMetricComputation]
    _needs_predictions: ClassVar[bool] = True
    _values_per_example: ClassVar[bool] = False

    def __init__(
        self,
        world_size: int,
        my_rank: int,
        batch_size: int,
        tasks: list[RecTaskInfo],
        compute_mode: RecComputeMode = RecComputeMode.UNFUSED_TASKS_COMPUTATION,
        window_size: int = 100,
        fused_update_limit: int = 0,
        compute_on_all_ranks: bool = False,
        should_validate_update: bool = False,
        process_group: ProcessGroup | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        local_window_size = math.ceil(window_size / world_size)
        if not tasks:
            raise RecMetricException(f"{type(self).__name__} needs at least one task")
        _refuse_fused_updates(fused_update_limit)
        if local_window_size < batch_size:
            raise ValueError(
                f"a window of {window_size} examples over {world_size} ranks is {local_window_size} on each,"
                f" less than one batch of {batch_size}: make window_size at least {batch_size * world_size}"
            )
        self._tasks = tasks
        self._fused = compute_mode is not RecComputeMode.UNFUSED_TASKS_COMPUTATION
        self._required_inputs: set[str] = self._needed_columns(kwargs) | self._columns_of_tasks(tasks)
        groups = [tasks] if self._fused else [[task] for task in tasks]
        self._metrics_computations = nn.ModuleList(
            self._computation_class(
                my_rank,
                batch_size,
                len(group),
                local_window_size,
                compute_on_all_ranks,
                should_validate_update,
                compute_mode,
                process_group,
                **self._task_kwargs(group, kwargs),
            )
            for group in groups
        )

    @staticmethod
    def _needed_columns(kwargs: dict[str, Any]) -> set[str]:
        """Columns beside label, prediction and weight; a metric overrides this when its arguments ask for some."""
        return set()

    @staticmethod
    def _columns_of_tasks(tasks: list[RecTaskInfo]) -> set[str]:
        """Further columns; a metric overrides this when its tasks name some."""
        return set()

    def _task_kwargs(self, tasks: list[RecTaskInfo], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The computation's own arguments; a metric overrides this when they depend on the tasks."""
        return kwargs

    def update(
        self,
        *,
        predictions: Tensor | dict[str, Tensor],
        labels: Tensor | dict[str, Tensor],
        weights: Tensor | dict[str, Tensor] | None,
        **kwargs: Any,
    ) -> None:
        """Add one batch; weights None means that every example counts once."""
        with torch.no_grad():
            if self._fused:
                inputs = (self._stack("predictions", predictions), self._stack("labels", labels))
                self._update_one(0, self._tasks, *inputs, self._stack("weights", weights), kwargs)
                return
            for index, task in enumerate(self._tasks):
                inputs = [_of_task(values, task, self._tasks) for values in (predictions, labels, weights)]
                if any(value is not None for value in inputs):
                    rows = [None if value is None else self._as_rows(value, (1,)) for value in inputs]
                    self._update_one(index, [task], *rows, kwargs)

    def _update_one(self, index, tasks, predictions, labels, weights, kwargs) -> None:
        names = [task.name for task in tasks]
        if labels is None or (predictions is None and self._needs_predictions):
            raise RecMetricException(
                f"{self._namespace} of {names} got no {'labels' if labels is None else 'predictions'}"
            )
        compared = 2 if self._values_per_example else None  # [T, B]; what is behind it is the computation's matter
        shapes = {tuple(value.shape[:compared]) for value in (predictions, labels, weights) if value is not None}
        if len(shapes) > 1 or labels.shape[0] != len(tasks):
            got = {
                k: tuple(v.shape)
                for k, v in zip(("predictions", "labels", "weights"), (predictions, labels, weights))
                if v is not None
            }
            raise RecMetricException(
                f"{self._namespace} of {names} wants predictions, labels and weights of shape"
                f" [{len(tasks)}, B]; got {got}"
            )
        if labels.shape[1]:
            self._metrics_computations[index].update(predictions=predictions, labels=labels, weights=weights, **kwargs)

    def _stack(self, what: str, values: Tensor | dict[str, Tensor] | None) -> Tensor | None:
        if not isinstance(values, dict):
            if values is None or self._values_per_example:
                return values
            return values.reshape(len(self._tasks), -1)
        missing = [task.name for task in self._tasks if task.name not in values]
        if missing:
            raise RecMetricException(f"fused {self._namespace} needs {what} of every task; missing {missing}")
        return torch.stack([self._as_rows(values[task.name], ()) for task in self._tasks])

    def _as_rows(self, values: Tensor, tasks: tuple[int, ...]) -> Tensor:
        """``[*tasks, B]``, or ``[*tasks, B, C]`` where an example has several values."""
        if not self._values_per_example:
            return values.reshape(*tasks, -1)
        return values.reshape(*tasks, *values.shape[-2:]) if values.dim() > 1 else values.reshape(*tasks, -1)

    def _keyed(self, method: str) -> dict[str, Tensor]:
        groups = [self._tasks] if self._fused else [[task] for task in self._tasks]
        result = {}
        for tasks, computation in zip(groups, self._metrics_computations):
            computation.pre_compute()
            for report in getattr(computation, method)():
                value_T = report.value
                if value_T.dim() < 2:
                    value_T = value_T.reshape(-1)  # some torchmetrics versions squeeze a single value
                for task, value in zip(tasks, value_T.unbind(0) if self._fused else [value_T]):
                    prefix, description = report.metric_prefix, report.description
                    result[compose_metric_key(self._namespace, task.name, report.name, prefix, description)] = value
        return result

    def compute(self) -> dict[str, Tensor]:
        """The values over all ranks, by key; every rank has to call it. Empty except on rank 0, see above."""
        return self._keyed("compute")

    def local_compute(self) -> dict[str, Tensor]:
        """The values over this rank's examples, by key; no communication."""
        return self._keyed("local_compute")

    def sync(self) -> None:
        """Replace the states by those over all ranks, until `unsync`."""
        for computation in self._metrics_computations:
            computation.sync()

    def unsync(self) -> None:
        """Back to this rank's own states."""
        for computation in self._metrics_computations:
            if computation._is_synced:
                computation.unsync()

    def reset(self) -> None:
        for computation in self._metrics_computations:
            computation.reset()

    def state_dict(
        self, destination: dict[str, Tensor] | None = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Tensor]:
        """The lifetime sums by name; unlike nn.Module's, the arguments may also be given by position."""
        return super().state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)

    def get_required_inputs(self) -> set[str]:
        """Columns of the model output that `update` needs besides label, prediction and weight."""
        return self._required_inputs

    def clone_update_inputs(self, predictions, labels, weights, **kwargs):
        """Copies of what `update` takes, for a caller that overwrites its tensors while the update is still to come."""
        return _clone(predictions), _clone(labels), _clone(weights), {key: _clone(v) for key, v in kwargs.items()}

    def get_memory_usage(self) -> dict[Tensor, int]:
        """Every tensor the metric holds, with its bytes."""
        return {t: t.numel() * t.element_size() for c in self._metrics_computations for t in _state_tensors(c)}


def _refuse_fused_updates(fused_update_limit: int) -> None:
    if fused_update_limit:
        raise RecMetricException(
            f"fused_update_limit={fused_update_limit} is not supported: updates are applied at once; leave it at 0"
        )


def _of_task(values: Tensor | dict[str, Tensor] | None, task: RecTaskInfo, tasks: list[RecTaskInfo]) -> Tensor | None:
    if isinstance(values, dict):
        return values.get(task.name)
    return None if values is None else values.reshape(len(tasks), -1)[tasks.index(task)]


def _clone(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _clone(item) for key, item in value.items()}
    return value.clone() if isinstance(value, Tensor) else value


def _state_tensors(computation: RecMetricComputation) -> Iterator[Tensor]:
    for name in computation._defaults:
        state = getattr(computation, name)
        yield from state if isinstance(state, list) else [state]
    for buffer in getattr(computation, "_window_buffers", {}).values():
        yield from buffer.buffers


class RecMetricList(nn.Module):
    """Several metrics that are updated and computed as one; has a length and can be indexed."""

    def __init__(self, rec_metrics: list[RecMetric]) -> None:
        super().__init__()
        self.rec_metrics = nn.ModuleList(rec_metrics)

    def __len__(self) -> int:
        return len(self.rec_metrics)

    def __getitem__(self, idx: int) -> nn.Module:
        return self.rec_metrics[idx]

    def get_required_inputs(self) -> list[str] | None:
        return sorted(set().union(*(metric.get_required_inputs() for metric in self.rec_metrics))) or None

    def update(self, *, predictions, labels, weights, **kwargs: Any) -> None:
        for metric in self.rec_metrics:
            metric.update(predictions=predictions, labels=labels, weights=weights, **kwargs)

    def compute(self) -> dict[str, Tensor]:
        return {key: value for metric in self.rec_metrics for key, value in metric.compute().items()}

    def local_compute(self) -> dict[str, Tensor]:
        return {key: value for metric in self.rec_metrics for key, value in metric.local_compute().items()}

    def sync(self) -> None:
        for metric in self.rec_metrics:
            metric.sync()

    def unsync(self) -> None:
        for metric in self.rec_metrics:
            metric.unsync()

    def reset(self) -> None:
        for metric in self.rec_metrics:
            metric.reset()
