"""Check and measure everything that has a GPU form, on a machine with an NVIDIA GPU: `make gpu-check`.

    python scripts/gpu_check.py [--out FOLDER] [--tiny]

Every check compares the GPU's answers with the CPU's: trainable and quantised kernels, a sharded collection and a
pipeline in a process group of one rank (NCCL, or gloo with CUDA tensors), quantised inference from a package. Then
lookups are measured against the device's copy bandwidth, and a quantised model's latency by batch size. Everything goes
to `<folder>/gpu_check.json`. A failed check gives exit status 1. Without a GPU nothing is checked: what is missing is
said, and the exit status is 2. FBGEMM's CUDA kernels are used where they load, PyTorch's otherwise; the result says
which. `--rehearse` runs the checks on the CPU and writes nothing.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import os
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import RESULTS, Gate, write_result
from recsys_edu.datasets.random import RandomRecDataset
from recsys_edu.distributed.model_parallel import DistributedModelParallel
from recsys_edu.distributed.sharding_plan import construct_module_sharding_plan, row_wise, table_wise
from recsys_edu.distributed.train_pipeline import TrainPipelineBase, TrainPipelineSparseDist
from recsys_edu.distributed.types import ShardingPlan
from recsys_edu.inference.modules import quantize_embeddings
from recsys_edu.inference.package import export_package, load_package
from recsys_edu.models.dlrm import DLRM, DLRMTrain
from recsys_edu.modules.embedding_configs import EmbeddingBagConfig
from recsys_edu.modules.embedding_modules import EmbeddingBagCollection

FEATURES, NUM_DENSE, DIM = ["user", "film", "shop", "word"], 13, 64
LATENCY_BATCHES = (1, 8, 64, 512, 4096, 16384)
COPY_SHARE_PROMISED = 0.6
DTYPES = {"int8": torch.int8, "int4": torch.quint4x2, "fp16": torch.float16}


def make_model(num_rows: int, seed: int = 0) -> DLRM:
    torch.manual_seed(seed)
    tables = [EmbeddingBagConfig(num_rows, DIM, f"t_{name}", feature_names=[name]) for name in FEATURES]
    return DLRM(EmbeddingBagCollection(tables=tables), NUM_DENSE, [64, DIM], [64, 1])


def make_batches(num_rows: int, batch_size: int, count: int, ids: int = 4) -> list[Any]:
    dataset = RandomRecDataset(
        FEATURES, batch_size, hash_size=num_rows, ids_per_feature=ids, num_dense=NUM_DENSE, num_batches=count,
        manual_seed=1,
    )  # fmt: skip
    return list(dataset)


def check_lookup(device: torch.device) -> str:
    model, batch = make_model(1000), make_batches(1000, 64, 1)[0]
    ebc = model.sparse_arch.embedding_bag_collection
    other = copy.deepcopy(ebc).to(device)
    expected, found = ebc(batch.sparse_features).values(), other(batch.sparse_features.to(device)).values()
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-5)
    expected.square().sum().backward()
    found.square().sum().backward()
    for ours, theirs in zip(ebc.parameters(), other.parameters()):
        torch.testing.assert_close(theirs.grad.cpu(), ours.grad, rtol=1e-3, atol=1e-4)
    return "forward and gradients equal the CPU's"


def check_quantised(device: torch.device) -> str:
    model, batch, used = make_model(1000), make_batches(1000, 64, 1)[0], set()
    with torch.inference_mode():
        for dtype in DTYPES.values():
            on_cpu = quantize_embeddings(model, dtype, inplace=False)
            on_gpu = quantize_embeddings(model, dtype, inplace=False).to(device)
            expected = on_cpu(batch.dense_features, batch.sparse_features)
            found = on_gpu(batch.dense_features.to(device), batch.sparse_features.to(device))
            torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-3)
            used.add(on_gpu.sparse_arch.embedding_bag_collection.kernel.backend)
    return f"{', '.join(DTYPES)} equal the CPU's; kernels: {', '.join(sorted(used))}"


def check_package(device: torch.device) -> str:
    model, batch = quantize_embeddings(make_model(1000), torch.int8, inplace=False).to(device), make_batches(1000, 8, 1)
    parts = batch[0].sparse_features.to_dict()
    lengths = torch.stack([parts[name].lengths() for name in FEATURES]).to(device)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        kernels = export_package(model, Path(folder) / "m.pt2", NUM_DENSE).kernels
        package = load_package(Path(folder) / "m.pt2")
        values = [parts[name].values().to(device) for name in package.metadata.features]
        found = package.predict(batch[0].dense_features.to(device), lengths, values)
        expected = model(batch[0].dense_features.to(device), batch[0].sparse_features.to(device)).sigmoid().squeeze(-1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    return f"exported, loaded, equal the model; kernels: {kernels}"


def sharded_losses(device: torch.device, pipelined: bool) -> list[float]:
    """Losses of ten steps of SGD with sharded tables."""
    model, batches = DLRMTrain(make_model(1000)), make_batches(1000, 64, 10)
    path = "model.sparse_arch.embedding_bag_collection"
    kinds = {f"t_{name}": table_wise(0) if place % 2 else row_wise() for place, name in enumerate(FEATURES)}
    plan = construct_module_sharding_plan(
        model.get_submodule(path), kinds, local_size=1, world_size=1, device_type=device.type
    )
    sharded = DistributedModelParallel(model, device=device, plan=ShardingPlan({path: plan}))
    optimizer = torch.optim.SGD(sharded.parameters(), lr=0.1)
    kind = TrainPipelineSparseDist if pipelined else TrainPipelineBase
    pipeline, source = kind(sharded, optimizer, device), iter(batches)
    return [float(pipeline.progress(source)[0]) for _ in batches]


def unsharded_losses() -> list[float]:
    model, losses = DLRMTrain(make_model(1000)), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in make_batches(1000, 64, 10):
        loss = model(batch)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def check_sharded(device: torch.device) -> str:
    found, expected = torch.tensor(sharded_losses(device, False)), torch.tensor(unsharded_losses())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    return f"ten steps equal the unsharded CPU model's ({dist.get_backend()})"


def check_pipeline(device: torch.device) -> str:
    found, expected = torch.tensor(sharded_losses(device, True)), torch.tensor(sharded_losses(device, False))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    return "losses equal those without a pipeline"


CHECKS: dict[str, Callable[[torch.device], str]] = {
    "lookup": check_lookup,
    "quantised lookup": check_quantised,
    "package": check_package,
    "sharded training": check_sharded,
    "pipeline": check_pipeline,
}


def start_group(device: torch.device) -> None:
    """One rank: NCCL on a GPU where torch has it, gloo otherwise."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "1"}
    dist.init_process_group("nccl" if device.type == "cuda" and dist.is_nccl_available() else "gloo")


