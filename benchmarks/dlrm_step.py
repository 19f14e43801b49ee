"""One training step of the announcement's DLRM on one rank, beside raw FBGEMM by hand, nn.EmbeddingBag and TorchRec.

    python benchmarks/dlrm_step.py [--rounds 30] [--threads 2]

26 tables x 100k x 64, 13 dense features, bottom MLP 512-256-64, top MLP 512-512-256-1, batch 2048: forward, backward,
SGD on the tables inside backward (nn.EmbeddingBag: sparse gradients and a step), torch's SGD on the rest. The models
wrapped in DistributedModelParallel, ours and TorchRec's, run on a gloo group of one rank, tables table-wise. Every
contestant's dense layers are timed alone as well, with fixed embeddings: "of it tables" is a step less its own.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import OURS, THEIRS, Gate, Samples, best, medians, parse_arguments, ratio, report, time_samples
from benchmarks.embedding_lookup import (
    BAGS,
    LEARNING_RATE,
    RAW,
    TINY,
    Bags,
    Sizes,
    SparseBags,
    keyed_jagged,
    our_tables,
    random_bags,
    raw_tables,
    torchrec_or_none,
)
from recsys_edu.datasets.utils import Batch
from recsys_edu.kernels.backend import use_fbgemm
from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor

NUM_DENSE = 13
NUM_BATCHES = 4
LIMIT_S = 25.0  # for each number of ids per bag
OURS_PARALLEL, THEIRS_PARALLEL = f"{OURS} DistributedModelParallel", f"{THEIRS} DistributedModelParallel"
DENSE = ", dense layers alone"
BY_HAND = "by hand"
DENSE_OF = {OURS: OURS, OURS_PARALLEL: OURS, THEIRS: THEIRS, THEIRS_PARALLEL: THEIRS, RAW: BY_HAND, BAGS: BY_HAND}
Step = Callable[[], object]


@dataclass(frozen=True)
class Layers:
    """Sizes of the dense part."""

    bottom: tuple[int, ...] = (512, 256, 64)
    top: tuple[int, ...] = (512, 512, 256, 1)


TINY_LAYERS = Layers(bottom=(16, 8), top=(16, 1))


@dataclass(frozen=True)
class Examples:
    """One batch as plain tensors."""

    dense_BI: Tensor
    bags: Bags
    labels_B: Tensor


def random_examples(sizes: Sizes, pooling: int, seed: int) -> Examples:
    generator = torch.Generator().manual_seed(seed)
    dense = torch.rand(sizes.batch_size, NUM_DENSE, generator=generator)
    labels = torch.randint(0, 2, (sizes.batch_size,), generator=generator).float()
    return Examples(dense, random_bags(sizes, pooling, seed), labels)


def our_library() -> SimpleNamespace:
    """The names of TorchRec's that a DLRM needs, from this package."""
    from recsys_edu.distributed import sharding_plan, types
    from recsys_edu.distributed.embeddingbag import EmbeddingBagCollectionSharder
    from recsys_edu.distributed.model_parallel import DistributedModelParallel
    from recsys_edu.models.dlrm import DLRM, DLRMTrain
    from recsys_edu.modules import embedding_configs, embedding_modules
    from recsys_edu.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

    return SimpleNamespace(
        Batch=Batch,
        DLRM=DLRM,
        DLRMTrain=DLRMTrain,
        DistributedModelParallel=DistributedModelParallel,
        EmbeddingBagCollection=embedding_modules.EmbeddingBagCollection,
        EmbeddingBagCollectionSharder=EmbeddingBagCollectionSharder,
        EmbeddingBagConfig=embedding_configs.EmbeddingBagConfig,
        KeyedJaggedTensor=KeyedJaggedTensor,
        ShardingPlan=types.ShardingPlan,
        apply_optimizer_in_backward=apply_optimizer_in_backward,
        plans=sharding_plan,
    )


def their_library() -> SimpleNamespace | None:
    """The same names from TorchRec, or None."""
    if torchrec_or_none() is None:
        return None
    import torchrec
    from torch.distributed.optim import _apply_optimizer_in_backward
    from torchrec.datasets.utils import Batch as TheirBatch
    from torchrec.distributed import DistributedModelParallel, sharding_plan, types
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
    from torchrec.models.dlrm import DLRM, DLRMTrain

    return SimpleNamespace(
        Batch=TheirBatch,
        DLRM=DLRM,
        DLRMTrain=DLRMTrain,
        DistributedModelParallel=DistributedModelParallel,
        EmbeddingBagCollection=torchrec.EmbeddingBagCollection,
        EmbeddingBagCollectionSharder=EmbeddingBagCollectionSharder,
        EmbeddingBagConfig=torchrec.EmbeddingBagConfig,
        KeyedJaggedTensor=torchrec.KeyedJaggedTensor,
        ShardingPlan=types.ShardingPlan,
        apply_optimizer_in_backward=_apply_optimizer_in_backward,
        plans=sharding_plan,
    )


