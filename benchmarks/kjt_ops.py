"""How long operations on KeyedJaggedTensors take, beside TorchRec's where it is installed.

    python benchmarks/kjt_ops.py [--rounds 20] [--threads 1]

26 keys is Criteo's number of categorical features, 500 that of a large production model. Every operation
starts from a batch whose per-key lengths are known, as a data loader's `from_lengths_sync` leaves it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import print_table, time_ms, write_result
from recsys_edu.sparse import jagged_tensor as ours

CASES = [(26, 2048, 4), (500, 512, 4)]  # keys, batch size, mean ids per row
EMBEDDING_DIM = 16


def torchrec_module() -> ModuleType | None:
    try:
        from torchrec.sparse import jagged_tensor
    except ImportError:
        return None
    return jagged_tensor


def operations(module: ModuleType, num_keys: int, batch_size: int, mean_length: int) -> dict[str, Callable[[], object]]:
    """The operations of one library on one random batch, the same for every library."""
    generator = torch.Generator().manual_seed(0)
    keys = [f"feature_{index}" for index in range(num_keys)]
    lengths = torch.randint(0, 2 * mean_length + 1, (num_keys * batch_size,), generator=generator, dtype=torch.int32)
    values = torch.randint(0, 1_000_000, (int(lengths.sum()),), generator=generator)
    weights = torch.rand(values.numel(), generator=generator)
    order = torch.randperm(num_keys, generator=generator).tolist()
    halves = [num_keys // 2, num_keys - num_keys // 2]

    def batch(with_weights: bool = False):
        return module.KeyedJaggedTensor.from_lengths_sync(keys, values, lengths, weights if with_weights else None)

    plain, weighted = batch(), batch(with_weights=True)
    parts = plain.split(halves)
    one_key = module.JaggedTensor(values, lengths=lengths)
    one_key.offsets()
    embeddings = [
        module.KeyedTensor(keys, [EMBEDDING_DIM] * num_keys, torch.rand(256, num_keys * EMBEDDING_DIM)),
        module.KeyedTensor(["dense"], [EMBEDDING_DIM], torch.rand(256, EMBEDDING_DIM)),
    ]
    groups = [["dense", *keys[: num_keys // 2]], keys[num_keys // 2 :]]

    def to_dict():
        plain._jt_dict = None  # both libraries keep the dict; measure making it
        return plain.to_dict()

    return {
        "from_lengths_sync": batch,
        "permute": lambda: plain.permute(order),
        "permute weighted": lambda: weighted.permute(order),
        "split in halves": lambda: plain.split(halves),
        "split by key": lambda: plain.split([1] * num_keys),
        "concat": lambda: module.KeyedJaggedTensor.concat(parts),
        "to_dict": to_dict,
        "to_padded_dense": lambda: one_key.to_padded_dense(2 * mean_length),
        "regroup": lambda: module.KeyedTensor.regroup(embeddings, groups),
        "regroup_as_dict": lambda: module.KeyedTensor.regroup_as_dict(embeddings, groups, ["g", "h"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    modules = {"recsys_edu": ours}
    if (other := torchrec_module()) is not None:
        modules["torchrec"] = other
    rows = []
    for num_keys, batch_size, mean_length in CASES:
        by_library = {name: operations(module, num_keys, batch_size, mean_length) for name, module in modules.items()}
        for operation in by_library["recsys_edu"]:
            times = time_ms({name: calls[operation] for name, calls in by_library.items()}, arguments.rounds)
            row = {"operation": operation, "keys": num_keys, "batch": batch_size}
            row |= {f"{name} ms": milliseconds for name, milliseconds in times.items()}
            if "torchrec" in times:
                row["times faster"] = times["torchrec"] / times["recsys_edu"]
            rows.append(row)
    print_table(rows)
    print(f"\nwritten to {write_result('kjt_ops', rows)}")


if __name__ == "__main__":
    main()
