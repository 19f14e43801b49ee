"""Quantised lookups: bytes, rows per second, bandwidth, and latency against throughput, beside raw FBGEMM.

    python benchmarks/quantized_lookup.py [--rounds 20] [--threads 2]

26 tables x 100k rows x 64 columns; every bag has 10 ids, drawn uniformly, so that rows come from memory and not from a
cache. "ours" is the whole quantised collection, checks of ids included; "raw FBGEMM" is its table-batched int-n-bit
module, fed with ready-made ids and offsets, unchecked. Latency is of one call on one process, by batch size; p99 needs
a quiet machine.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import CLOCKS, OURS, Gate, best, parse_arguments, ratio, report, time_samples
from benchmarks.embedding_lookup import TINY, Bags, Sizes, keyed_jagged, our_tables, random_bags
from recsys_edu.inference.modules import quantize_embeddings
from recsys_edu.kernels.backend import use_fbgemm
from recsys_edu.kernels.quantized_rows import RowFormat
from recsys_edu.modules.embedding_modules import EmbeddingBagCollection
from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor
from recsys_edu.types import DataType

POOLING, NUM_BATCHES, LIMIT_S = 10, 8, 20.0
LATENCY_BATCHES, LATENCY_CALLS = (1, 8, 64, 512, 2048), 200
DTYPES = {
    DataType.FP32: torch.float32,
    DataType.FP16: torch.float16,
    DataType.NFP8: torch.float8_e4m3fn,
    DataType.INT8: torch.int8,
    DataType.INT4: torch.quint4x2,
    DataType.INT2: torch.quint2x4,
}
RAW = "raw FBGEMM"
WITH_RAW = (DataType.FP32, DataType.FP16, DataType.INT8, DataType.INT4)


def quantised(sizes: Sizes, dtype: torch.dtype) -> nn.Module:
    """The collection with rows of one type; the same numbers for every type."""
    torch.manual_seed(0)
    model = nn.Sequential(EmbeddingBagCollection(our_tables(sizes)))
    return quantize_embeddings(model, dtype, inplace=True)[0]


def raw_tables(collection: nn.Module, kind: DataType) -> nn.Module:
    """FBGEMM's module around the very same rows, as one would write it by hand."""
    from fbgemm_gpu.split_embedding_configs import SparseType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen

    form = SparseType.from_int({"FP32": 0, "FP16": 1, "INT8": 2, "INT4": 3}[kind.value])
    tables = collection.kernel.spec.tables
    tbe = IntNBitTableBatchedEmbeddingBagsCodegen(
        [(table.name, table.num_rows, table.dim, form, EmbeddingLocation.HOST) for table in tables],
        device="cpu",
        bounds_check_mode=BoundsCheckMode.NONE,
        output_dtype=SparseType.FP32,
        indices_dtype=torch.int64,
    )
    tbe.initialize_weights()
    for (weights, _), rows in zip(
        tbe.split_embedding_weights(split_scale_shifts=False), collection.kernel.table_rows()
    ):
        weights.copy_(rows)
    return tbe


def turns(batches: list) -> Callable[[], object]:
    """One batch after another, for ever."""
    order: Iterator = itertools.cycle(batches)
    return lambda: next(order)


def lookups(sizes: Sizes, bags: list[Bags], collections: dict[DataType, nn.Module]) -> dict[str, Callable[[], object]]:
    """What is timed: each type, ours and raw, on the same batches."""
    kjts = [keyed_jagged(KeyedJaggedTensor, sizes, one) for one in bags]
    contestants: dict[str, Callable[[], object]] = {}
    for kind, collection in collections.items():
        contestants[f"{kind} {OURS}"] = _call_ours(collection, turns(kjts))
        if kind in WITH_RAW and use_fbgemm():
            contestants[f"{kind} {RAW}"] = _call_raw(raw_tables(collection, kind), turns(bags))
    return contestants


def _call_ours(collection: nn.Module, next_batch: Callable[[], object]) -> Callable[[], object]:
    return lambda: collection(next_batch()).values()


def _call_raw(tbe: nn.Module, next_batch: Callable[[], object]) -> Callable[[], object]:
    def call() -> object:
        bags = next_batch()
        return tbe(bags.values_N, bags.offsets)

    return call