def seconds_of(call: Callable[[], Any], device: torch.device, rounds: int) -> float:
    """The median time of a call, until the device has finished it."""
    times = []
    for _ in range(rounds + 3):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return sorted(times[3:])[rounds // 2]


def measured(device: torch.device, tiny: bool) -> list[dict[str, Any]]:
    """Copy bandwidth, lookups as a share of it, latency by batch size."""
    num_rows, batch_size, rounds = (1000, 64, 3) if tiny else (1_000_000, 16384, 30)
    source = torch.empty((1 if tiny else 1024) * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.numel() / seconds_of(lambda: target.copy_(source), device, rounds)
    rows = [_row("copy", "GB/s", value=copied / 1e9)]
    features = make_batches(num_rows, batch_size, 1, ids=10)[0].sparse_features.to(device)
    model = make_model(num_rows)
    for name, dtype in DTYPES.items():
        tables = quantize_embeddings(model, dtype, inplace=False).sparse_arch.embedding_bag_collection.to(device)
        row_bytes = tables.kernel.formats[0].num_bytes
        moved = features.values().numel() * (row_bytes + 8) + batch_size * len(FEATURES) * DIM * 4
        with torch.inference_mode():
            seconds = seconds_of(lambda tables=tables: tables(features).values(), device, rounds)
        detail = f"{name}, {tables.kernel.backend}: share of copy bandwidth"
        rows.append(_row("bandwidth", detail, value=moved / seconds / copied))
    served = quantize_embeddings(model, torch.int8, inplace=False).to(device).eval()
    for size in LATENCY_BATCHES[: 2 if tiny else None]:
        batch = make_batches(num_rows, size, 1)[0].to(device)
        with torch.inference_mode():
            seconds = seconds_of(
                lambda batch=batch: served(batch.dense_features, batch.sparse_features), device, rounds
            )
        rows.append(_row("latency", "int8 DLRM, one batch", examples=size, ms=seconds * 1e3))
    return rows


def _row(check: str, detail: str, passed: bool | None = None, **numbers: float) -> dict[str, Any]:
    return {"check": check, "detail": detail, "passed": passed, "value": None, "examples": None, "ms": None, **numbers}


def run(device: torch.device, tiny: bool) -> list[dict[str, Any]]:
    """All checks, each whatever became of the others, then the measurements."""
    rows = []
    start_group(device)
    try:
        for name, check in CHECKS.items():
            try:
                rows.append(_row(name, check(device), True))
            except Exception as error:
                traceback.print_exc()
                rows.append(_row(name, f"{type(error).__name__}: {str(error).splitlines()[0]}", False))
            print(f"{'passed' if rows[-1]['passed'] else 'FAILED'}  {name}: {rows[-1]['detail']}", flush=True)
    finally:
        dist.destroy_process_group()
    rows += measured(device, tiny)
    for row in itertools.islice(rows, len(CHECKS), None):
        print({key: value for key, value in row.items() if value is not None})
    return rows


def what_is_missing() -> str:
    """Why nothing can be checked here, and what to do."""
    if torch.version.cuda is None:
        found = f"this torch, {torch.__version__}, is built without CUDA: install a CUDA build of it"
    else:
        found = f"torch {torch.__version__} finds no device: look whether `nvidia-smi` shows a GPU and a driver"
    return (
        f"gpu-check needs an NVIDIA GPU and a torch that can use it; {found}. "
        "Nothing was checked, nothing was written. Its checks run on the CPU with `make gpu-check ARGS=--rehearse`."
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of gpu_check.json")
    parser.add_argument("--tiny", action="store_true", help="sizes that only show that it runs")
    parser.add_argument("--rehearse", action="store_true", help="run on the CPU, write nothing: is the script whole?")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available() and not arguments.rehearse:
        print(what_is_missing(), file=sys.stderr)
        return 2
    device = torch.device("cpu" if arguments.rehearse else "cuda:0")
    rows = run(device, arguments.tiny or arguments.rehearse)
    if not arguments.rehearse:
        shares = [row for row in rows if row["check"] == "bandwidth"]
        gates = [Gate(row["detail"], row["value"], at_least=COPY_SHARE_PROMISED) for row in shares]
        print("\n".join(f"{'met   ' if gate.met else 'MISSED'}  {gate.promise}: {gate.measured:.2f}" for gate in gates))
        print(f"written to {write_result('gpu_check', rows, gates, arguments.out)}")
    return int(any(row["passed"] is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
