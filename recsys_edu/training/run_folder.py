"""Where a run keeps its metrics and checkpoints."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch.distributed as dist

from recsys_edu.distributed.checkpoint import FACTS_FILE
from recsys_edu.distributed.exchange import gather_objects


class RunFolder:
    """`metrics.jsonl` and checkpoints `step_<n>`; rank 0 writes. Without a path nothing is kept.

    Lines are appended whole. What a killed run wrote beyond its last checkpoint is cut off when the run goes on.
    """

    def __init__(self, path: Path | None, rank: int) -> None:
        self.path, self.rank = path, rank
        self.metrics = path / "metrics.jsonl" if path is not None else None
        if path is not None and rank == 0:
            path.mkdir(parents=True, exist_ok=True)

    def write(self, lines: list[dict[str, object]]) -> None:
        if self.metrics is not None and self.rank == 0:
            with open(self.metrics, "a") as file:
                file.write("".join(json.dumps(line) + "\n" for line in lines))

    def cut_after(self, step: int) -> None:
        """Drop lines of later steps, and a line that was being written when the run ended."""
        if self.metrics is None or self.rank != 0 or not self.metrics.exists():
            return
        kept = [line for line in self.metrics.read_text().splitlines(True) if line.endswith("\n")]
        kept = [line for line in kept if json.loads(line)["step"] <= step]
        aside = self.metrics.with_suffix(".tmp")
        aside.write_text("".join(kept))
        os.replace(aside, self.metrics)

    def checkpoint(self, step: int) -> Path | None:
        return self.path / f"step_{step}" if self.path is not None else None

    def checkpoints(self) -> list[Path]:
        """Complete ones, oldest first, as rank 0 sees them."""
        found = list(self.path.glob("step_*")) if self.path is not None else []
        complete = [path for path in found if path.name[5:].isdigit() and (path / FACTS_FILE).exists()]
        group = dist.group.WORLD if dist.is_initialized() else None
        return gather_objects(sorted(complete, key=lambda path: int(path.name[5:])), group)[0]

    def drop_old(self, keep: int, spare: int | None = None) -> None:
        """Delete all checkpoints but the last `keep`, and but that of step `spare`."""
        for path in self.checkpoints()[:-keep]:
            if self.rank == 0 and path != (self.checkpoint(spare) if spare is not None else None):
                shutil.rmtree(path)