def dlrm(library: SimpleNamespace, sizes: Sizes, layers: Layers, device: torch.device | None = None) -> nn.Module:
    """DLRMTrain of either library, its tables on `device`."""
    collection = library.EmbeddingBagCollection(our_tables(sizes, library.EmbeddingBagConfig), device=device)
    return library.DLRMTrain(library.DLRM(collection, NUM_DENSE, list(layers.bottom), list(layers.top)))


def library_batch(library: SimpleNamespace, sizes: Sizes, examples: Examples) -> Any:
    kjt = keyed_jagged(library.KeyedJaggedTensor, sizes, examples.bags)
    return library.Batch(dense_features=examples.dense_BI, sparse_features=kjt, labels=examples.labels_B)


def parallel_dlrm(
    library: SimpleNamespace, sizes: Sizes, layers: Layers, make_plan: Callable[[Any, nn.Module], Any], fused: bool
) -> nn.Module:
    """DLRMTrain in DistributedModelParallel; `make_plan(plans, collection)` gives the collection's plan."""
    model = dlrm(library, sizes, layers)
    collection = model.model.sparse_arch.embedding_bag_collection
    if fused:
        library.apply_optimizer_in_backward(torch.optim.SGD, collection.parameters(), {"lr": LEARNING_RATE})
    path = "model.sparse_arch.embedding_bag_collection"
    return library.DistributedModelParallel(
        model,
        device=torch.device("cpu"),
        plan=library.ShardingPlan({path: make_plan(library.plans, collection)}),
        sharders=[library.EmbeddingBagCollectionSharder()],
    )


def training_step(model: nn.Module, trained: Sequence[nn.Parameter], batches: Sequence) -> Step:
    """One step on the next batch: of a model whose forward gives (loss, ...)."""
    optimizer, turns = torch.optim.SGD(trained, lr=LEARNING_RATE), itertools.cycle(batches)

    def step() -> None:
        optimizer.zero_grad()
        model(next(turns))[0].backward()
        optimizer.step()

    return step


def parallel_step(model: nn.Module, batches: Sequence, fused: bool) -> Step:
    """`fused`: the tables train inside backward and are nobody else's."""
    trained = [p for name, p in model.named_parameters() if not (fused and "embedding_bags" in name)]
    return training_step(model, trained, batches)


class HandWrittenDlrm(nn.Module):
    """The same DLRM in a screen of plain PyTorch; `lookup(bags)` gives the pooled [B, F * D]."""

    def __init__(self, lookup: Callable[[Bags], Tensor], sizes: Sizes, layers: Layers) -> None:
        super().__init__()
        self.lookup, self.num_tables, self.dim = lookup, sizes.num_tables, sizes.dim
        num_vectors = sizes.num_tables + 1
        first, second = torch.triu_indices(num_vectors, num_vectors, offset=1)
        self.pairs = first * num_vectors + second
        self.bottom = _perceptrons([NUM_DENSE, *layers.bottom])
        hidden = [sizes.dim + self.pairs.numel(), *layers.top]
        self.top = nn.Sequential(_perceptrons(hidden[:-1]), nn.Linear(hidden[-2], hidden[-1]))
        self.loss = nn.BCEWithLogitsLoss()

    def forward(self, examples: Examples) -> tuple[Tensor]:
        pooled_BFD = self.lookup(examples.bags).view(-1, self.num_tables, self.dim)
        dense_BD = self.bottom(examples.dense_BI)
        vectors = torch.cat([dense_BD.unsqueeze(1), pooled_BFD], dim=1)
        products = torch.bmm(vectors, vectors.transpose(1, 2)).flatten(1).index_select(1, self.pairs)
        logits = self.top(torch.cat([dense_BD, products], dim=1)).squeeze(1)
        return (self.loss(logits, examples.labels_B),)


def _perceptrons(widths: list[int]) -> nn.Sequential:
    return nn.Sequential(
        *(layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU(inplace=False)))
    )


class FixedEmbeddings(nn.Module):
    """In the place of a SparseArch: the same embeddings for every batch, whose gradient is computed and dropped."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.shape = (sizes.batch_size, sizes.num_tables, sizes.dim)
        self.pooled_BD = torch.rand(sizes.batch_size, sizes.num_tables * sizes.dim, requires_grad=True)

    def embedding_bag_collection(self, features: object) -> Tensor:
        return self.pooled_BD

    def stack(self, pooled_BD: Tensor) -> Tensor:
        return pooled_BD.view(self.shape)

    def forward(self, features: object) -> Tensor:
        return self.stack(self.pooled_BD)


def dense_alone(
    library: SimpleNamespace | None, sizes: Sizes, layers: Layers, examples: Sequence[Examples], parallel: bool = False
) -> Step:
    """The step without any table: of a library's DLRM, or of the one by hand."""
    fixed = FixedEmbeddings(sizes)
    if library is None:
        model: nn.Module = HandWrittenDlrm(lambda bags: fixed.pooled_BD, sizes, layers)
        batches: Sequence[Any] = examples
    else:
        model = dlrm(library, sizes, layers, device=torch.device("meta"))  # the tables are not needed
        model.model.sparse_arch = fixed
        batches = [library_batch(library, sizes, each) for each in examples]
    trained = list(model.parameters())
    if parallel:  # as DistributedModelParallel has it, ours and TorchRec's
        model = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True, static_graph=True)
    return training_step(model, trained, batches)


