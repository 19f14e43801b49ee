"""Fused updates: against torch.optim, FBGEMM, formulas written out by hand, and on touched rows only."""

from __future__ import annotations

import pytest
import torch
from kernel_helpers import (
    BACKENDS,
    assert_same_tables,
    both_backends,
    make_spec,
    random_batch,
    snapshot,
    with_random_weights,
)

from recsys_edu.kernels import OPTIMIZER_KINDS, OptimizerSpec, make_kernel
from recsys_edu.kernels.optimizers import ROW_OPTIMIZERS, new_state, update_rows
from recsys_edu.kernels.spec import TableSpec

ROWS = torch.tensor([3, 0])


def run_rule(spec: OptimizerSpec, weights, gradients_per_step):
    """Apply several steps to rows 3 and 0; return weights and state."""
    weights, state = weights.clone(), new_state(spec.kind, TableSpec("t", *weights.shape), torch.device("cpu"))
    for step, gradients in enumerate(gradients_per_step, start=1):
        update_rows(spec, spec.learning_rate, step, weights, state, ROWS, gradients)
    return weights, state


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch.optim.Adagrad's own
@pytest.mark.parametrize(
    ("spec", "make"),
    [
        (OptimizerSpec("SGD", 0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
        (OptimizerSpec("ADAGRAD", 0.1, eps=1e-10), lambda p: torch.optim.Adagrad(p, lr=0.1, eps=1e-10)),
        (OptimizerSpec("ADAM", 0.1), lambda p: torch.optim.SparseAdam(p, lr=0.1, eps=1e-8)),
    ],
)
def test_equal_to_torch_on_sparse_gradients(spec, make):
    weights, gradients = torch.randn(5, 4), torch.randn(4, 2, 4)
    ours, _ = run_rule(spec, weights, gradients)
    parameter = torch.nn.Parameter(weights.clone())
    optimizer = make([parameter])
    for gradient in gradients:
        sparse = torch.sparse_coo_tensor(ROWS.unsqueeze(0), gradient, (5, 4), check_invariants=True)
        parameter.grad = sparse.coalesce()
        optimizer.step()
    torch.testing.assert_close(ours, parameter.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("spec", "make"),
    [
        (OptimizerSpec("SGD", 0.1, weight_decay=0.2), lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.2)),
        (
            OptimizerSpec("ADAGRAD", 0.1, eps=1e-10, weight_decay=0.2),
            lambda p: torch.optim.Adagrad(p, lr=0.1, eps=1e-10, weight_decay=0.2),
        ),
        (OptimizerSpec("ADAM", 0.1), lambda p: torch.optim.Adam(p, lr=0.1)),
        (OptimizerSpec("ADAM", 0.1, weight_decay=0.2), lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.2)),
    ],
)
def test_equal_to_torch_where_every_row_is_touched(spec, make):
    weights, gradients = torch.randn(2, 4), torch.randn(4, 2, 4)
    parameter = torch.nn.Parameter(weights.clone())
    optimizer = make([parameter])
    state = new_state(spec.kind, TableSpec("t", 2, 4), torch.device("cpu"))
    for step, gradient in enumerate(gradients, start=1):
        update_rows(spec, spec.learning_rate, step, weights, state, torch.tensor([0, 1]), gradient)
        parameter.grad = gradient.clone()
        optimizer.step()
    torch.testing.assert_close(weights, parameter.detach(), rtol=1e-5, atol=1e-6)


def test_rowwise_adagrad_by_hand():
    spec = OptimizerSpec("ROWWISE_ADAGRAD", 0.5, eps=0.0)
    weights, state = run_rule(spec, torch.zeros(4, 2), [torch.tensor([[3.0, 4.0], [0.6, 0.8]])])
    # Row 3's mean square is 12.5, row 0's is 0.5; each row moves by lr * g / sqrt(mean square).
    assert state["momentum1"].tolist() == pytest.approx([0.5, 0, 0, 12.5])
    assert weights[3].tolist() == pytest.approx([-0.5 * 3 / 12.5**0.5, -0.5 * 4 / 12.5**0.5])
    assert weights[0].tolist() == pytest.approx([-0.5 * 0.6 / 0.5**0.5, -0.5 * 0.8 / 0.5**0.5])


def test_partial_rowwise_adam_is_adam_when_a_row_is_constant():
    gradients = torch.randn(3, 2, 1).expand(3, 2, 4).contiguous()
    adam, adam_state = run_rule(OptimizerSpec("ADAM", 0.1), torch.ones(5, 4), gradients)
    rowwise, state = run_rule(OptimizerSpec("PARTIAL_ROWWISE_ADAM", 0.1), torch.ones(5, 4), gradients)
    torch.testing.assert_close(adam, rowwise)
    torch.testing.assert_close(state["momentum2"], adam_state["momentum2"][:, 0])


def test_lamb_moves_each_row_by_the_learning_rate_times_its_length():
    weights = torch.randn(5, 4)
    moved, _ = run_rule(OptimizerSpec("LAMB", 0.1), weights, [torch.randn(2, 4)])
    torch.testing.assert_close((moved - weights)[ROWS].norm(dim=1), 0.1 * weights[ROWS].norm(dim=1))