def latencies(collection: nn.Module, sizes: Sizes, batch_size: int, calls: int, clock: str) -> dict[str, float]:
    """p50 and p99 of one call, and what one process then serves per second."""
    sizes = Sizes(sizes.num_tables, sizes.num_rows, sizes.dim, batch_size)
    next_batch = turns([keyed_jagged(KeyedJaggedTensor, sizes, random_bags(sizes, POOLING, s)) for s in range(4)])
    now, times = CLOCKS[clock], []
    deadline = time.monotonic() + LIMIT_S / 4
    for call in range(calls + 3):
        batch = next_batch()
        start = now()
        collection(batch).values()
        if call >= 3:
            times.append((now() - start) * 1e3)
        if len(times) >= 5 and time.monotonic() > deadline:
            break
    p50, p99 = statistics.median(times), sorted(times)[int(0.99 * (len(times) - 1))]
    return {"p50 ms": p50, "p99 ms": p99, "examples/s": batch_size / statistics.mean(times) * 1e3}


def main() -> None:
    arguments = parse_arguments(__doc__)
    sizes = TINY if arguments.tiny else Sizes()
    bags = [random_bags(sizes, POOLING, seed) for seed in range(2 if arguments.tiny else NUM_BATCHES)]
    rows_per_call = sizes.num_tables * sizes.batch_size * POOLING
    with torch.inference_mode():
        collections = {kind: quantised(sizes, dtype) for kind, dtype in DTYPES.items()}
        samples = time_samples(
            lookups(sizes, bags, collections), arguments.rounds, limit_s=LIMIT_S * 3, clock=arguments.clock
        )
        rows = []
        for name, milliseconds in best(samples).items():
            kind = DataType(name.split()[0])
            row_bytes = RowFormat(kind, sizes.dim).num_bytes
            rows.append(
                {
                    "what": "lookup",
                    "rows": kind.value,
                    "contestant": name.removeprefix(f"{kind} "),
                    "batch": sizes.batch_size,
                    "bytes/row": row_bytes,
                    "MiB": collections[kind].memory_bytes() / 2**20,
                    "best ms": milliseconds,
                    "Mrows/s": rows_per_call / milliseconds / 1e3,
                    "GB/s": rows_per_call * row_bytes / milliseconds / 1e6,
                    "times FP32": ratio(samples, f"FP32 {OURS}", name),
                    "p50 ms": None,
                    "p99 ms": None,
                    "examples/s": None,
                }
            )
        batch_sizes = LATENCY_BATCHES[:2] if arguments.tiny else LATENCY_BATCHES
        for kind in (DataType.FP32, DataType.INT8, DataType.INT4):
            for batch_size in batch_sizes:
                calls = 5 if arguments.tiny else LATENCY_CALLS
                measured = latencies(collections[kind], sizes, batch_size, calls, arguments.clock)
                facts = {"what": "latency", "rows": kind.value, "contestant": OURS, "batch": batch_size}
                rows.append(dict.fromkeys(rows[0]) | facts | measured)
    report("quantized_lookup", rows, gates(samples, collections), arguments.out)


def gates(samples: dict[str, list[float]], collections: dict[DataType, nn.Module]) -> list[Gate]:
    """What issue and README promise."""
    size = {kind: collection.memory_bytes() for kind, collection in collections.items()}
    found = [
        Gate(
            "int8 rows/s over fp32 rows/s",
            ratio(samples, f"FP32 {OURS}", f"INT8 {OURS}"),
            at_least=1.5,
        ),
        Gate("fp32 bytes over int8 bytes", size[DataType.FP32] / size[DataType.INT8], at_least=3.5),
        Gate("fp32 bytes over int4 bytes", size[DataType.FP32] / size[DataType.INT4], at_least=6.5),
    ]
    if f"INT8 {RAW}" in samples:
        found += [
            Gate(f"{kind} rows/s over raw FBGEMM's", ratio(samples, f"{kind} {RAW}", f"{kind} {OURS}"), at_least=0.95)
            for kind in (DataType.INT8, DataType.INT4)
        ]
    return found


if __name__ == "__main__":
    main()
