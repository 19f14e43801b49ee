"""What quantised tables cost in AUC and normalised entropy: DLRM on MovieLens-100K and on synthetic Criteo.

    python benchmarks/quantization_quality.py [--threads 2]

One float model per data set is trained, then its tables are stored in fewer bits, nothing is trained again, and the
same test examples are scored. On MovieLens the numbers are means over three seeds of data split and model.
"""

from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import Gate, parse_arguments, report
from benchmarks.quantized_lookup import DTYPES
from recsys_edu.examples.ctr_tasks import CTRTask, movielens_task, synthetic_criteo_task
from recsys_edu.inference.modules import quantize_embeddings
from recsys_edu.models.dlrm import DLRM, DLRMTrain
from recsys_edu.modules.embedding_modules import EmbeddingBagCollection
from recsys_edu.training.trainer import click_scores
from recsys_edu.types import DataType

DIM, BATCH = 16, 1024
Maker = Callable[..., CTRTask]


def trained(task: CTRTask, steps: int, seed: int) -> DLRM:
    """DLRM after so many steps of Adam; for few ids per step its dense gradients are the simplest."""
    torch.manual_seed(seed)
    model = DLRM(EmbeddingBagCollection(tables=task.tables), task.num_dense, [64, DIM], [64, 32, 1])
    training, optimizer = DLRMTrain(model), torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-5)
    for batch in itertools.islice(task.train(0), steps):
        loss, _ = training(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@torch.inference_mode()
def scores_of(model: nn.Module, task: CTRTask) -> dict[str, float]:
    """AUC and normalised entropy on the test examples."""
    return click_scores(
        (model(batch.dense_features, batch.sparse_features).flatten(), batch.labels) for batch in task.test()
    )


def rows_of(name: str, make: Maker, epochs: float, seeds: range) -> list[dict[str, object]]:
    """One row per type, averaged over seeds."""
    found: dict[DataType, list[dict[str, float]]] = {kind: [] for kind in DTYPES}
    size = {}
    for seed in seeds:
        task = make(BATCH, DIM, seed, 0, 1)
        model = trained(task, max(int(epochs * task.steps_per_epoch), 1), seed)
        for kind, dtype in DTYPES.items():
            served = quantize_embeddings(model, dtype, inplace=False)
            found[kind].append(scores_of(served, task))
            size[kind] = served.sparse_arch.embedding_bag_collection.memory_bytes()
    exact = found[DataType.FP32]
    return [
        {
            "data": name,
            "rows": kind.value,
            "KiB": size[kind] / 1024,
            "AUC": statistics.mean(score["auc"] for score in scores),
            "AUC lost": statistics.mean(full["auc"] - score["auc"] for full, score in zip(exact, scores)),
            "NE": statistics.mean(score["ne"] for score in scores),
            "NE lost": statistics.mean(score["ne"] - full["ne"] for full, score in zip(exact, scores)),
            "seeds": len(seeds),
        }
        for kind, scores in found.items()
    ]


def main() -> None:
    arguments = parse_arguments(__doc__)
    if arguments.tiny:
        rows = rows_of("synthetic Criteo", synthetic_criteo_task, 0.002, range(1))
    else:
        rows = rows_of("MovieLens-100K", movielens_task, 4, range(3))
        rows += rows_of("synthetic Criteo", synthetic_criteo_task, 0.2, range(1))
    by_kind = {(row["data"], row["rows"]): row for row in rows}
    gates = []
    for name in dict.fromkeys(row["data"] for row in rows):
        for kind, most in (("INT8", 0.0005), ("INT4", 0.005)):
            lost = abs(float(by_kind[name, kind]["AUC lost"]))
            gates.append(Gate(f"{name}: AUC moved by {kind}", lost, at_most=most))
    report("quantization_quality", rows, gates, arguments.out)


if __name__ == "__main__":
    main()
