"""Lower-precision communication: fewer bytes travel, what arrives is close, and a codec acts only where asked."""

from __future__ import annotations

import pytest
import torch
from engine_cases import bag_tables, batches_of_step, collection, loss_of, plan_of, sequence_tables

from recsys_edu.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs_registry
from recsys_edu.distributed.simulation import forward_all, simulate

WORLD_SIZE, LOCAL_SIZE = 4, 2
BYTES = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 1.0 + 8 / 16}  # a number; int8 rows here are at least 16 wide
TOLERANCE = {"fp32": 0.0, "fp16": 2e-3, "bf16": 2e-2, "int8": 2e-2}


def run(tables, kind: str, forward: str, backward: str):
    """Answers, tables after one SGD-like step, and bytes sent by label, of a simulated world of two hosts."""
    module = collection(tables)
    config = QCommsConfig(forward_precision=CommType(forward), backward_precision=CommType(backward))
    modules = simulate(
        module,
        plan_of(module, kind, WORLD_SIZE, LOCAL_SIZE),
        WORLD_SIZE,
        **({"local_size": LOCAL_SIZE} if hasattr(module, "embedding_bag_configs") else {}),
        qcomm_codecs_registry=get_qcomm_codecs_registry(config),
    )
    logs = []
    for sharded in modules:
        sharded.shards.exchange.log = []
        logs.append(sharded.shards.exchange.log)
    answers = forward_all(modules, batches_of_step(tables, WORLD_SIZE, 0))
    sum(loss_of(answer) for answer in answers).backward()
    gradients = [p.grad for sharded in modules for p in sharded.parameters() if p.grad is not None]
    sent: dict[str, int] = {}
    for record in (record for log in logs for record in log):
        sent[record.label] = sent.get(record.label, 0) + record.total_bytes
    values = (
        [a.values() for a in answers]
        if hasattr(answers[0], "length_per_key")
        else [part.values() for answer in answers for part in answer.values()]
    )
    return values, gradients, sent


def farthest(got: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(got, expected, strict=True) if a.numel())


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
@pytest.mark.parametrize(
    ("pooled", "kind"),
    [(True, "table_wise"), (True, "row_wise"), (True, "table_row_wise"), (True, "grid"), (False, "row_wise")],
)
def test_forward_codec_shrinks_answers_and_leaves_gradients_alone(pooled: bool, kind: str, precision: str) -> None:
    tables = bag_tables() if pooled else sequence_tables()
    exact, _, bytes_exact = run(tables, kind, "fp32", "fp32")
    close, _, bytes_less = run(tables, kind, precision, "fp32")
    assert 0 < farthest(close, exact) <= TOLERANCE[precision] * 4
    encoded = [label for label in bytes_exact if bytes_less[label] != bytes_exact[label]]
    assert encoded and not any("gradient" in label or label in ("sizes", "lengths and ids") for label in encoded)
    for label in encoded:
        assert bytes_less[label] <= bytes_exact[label] * BYTES[precision] / 4
    if kind == "table_row_wise":
        assert "sums between hosts" in encoded and "partial sums inside hosts" not in encoded


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
@pytest.mark.parametrize("kind", ["table_wise", "table_row_wise"])
def test_backward_codec_shrinks_gradients_and_leaves_answers_alone(kind: str, precision: str) -> None:
    exact, gradients, bytes_exact = run(bag_tables(), kind, "fp32", "fp32")
    same, close, bytes_less = run(bag_tables(), kind, "fp32", precision)
    assert farthest(same, exact) == 0
    assert 0 < farthest(close, gradients) <= TOLERANCE[precision]
    encoded = [label for label in bytes_exact if bytes_less[label] != bytes_exact[label]]
    assert encoded and all("gradients" in label for label in encoded)


def test_loss_scale_keeps_small_gradients_that_fp16_alone_would_lose() -> None:
    tiny = torch.full((2, 4), 1e-9)
    plain = get_qcomm_codecs_registry(QCommsConfig(CommType.FP32, CommType.FP16))
    scaled = get_qcomm_codecs_registry(QCommsConfig(CommType.FP32, CommType.FP16, backward_loss_scale=2.0**20))
    for registry, survives in ((plain, False), (scaled, True)):
        codec = registry["POOLED_EMBEDDINGS_ALL_TO_ALL"].backward
        assert torch.allclose(codec.decode(codec.encode(tiny)), tiny, rtol=1e-3, atol=0) == survives
