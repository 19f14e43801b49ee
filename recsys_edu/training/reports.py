"""What a run shows while it trains, on rank 0: a progress bar, and TensorBoard's curves."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def check_tensorboard() -> None:
    """
    Raises:
        ImportError: TensorBoard is not installed.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise ImportError(
            "TensorBoard logging needs the package tensorboard: `pip install tensorboard`, or leave it switched off; "
            "metrics.jsonl in the run's folder has losses and scores too"
        )


def make_writer(folder: Path, first_step: int) -> Any:
    """TensorBoard's writer; points of later steps than `first_step`, left by a killed run, are hidden."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=first_step + 1)


def somebody_watches(world_size: int) -> bool:
    """Whether a progress bar would be seen: in a terminal, or in a notebook's own kernel."""
    return sys.stderr.isatty() or ("ipykernel" in sys.modules and world_size == 1)


class Reports:
    """A progress bar in steps with samples/s, loss, NE and AUC; and the same numbers as curves.

    Args:
        bar: show the bar.
        writer: TensorBoard's, or None.
    """

    def __init__(self, bar: bool, writer: Any, first_step: int, last_step: int, steps_per_epoch: int | None) -> None:
        self._writer, self._steps_per_epoch, self._bar = writer, steps_per_epoch, None
        if bar:
            from tqdm.auto import tqdm

            self._bar = tqdm(initial=first_step, total=last_step, unit="step", dynamic_ncols=True)

    def show(self, step: int, numbers: Mapping[str, float], kind: str) -> None:
        """`kind` is "train" or "test"."""
        if self._writer is not None:
            for name, number in numbers.items():
                self._writer.add_scalar(f"{kind}/{name.replace('/', ' per ')}", number, step)  # a slash makes a group
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            if self._steps_per_epoch:
                self._bar.set_description(f"epoch {(step - 1) // self._steps_per_epoch + 1}", refresh=False)
            if kind == "train":
                self._bar.set_postfix_str(", ".join(f"{name} {_text(number)}" for name, number in numbers.items()))
            else:
                self._bar.write(f"step {step}: " + ", ".join(f"{name} {_text(n)}" for name, n in numbers.items()))

    def close(self) -> None:
        for part in (self._bar, self._writer):
            if part is not None:
                part.close()


def _text(number: float) -> str:
    return f"{number:,.0f}" if number >= 1000 else f"{number:.4f}"
