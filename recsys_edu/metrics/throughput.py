"""Examples per second, since the start, over the last seconds, and since this run began.

The first ``warmup_steps`` steps (caches, allocators, compilation) count as examples but not as time.

Counterpart: torchrec.metrics.throughput
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import torch
from torch import Tensor, nn

from recsys_edu.metrics.metrics_config import BatchSizeStage, validate_batch_size_stages
from recsys_edu.metrics.metrics_namespace import MetricName, MetricNamespace, MetricPrefix, compose_metric_key

MAX_WINDOW_TS = 2**18  # steps remembered at most, however long the window


class ThroughputMetric(nn.Module):
    """Counts ``batch_size * world_size`` examples per `update`, all ranks being assumed equal; no communication.

    >>> throughput = ThroughputMetric(batch_size=4, world_size=2, window_seconds=10, warmup_steps=1)
    >>> throughput.update()
    >>> throughput.compute()["throughput-throughput|total_examples"]
    tensor(8)

    ``batch_size_stages`` let the batch size change with the number of steps done. The buffers ``total_examples``,
    ``warmup_examples`` and ``time_lapse_after_warmup`` survive checkpoints; the window and "attempt" values start anew.

    Raises ValueError when ``window_seconds`` or ``warmup_steps`` is below 1.
    """

    _namespace = MetricNamespace.THROUGHPUT

    def __init__(
        self,
        *,
        batch_size: int,
        world_size: int,
        window_seconds: int,
        warmup_steps: int = 100,
        batch_size_stages: list[BatchSizeStage] | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("window_seconds", window_seconds), ("warmup_steps", warmup_steps)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        validate_batch_size_stages(batch_size_stages)
        self._batch_size = batch_size
        self._world_size = world_size
        self._window_seconds = window_seconds
        self._warmup_steps = warmup_steps
        self._stages = list(batch_size_stages or [])
        self._steps = 0  # of this run
        self._attempt_examples = self._attempt_warmup_examples = 0
        self._attempt_seconds = 0.0
        self._previous_ts = 0.0
        self._window: deque[tuple[float, int]] = deque(maxlen=MAX_WINDOW_TS)  # (seconds, examples) of recent steps
        self._window_seconds_used, self._window_examples = 0.0, 0
        self.register_buffer("total_examples", torch.tensor(0, dtype=torch.int64))
        self.register_buffer("warmup_examples", torch.tensor(0, dtype=torch.int64))
        self.register_buffer("time_lapse_after_warmup", torch.tensor(0.0, dtype=torch.float64))
        if self._stages:
            self.register_buffer("num_batch", torch.tensor(0, dtype=torch.int64))

    def set_num_batch(self, num_batch: int) -> None:
        """Say how many steps are already done, where a checkpoint without that number was loaded."""
        if self._stages:
            self.num_batch.fill_(num_batch)

    def _current_batch_size(self) -> int:
        if not self._stages:
            return self._batch_size
        done = int(self.num_batch)  # host sync: only with stages; the buffer lives on the CPU unless moved
        for stage in self._stages:
            if stage.max_iters is None or done <= stage.max_iters:
                return stage.batch_size
            done -= stage.max_iters
        raise AssertionError("the last stage is open-ended")

    def update(self) -> None:
        """One step is done."""
        now = time.monotonic()
        if self._stages:
            self.num_batch += 1
        examples = self._current_batch_size() * self._world_size
        self._steps += 1
        self.total_examples += examples
        self._attempt_examples += examples
        if self._steps <= self._warmup_steps:
            self.warmup_examples += examples
            self._attempt_warmup_examples += examples
        else:
            seconds = now - self._previous_ts
            self.time_lapse_after_warmup += seconds
            self._attempt_seconds += seconds
            self._add_to_window(seconds, examples)
        self._previous_ts = now

    def _add_to_window(self, seconds: float, examples: int) -> None:
        if len(self._window) == MAX_WINDOW_TS:
            self._drop_oldest()
        self._window.append((seconds, examples))
        self._window_seconds_used += seconds
        self._window_examples += examples
        while self._window_seconds_used > self._window_seconds and len(self._window) > 1:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        seconds, examples = self._window.popleft()
        self._window_seconds_used -= seconds
        self._window_examples -= examples

    def compute(self) -> dict[str, Tensor]:
        """Counts always; rates once the warmup is over."""
        values = {
            self._key(MetricName.TOTAL_EXAMPLES): self.total_examples.clone(),
            self._key(MetricName.ATTEMPT_EXAMPLES): torch.tensor(self._attempt_examples),
        }
        if self._attempt_seconds > 0:
            lifetime = (self.total_examples - self.warmup_examples) / self.time_lapse_after_warmup
            attempt = (self._attempt_examples - self._attempt_warmup_examples) / self._attempt_seconds
            window = self._window_examples / self._window_seconds_used if self._window_seconds_used > 0 else 0.0
            for prefix, rate in (
                (MetricPrefix.LIFETIME, lifetime),
                (MetricPrefix.WINDOW, window),
                (MetricPrefix.ATTEMPT, attempt),
            ):
                values[self._key(MetricName.THROUGHPUT, prefix)] = torch.as_tensor(rate, dtype=torch.float64)
        if self._stages:
            values[self._key(MetricName.BATCH_SIZE)] = torch.tensor(self._current_batch_size(), dtype=torch.int32)
        return values

    def _key(self, name: MetricName, prefix: MetricPrefix = MetricPrefix.DEFAULT) -> str:
        return compose_metric_key(self._namespace, str(self._namespace), name, prefix)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A checkpoint written without stages has no num_batch; keep ours, see set_num_batch.
        if self._stages and f"{prefix}num_batch" not in state_dict:
            state_dict[f"{prefix}num_batch"] = self.num_batch
        super()._load_from_state_dict(state_dict, prefix, *args)