def test_lars_by_hand():
    weights = torch.tensor([[3.0, 4.0]] * 4)
    spec = OptimizerSpec("LARS_SGD", 1.0, momentum=0.5, eta=0.1)
    gradients = [torch.tensor([[0.0, 2.0], [1.0, 0.0]])] * 2
    moved, state = run_rule(spec, weights, gradients)
    first = torch.tensor([0.0, 0.1 * 5 / 2 * 2])  # trust = eta * |w| / |g|
    second_norm = (weights[3] - first).norm()
    second = 0.5 * first + torch.tensor([0.0, 0.1 * second_norm / 2 * 2])
    torch.testing.assert_close(state["momentum1"][3], second)
    torch.testing.assert_close(moved[3], weights[3] - first - second)


@pytest.mark.fbgemm
@pytest.mark.parametrize("kind", OPTIMIZER_KINDS)
@pytest.mark.parametrize("lanes", [(0, 1), (1, 0), (0, 0, 1), (0, 1, 0), (1, 1)])
@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_backends_agree_over_several_steps(kind, lanes, pooled, weight_decay):
    optimizer = OptimizerSpec(kind, learning_rate=0.1, eps=1e-6, weight_decay=weight_decay)
    spec = make_spec(lanes, pooled, optimizer)
    one, other = both_backends(spec)
    for _ in range(4):
        ids, offsets = random_batch(spec, 5)
        sample_weights = torch.rand(len(ids)) if pooled else None
        outs = [kernel(ids, offsets, sample_weights) for kernel in (one, other)]
        torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)
        gradient = torch.randn_like(outs[0])
        for out in outs:
            out.backward(gradient)
        assert_same_tables(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", OPTIMIZER_KINDS)
def test_only_touched_rows_change(backend, kind):
    (kernel,) = with_random_weights(make_kernel(make_spec((0, 1), optimizer=kind), backend=backend))
    before = snapshot(kernel)
    kernel(torch.tensor([3, 3, 5]), torch.tensor([0, 2, 3])).sum().backward()
    weights = kernel.table_weights()
    changed = [(a != b).any(dim=1).nonzero().flatten().tolist() for a, b in zip(before, weights)]
    assert changed == [[3], [5]]
    assert not any(parameter.grad is not None for parameter in kernel.parameters())
    for state in kernel.optimizer_state():
        for name in ROW_OPTIMIZERS[kind].state:
            per_row = state[name].flatten(1).abs().sum(1) if state[name].dim() > 1 else state[name]
            assert int((per_row > 0).sum()) == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", OPTIMIZER_KINDS)
def test_a_forward_fixes_the_learning_rate_of_its_backward(backend, kind):
    kernel = make_kernel(make_spec((0,), optimizer=kind), backend=backend)
    assert kernel.learning_rate == pytest.approx(0.1)
    kernel.learning_rate = 0.0
    out = kernel(torch.tensor([2]), torch.tensor([0, 1]))
    kernel.learning_rate = 0.5
    out.sum().backward()
    assert kernel.learning_rate == pytest.approx(0.5)
    assert kernel.table_weights()[0][2].tolist() == [0.0] * 8
    kernel(torch.tensor([2]), torch.tensor([0, 1])).sum().backward()
    assert (kernel.table_weights()[0][2] < 0.0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", OPTIMIZER_KINDS)
def test_a_restored_kernel_continues_as_the_original(backend, kind):
    """Weights, state and step count copied into a fresh kernel: the next step is bit-equal."""
    spec = make_spec(optimizer=kind)
    (kernel,) = with_random_weights(make_kernel(spec, backend=backend))
    for _ in range(3):
        kernel(*random_batch(spec, 4)).square().sum().backward()
    restored = make_kernel(spec, backend=backend)
    for mine, saved in zip(restored.table_weights(), kernel.table_weights()):
        mine.copy_(saved)
    for mine, saved in zip(restored.optimizer_state(), kernel.optimizer_state()):
        for name, tensor in saved.items():
            mine[name].copy_(tensor)
    if ROW_OPTIMIZERS[kind].counts_steps:
        assert restored.step_count == 3
    ids, offsets = random_batch(spec, 4)
    for each in (kernel, restored):
        each(ids, offsets).square().sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(snapshot(kernel), snapshot(restored)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_step_count_can_be_read_and_set(backend):
    kernel = make_kernel(make_spec((0,), optimizer="ADAM"), backend=backend)
    kernel(torch.tensor([2]), torch.tensor([0, 1])).sum().backward()
    assert kernel.step_count == 1
    kernel.step_count = 41
    kernel(torch.tensor([2]), torch.tensor([0, 1])).sum().backward()
    assert kernel.step_count == 42 and int(kernel.optimizer_state()[0]["iter"]) == 42


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("kind", "state_bytes"),
    [(None, 0), ("SGD", 0), ("ROWWISE_ADAGRAD", 4 * 17), ("ADAGRAD", 4 * (80 + 28)), ("ADAM", 8 * (80 + 28) + 8)],
)
def test_memory_bytes(backend, kind, state_bytes):
    kernel = make_kernel(make_spec(optimizer=kind), backend=backend)
    assert kernel.memory_bytes() == {"weights": 4 * (80 + 28), "optimizer_state": state_bytes}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["SGD", "ADAGRAD", "ADAM"])
def test_no_update_without_gradients(backend, kind):
    (kernel,) = with_random_weights(make_kernel(make_spec(optimizer=kind), backend=backend))
    before = snapshot(kernel)
    with torch.no_grad():
        out = kernel(*random_batch(kernel.spec, 3))
    assert not out.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(kernel)))


def test_negative_hyperparameters_are_refused():
    with pytest.raises(ValueError, match="learning_rate must be >= 0"):
        OptimizerSpec("SGD", learning_rate=-1.0)
    with pytest.raises(ValueError, match="beta1 must be in"):
        OptimizerSpec("ADAM", beta1=1.0)
