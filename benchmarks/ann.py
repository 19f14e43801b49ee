"""How fast and how complete approximate search over a million items is, beside exact search.

    python benchmarks/ann.py [--items 1000000] [--width 32] [--threads 1]

Item vectors are synthetic but not noise: they lie around a thousand centres, with a spread as large as the centres'
own, the queries likewise. One query at a time; recall is that of the 100 best.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import CLOCKS, RESULTS, Gate, report
from recsys_edu.retrieval.index import IndexSettings, ItemIndex, has_faiss, recall_against

K = 100


def clustered(num: int, width: int, seed: int) -> torch.Tensor:
    """Vectors around centres that are the same for every seed."""
    centres = torch.randn(1000, width, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(1000, (num,), generator=generator)
    return (centres[chosen] + torch.randn(num, width, generator=generator)) / width**0.5


def settings(tiny: bool) -> dict[str, IndexSettings]:
    found = {"exact": IndexSettings("exact")}
    if has_faiss():
        for probes in (16, 64, 128, 192):
            found[f"ivf, {probes} probes"] = IndexSettings("ivf", probes=probes)
        for probes in (64, 128, 192):
            found[f"ivf_int8, {probes} probes"] = IndexSettings("ivf_int8", probes=probes)
        if tiny:
            found["hnsw"] = IndexSettings("hnsw")
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON result")
    parser.add_argument("--tiny", action="store_true", help="sizes that only show that it runs")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if has_faiss():
        import faiss

        faiss.omp_set_num_threads(args.threads)
    num_items, num_queries = (5000, 20) if args.tiny else (args.items, args.queries)
    items_ID, query_QD = clustered(num_items, args.width, 1), clustered(num_queries, args.width, 2)
    rows, built, exact_ids = [], {}, None
    for name, setting in settings(args.tiny).items():
        key = (setting.kind, setting.cells)
        started = time.perf_counter()
        if key in built:
            index = built[key].with_settings(setting)
        else:
            index = built[key] = ItemIndex(items_ID, settings=setting)
        build_s = time.perf_counter() - started
        _, ids = index.search(query_QD, K)
        exact_ids = ids if exact_ids is None else exact_ids
        times = one_by_one_ms(index, query_QD[:20] if setting.kind == "exact" else query_QD, CLOCKS[args.clock])
        rows.append(
            {
                "index": name, "items": num_items, "build s": build_s, "MB": index.num_bytes / 1e6,
                "p50 ms": statistics.median(times), "p99 ms": sorted(times)[int(0.99 * len(times))],
                "recall@100": recall_against(exact_ids, ids),
            }
        )  # fmt: skip
    good = [row["p50 ms"] for row in rows if row["recall@100"] >= 0.95 and row["index"] != "exact"]
    gates = [Gate("p50 ms of a query with recall@100 of at least 0.95", min(good, default=1e9), at_most=1.0)]
    report("ann", rows, gates if has_faiss() else [], args.out)


def one_by_one_ms(index: ItemIndex, query_QD: torch.Tensor, now) -> list[float]:
    index.search(query_QD[:1], K)
    times = []
    for row in range(len(query_QD)):
        started = now()
        index.search(query_QD[row : row + 1], K)
        times.append(1e3 * (now() - started))
    return times


if __name__ == "__main__":
    main()