def table_milliseconds(samples: Samples) -> dict[str, float]:
    """What lookup, exchange and update of the tables add to a step: its median less that of its own dense layers."""
    found = medians(samples)
    return {name: each - found.get(DENSE_OF.get(name, name) + DENSE, each) for name, each in found.items()}


def contestants(sizes: Sizes, layers: Layers, examples: Sequence[Examples]) -> dict[str, Step]:
    """One step function per contestant. Needs a default process group of one rank."""
    from recsys_edu.modules.fused_embedding_modules import fuse_embedding_optimizer

    ours, theirs = our_library(), their_library()
    our_batches = [library_batch(ours, sizes, each) for each in examples]
    fused = fuse_embedding_optimizer(
        dlrm(ours, sizes, layers), torch.optim.SGD, {"lr": LEARNING_RATE}, torch.device("cpu")
    )
    steps = {
        OURS + DENSE: dense_alone(ours, sizes, layers, examples),
        BY_HAND + DENSE: dense_alone(None, sizes, layers, examples),
        OURS: parallel_step(fused, our_batches, fused=True),
        OURS_PARALLEL: parallel_step(
            parallel_dlrm(ours, sizes, layers, _all_on_rank_0, fused=True), our_batches, fused=True
        ),
    }
    if use_fbgemm():
        tbe = raw_tables(sizes)
        by_hand = HandWrittenDlrm(lambda bags: tbe(bags.values_N, bags.offsets), sizes, layers)
        steps[RAW] = training_step(by_hand, list(by_hand.parameters()), examples)
    bags = SparseBags(sizes)
    plain = HandWrittenDlrm(lambda batch: bags(batch.per_feature), sizes, layers)
    steps[BAGS] = training_step(plain, [*plain.parameters(), *bags.parameters()], examples)
    if theirs is not None:
        their_batches = [library_batch(theirs, sizes, each) for each in examples]
        steps[THEIRS + DENSE] = dense_alone(theirs, sizes, layers, examples)
        steps[THEIRS_PARALLEL] = parallel_step(
            parallel_dlrm(theirs, sizes, layers, _all_on_rank_0, fused=True), their_batches, fused=True
        )
    return steps


def _all_on_rank_0(plans: Any, collection: nn.Module) -> Any:
    tables = [config.name for config in collection.embedding_bag_configs()]
    generators = {name: plans.table_wise(rank=0, compute_kernel="fused") for name in tables}
    return plans.construct_module_sharding_plan(collection, generators, local_size=1, world_size=1, device_type="cpu")


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(__doc__, argv, rounds=30)
    sizes, layers = (TINY, TINY_LAYERS) if arguments.tiny else (Sizes(), Layers())
    rows, gates = [], []
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        for pooling in (1, 10):
            examples = [random_examples(sizes, pooling, seed) for seed in range(NUM_BATCHES)]
            samples = time_samples(
                contestants(sizes, layers, examples), arguments.rounds, 0.0, LIMIT_S, arguments.clock
            )
            fastest, tables = best(samples), table_milliseconds(samples)
            rows += [
                {
                    "ids per bag": pooling,
                    "contestant": name,
                    "ms per step": milliseconds,
                    "fastest ms": fastest[name],
                    "of it tables, ms": tables[name],
                    "time / ours": ratio(samples, name, OURS),
                }
                for name, milliseconds in medians(samples).items()
            ]
            what = f"{pooling} ids per bag"
            if RAW in samples:
                gates.append(Gate(f"time over raw FBGEMM by hand, {what}", ratio(samples, OURS, RAW), at_most=1.05))
            if THEIRS_PARALLEL in samples:
                faster = ratio(samples, THEIRS_PARALLEL, OURS)
                gates.append(Gate(f"times faster than TorchRec, {what}", faster, at_least=1.3))
                faster = tables[THEIRS_PARALLEL] / tables[OURS]
                gates.append(Gate(f"times faster than TorchRec without the dense layers, {what}", faster, at_least=1.3))
                faster = ratio(samples, THEIRS_PARALLEL, OURS_PARALLEL)
                gates.append(Gate(f"times faster than TorchRec, both in DMP, {what}", faster, at_least=1.3))
        dist.destroy_process_group()
    report("dlrm_step", rows, gates, arguments.out)


if __name__ == "__main__":
    main()
