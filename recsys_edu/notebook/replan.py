"""A small planner to play with: change GPUs, memory, link or batch, and the plan is made anew.

explore(replan, gpus=[16, 8, 32], gib_per_gpu=(8, 80, 32), ...)          # notebook 15
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import torch

from recsys_edu.distributed.embedding_types import HOST_MEMORY_KERNELS
from recsys_edu.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from recsys_edu.distributed.planner.constants import GIB
from recsys_edu.distributed.planner.types import PlannerError
from recsys_edu.distributed.sharding_plan import get_default_sharders
from recsys_edu.modules.embedding_configs import EmbeddingBagConfig
from recsys_edu.modules.embedding_modules import EmbeddingBagCollection
from recsys_edu.types import DataType

DATA_TYPES = {"float32": DataType.FP32, "float16": DataType.FP16}
MIXED = ((200_000_000, 128), (40_000_000, 128), (40_000_000, 64), *[(2_000_000, 64)] * 12, *[(50_000, 32)] * 11)


class Refusal:
    """A PlannerError to look at."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return f'<pre style="border-left:4px solid #D55E00;padding:.5em 1em">{html.escape(self.text)}</pre>'


def tables_on_meta(shapes: Sequence[tuple[int, int]], data_type: str = "float32") -> EmbeddingBagCollection:
    """Tables t0, t1, ... of (rows, columns), one feature each, without memory."""
    configs = [
        EmbeddingBagConfig(
            name=f"t{i}",
            num_embeddings=rows,
            embedding_dim=columns,
            feature_names=[f"f{i}"],
            data_type=DATA_TYPES[data_type],
        )
        for i, (rows, columns) in enumerate(shapes)
    ]
    return EmbeddingBagCollection(tables=configs, device=torch.device("meta"))


def replan(
    gpus: int = 16,
    gib_per_gpu: int = 32,
    host_gib_per_gpu: int = 0,
    link_gib_per_s: float = 12.5,
    batch_size: int = 512,
    dtype: str = "float32",
    ids_per_example: int = 1,
    shapes: Sequence[tuple[int, int]] = MIXED,
) -> Any:
    """What the planner makes of it: a figure of every rank's time, or the refusal.

    `link_gib_per_s` is the link between hosts of 8; inside one it stays at 600. `host_gib_per_gpu` is host memory.
    """
    from recsys_edu.viz.plan import times_figure

    topology = Topology(
        gpus,
        "cuda",
        hbm_cap=gib_per_gpu * GIB,
        ddr_cap=host_gib_per_gpu * GIB,
        local_world_size=min(gpus, 8),
        inter_host_bw=link_gib_per_s * GIB / 1000,
    )
    model = tables_on_meta(shapes, dtype)
    constraints = {f"t{i}": ParameterConstraints(pooling_factors=[float(ids_per_example)]) for i in range(len(shapes))}
    planner = EmbeddingShardingPlanner(topology=topology, batch_size=batch_size, constraints=constraints)
    try:
        plan = planner.plan(model, get_default_sharders())
    except PlannerError as error:
        return Refusal(str(error))
    figure = times_figure(plan)
    frame = plan.to_frame()
    types = frame["sharding_type"].value_counts().rows()
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(types))
    on_host = sum(kernel in HOST_MEMORY_KERNELS for kernel in frame["compute_kernel"].to_list())
    counts += f"; {on_host} in host memory" if on_host else ""
    figure.update_layout(title={"text": f"<b>{plan.cost_ms:.3g} ms on the busiest rank</b><br><sub>{counts}</sub>"})
    return figure
