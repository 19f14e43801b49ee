"""One embedding lookup on one rank, beside raw FBGEMM, nn.EmbeddingBag and TorchRec's collection.

    python benchmarks/embedding_lookup.py [--rounds 20] [--threads 2]

26 tables x 100k rows x 64 columns, batch 2048. Batches are ready-made KeyedJaggedTensors (ids, offsets and lengths
per key known, as a data loader leaves them) and take turns, so that rows come from memory and not from a cache.
"forward" runs without autograd; "forward + backward" includes the SGD step on the rows. `index_select` gathers the same
rows (256 bytes each) from one tensor into a buffer that exists: the machine's random-gather bandwidth.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import OURS, THEIRS, Gate, best, medians, parse_arguments, ratio, report, time_samples
from recsys_edu.kernels import lookup
from recsys_edu.kernels import modules as kernel_modules
from recsys_edu.kernels.backend import use_fbgemm
from recsys_edu.modules.embedding_configs import EmbeddingBagConfig
from recsys_edu.modules.embedding_modules import EmbeddingBagCollection
from recsys_edu.modules.fused_embedding_modules import FusedEmbeddingBagCollection
from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor

LEARNING_RATE = 0.01
NUM_BATCHES = 8
LIMIT_S = 15.0  # for each of four comparisons
PYTORCH, RAW, BAGS, GATHER = "recsys_edu on PyTorch kernels", "raw FBGEMM", "nn.EmbeddingBag", "index_select"


@dataclass(frozen=True)
class Sizes:
    """Tables and batches of a run."""

    num_tables: int = 26
    num_rows: int = 100_000
    dim: int = 64
    batch_size: int = 2048

    @property
    def keys(self) -> list[str]:
        return [f"feature_{index}" for index in range(self.num_tables)]


TINY = Sizes(num_tables=3, num_rows=100, dim=8, batch_size=4)


@dataclass(frozen=True)
class Bags:
    """One batch as plain tensors: ids and offsets feature by feature; and per feature, for nn.EmbeddingBag."""

    values_N: Tensor
    offsets: Tensor
    per_feature: list[tuple[Tensor, Tensor]]


def random_bags(sizes: Sizes, pooling: int, seed: int) -> Bags:
    """`pooling` uniformly drawn ids in every bag."""
    generator = torch.Generator().manual_seed(seed)
    per_feature = sizes.batch_size * pooling
    values = torch.randint(0, sizes.num_rows, (sizes.num_tables * per_feature,), generator=generator)
    offsets = torch.arange(0, values.numel() + 1, pooling)
    one_feature = torch.arange(0, per_feature, pooling)
    return Bags(values, offsets, [(ids, one_feature) for ids in values.split(per_feature)])


def keyed_jagged(kjt_class: type, sizes: Sizes, bags: Bags):
    """The batch in the given library's KeyedJaggedTensor, lengths and offsets known."""
    kjt = kjt_class.from_offsets_sync(sizes.keys, bags.values_N, bags.offsets)
    kjt.lengths()
    return kjt


def our_tables(sizes: Sizes, config_class: type = EmbeddingBagConfig) -> list:
    return [
        config_class(name=f"table_{i}", num_embeddings=sizes.num_rows, embedding_dim=sizes.dim, feature_names=[key])
        for i, key in enumerate(sizes.keys)
    ]


def raw_tables(sizes: Sizes, learning_rate: float = LEARNING_RATE) -> nn.Module:
    """FBGEMM's table-batched module as one would write it by hand: unchecked ids, exact SGD in backward."""
    from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation, PoolingMode
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    tbe = SplitTableBatchedEmbeddingBagsCodegen(
        [(sizes.num_rows, sizes.dim, EmbeddingLocation.HOST, ComputeDevice.CPU)] * sizes.num_tables,
        optimizer=EmbOptimType.EXACT_SGD,
        learning_rate=learning_rate,
        pooling_mode=PoolingMode.SUM,
        bounds_check_mode=BoundsCheckMode.NONE,
        output_dtype=SparseType.FP32,
        stochastic_rounding=False,
        device=torch.device("cpu"),
    )
    for weights in tbe.split_embedding_weights():
        nn.init.uniform_(weights, -0.01, 0.01)
    return tbe


class SparseBags(nn.Module):
    """One nn.EmbeddingBag with sparse gradients per table."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.bags = nn.ModuleList(
            nn.EmbeddingBag(sizes.num_rows, sizes.dim, mode="sum", sparse=True) for _ in range(sizes.num_tables)
        )

    def forward(self, per_feature: list[tuple[Tensor, Tensor]]) -> Tensor:
        return torch.cat([bag(ids, offsets) for bag, (ids, offsets) in zip(self.bags, per_feature)], dim=1)


def on_pytorch_kernels():
    """While open, our lookups find that FBGEMM cannot serve them: the path of macOS and Windows."""
    refused = "the benchmark measures PyTorch's kernels"
    return mock.patch.multiple(lookup, why_not_lookup=lambda *_: refused)


def pytorch_kernel_collection(sizes: Sizes) -> FusedEmbeddingBagCollection:
    with mock.patch.object(kernel_modules, "why_not_lookup", lambda *_: "the benchmark measures PyTorch's kernels"):
        return fused_collection(sizes)


def fused_collection(sizes: Sizes) -> FusedEmbeddingBagCollection:
    return FusedEmbeddingBagCollection(our_tables(sizes), torch.optim.SGD, {"lr": LEARNING_RATE})


def torchrec_or_none():
    try:
        import torchrec
    except ImportError:
        return None
    return torchrec


def forward_contestants(sizes: Sizes, batches: Sequence[Bags]) -> dict[str, Callable[[], object]]:
    """The forward alone; also the gather of as many rows."""
    kjts = [keyed_jagged(KeyedJaggedTensor, sizes, bags) for bags in batches]
    collection = EmbeddingBagCollection(our_tables(sizes))
    flat = lookup.flat_buffer(list(collection.parameters())).view(-1, sizes.dim)
    first_rows = torch.arange(sizes.num_tables).repeat_interleave(batches[0].values_N.numel() // sizes.num_tables)
    rows = [bags.values_N + first_rows * sizes.num_rows for bags in batches]
    gathered = torch.empty(rows[0].numel(), sizes.dim)

    def with_pytorch_kernels(kjt: KeyedJaggedTensor) -> None:
        with on_pytorch_kernels():
            collection(kjt).values()

    calls: dict[str, Callable[[], object]] = {
        GATHER: _in_turn(rows, lambda chosen: torch.index_select(flat, 0, chosen, out=gathered)),
        OURS: _in_turn(kjts, lambda kjt: collection(kjt).values()),
        PYTORCH: _in_turn(kjts, with_pytorch_kernels),
    }
    if use_fbgemm():
        tbe = raw_tables(sizes)
        calls[RAW] = _in_turn(batches, lambda bags: tbe(bags.values_N, bags.offsets))
    bags_of_torch = SparseBags(sizes)
    calls[BAGS] = _in_turn(batches, lambda bags: bags_of_torch(bags.per_feature))
    if (torchrec := torchrec_or_none()) is not None:
        theirs = torchrec.EmbeddingBagCollection(tables=our_tables(sizes, torchrec.EmbeddingBagConfig))
        their_kjts = [keyed_jagged(torchrec.KeyedJaggedTensor, sizes, bags) for bags in batches]
        calls[THEIRS] = _in_turn(their_kjts, lambda kjt: theirs(kjt).values())
    return {name: torch.no_grad()(call) for name, call in calls.items()}


def training_contestants(sizes: Sizes, batches: Sequence[Bags]) -> dict[str, Callable[[], object]]:
    """Forward, backward and the SGD step on the touched rows, from one given gradient of the output."""
    kjts = [keyed_jagged(KeyedJaggedTensor, sizes, bags) for bags in batches]
    gradient = torch.rand(sizes.batch_size, sizes.num_tables * sizes.dim)
    collection, on_pytorch = fused_collection(sizes), pytorch_kernel_collection(sizes)

    def with_pytorch_kernels(kjt: KeyedJaggedTensor) -> None:
        with on_pytorch_kernels():
            on_pytorch(kjt).values().backward(gradient)

    bags_of_torch = SparseBags(sizes)
    sgd = torch.optim.SGD(bags_of_torch.parameters(), lr=LEARNING_RATE)

    def train_bags(bags: Bags) -> None:
        sgd.zero_grad()
        bags_of_torch(bags.per_feature).backward(gradient)
        sgd.step()

    calls: dict[str, Callable[[], object]] = {
        OURS: _in_turn(kjts, lambda kjt: collection(kjt).values().backward(gradient)),
        PYTORCH: _in_turn(kjts, with_pytorch_kernels),
        BAGS: _in_turn(batches, train_bags),
    }
    if use_fbgemm():
        tbe = raw_tables(sizes)
        calls[RAW] = _in_turn(batches, lambda bags: tbe(bags.values_N, bags.offsets).backward(gradient))
    if (torchrec := torchrec_or_none()) is not None:
        from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection as TheirCollection

        theirs = TheirCollection(
            tables=our_tables(sizes, torchrec.EmbeddingBagConfig),
            optimizer_type=torch.optim.SGD,
            optimizer_kwargs={"lr": LEARNING_RATE},
            device=torch.device("cpu"),
        )
        their_kjts = [keyed_jagged(torchrec.KeyedJaggedTensor, sizes, bags) for bags in batches]
        calls[THEIRS] = _in_turn(their_kjts, lambda kjt: theirs(kjt).values().backward(gradient))
    return calls


def _in_turn(batches: Sequence, call: Callable) -> Callable[[], object]:
    turns: Iterator = itertools.cycle(batches)
    return lambda: call(next(turns))


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(__doc__, argv)
    sizes = TINY if arguments.tiny else Sizes()
    rows, gates = [], []
    for pooling in (1, 10):
        batches = [random_bags(sizes, pooling, seed) for seed in range(NUM_BATCHES)]
        gathered_bytes = batches[0].values_N.numel() * sizes.dim * 4
        for phase, make in (("forward", forward_contestants), ("forward + backward", training_contestants)):
            samples = time_samples(make(sizes, batches), arguments.rounds, limit_s=LIMIT_S, clock=arguments.clock)
            fastest = best(samples)
            for name, milliseconds in medians(samples).items():
                rows.append(
                    {
                        "phase": phase,
                        "ids per bag": pooling,
                        "contestant": name,
                        "ms": milliseconds,
                        "fastest ms": fastest[name],
                        "time / ours": ratio(samples, name, OURS),
                        "rows read, GB/s": gathered_bytes / milliseconds / 1e6,
                    }
                )
            if phase == "forward":
                promise = f"share of random-gather bandwidth, forward, {pooling} ids per bag"
                gates.append(Gate(promise, ratio(samples, GATHER, OURS), at_least=0.85))
            if RAW in samples:
                promise = f"time over raw FBGEMM, {phase}, {pooling} ids per bag"
                gates.append(Gate(promise, ratio(samples, OURS, RAW), at_most=1.05))
    report("embedding_lookup", rows, gates, arguments.out)


if __name__ == "__main__":
    main()
