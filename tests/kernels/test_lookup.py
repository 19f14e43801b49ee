"""Forward and gradients of every kernel: by hand, against torch.autograd, and backend against backend."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_helpers import (
    BACKENDS,
    assert_same_tables,
    both_backends,
    make_spec,
    pooled_by_hand,
    random_batch,
    with_random_weights,
)

from recsys_edu.kernels import (
    OPTIMIZER_KINDS,
    KernelSpec,
    TableSpec,
    flat_buffer,
    flatten_tables,
    make_kernel,
    pooled_lookup,
    sequence_lookup,
)
from recsys_edu.types import DataType

LANES = [(0, 1), (1, 0), (0, 1, 0), (0, 0, 1), (1,)]
OPTIMIZERS = [None, "SGD", "ADAM"]  # dense; fused by FBGEMM; FBGEMM's forward with our own update


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("weighted", [False, True])
def test_pooled_equals_by_hand(backend, optimizer, lanes, weighted):
    spec = make_spec(lanes, optimizer=optimizer)
    (kernel,) = with_random_weights(make_kernel(spec, backend=backend))
    ids, offsets = random_batch(spec, batch_size=5)
    sample_weights = torch.rand(len(ids)) if weighted else None
    pooled_BD = kernel(ids, offsets, sample_weights)
    assert pooled_BD.dtype == torch.float32 and pooled_BD.shape == (5, spec.output_dim)
    torch.testing.assert_close(
        pooled_BD.detach(), pooled_by_hand(kernel.table_weights(), lanes, ids, offsets, sample_weights)
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("lanes", LANES)
def test_sequence_returns_each_ids_row(backend, optimizer, lanes):
    spec = make_spec(lanes, pooled=False, optimizer=optimizer)
    (kernel,) = with_random_weights(make_kernel(spec, backend=backend))
    ids, offsets = random_batch(spec, batch_size=5)
    rows_ND = kernel(ids, offsets)
    assert rows_ND.shape == (len(ids), 8)
    for lane, table in enumerate(lanes):
        span = slice(int(offsets[lane * 5]), int(offsets[(lane + 1) * 5]))
        torch.testing.assert_close(rows_ND[span].detach(), kernel.table_weights()[table][ids[span]])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lanes", LANES)
def test_dense_gradients_equal_autograd_through_indexing(backend, lanes):
    spec = make_spec(lanes)
    (kernel,) = with_random_weights(make_kernel(spec, backend=backend))
    ids, offsets = random_batch(spec, batch_size=5)
    sample_weights = torch.rand(len(ids), requires_grad=True)
    pooled_BD = kernel(ids, offsets, sample_weights)
    gradient_BD = torch.randn_like(pooled_BD)
    pooled_BD.backward(gradient_BD)

    tables = [weight.detach().clone().requires_grad_() for weight in kernel.table_weights()]
    other_weights = sample_weights.detach().clone().requires_grad_()
    expected = []
    for lane, table in enumerate(lanes):
        for example in range(5):
            bag = slice(int(offsets[lane * 5 + example]), int(offsets[lane * 5 + example + 1]))
            expected.append((other_weights[bag].unsqueeze(1) * tables[table][ids[bag]]).sum(0))
    by_lane = [torch.stack(expected[lane * 5 : (lane + 1) * 5]) for lane in range(len(lanes))]
    torch.cat(by_lane, dim=1).backward(gradient_BD)

    torch.testing.assert_close(sample_weights.grad, other_weights.grad)
    for index, (parameter, table) in enumerate(zip(kernel.parameters(), tables)):
        if index in lanes:
            torch.testing.assert_close(parameter.grad, table.grad)
        else:
            assert parameter.grad is None


@pytest.mark.fbgemm
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_backends_agree_on_any_ragged_batch(data):
    lanes = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=5))
    rows = data.draw(st.lists(st.integers(1, 20), min_size=3, max_size=3))
    dims = data.draw(st.lists(st.sampled_from([4, 8, 12]), min_size=3, max_size=3))
    optimizer = data.draw(st.sampled_from([None, "SGD", "ADAGRAD", "ROWWISE_ADAGRAD", "ADAM"]))
    spec = make_spec(lanes, data.draw(st.booleans()), optimizer, rows=rows, dims=dims)
    batch_size = data.draw(st.integers(0, 6))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    one, other = both_backends(spec)
    ids, offsets = random_batch(spec, batch_size, data.draw(st.sampled_from([torch.int32, torch.int64])))
    weighted = spec.pooled and data.draw(st.booleans())
    results = []
    gradient = None
    for kernel in (one, other):
        torch.manual_seed(1)
        sample_weights = torch.rand(len(ids), requires_grad=True) if weighted else None
        out = kernel(ids, offsets, sample_weights)
        gradient = torch.randn(out.shape) if gradient is None else gradient
        out.backward(gradient)
        gradients = [p.grad for p in kernel.parameters() if p.grad is not None] if optimizer is None else []
        gradients += [sample_weights.grad] if weighted and len(ids) else []
        results.append([out.detach(), *kernel.table_weights(), *gradients])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_empty_batches_and_lanes(backend, optimizer):
    kernel = make_kernel(make_spec((0, 1), optimizer=optimizer), backend=backend)
    none = torch.empty(0, dtype=torch.int64)
    empty = kernel(none, torch.zeros(1, dtype=torch.int64))  # B = 0
    assert empty.shape == (0, 12)
    empty.sum().backward()
    bags = kernel(none, torch.zeros(7, dtype=torch.int64))  # three examples, nothing in any bag
    assert torch.equal(bags, torch.zeros(3, 12))
    bags.sum().backward()
    for tables in ((TableSpec("t", 5, 4),), ()):
        laneless = make_kernel(KernelSpec(tables, (), True, optimizer=kernel.spec.optimizer), backend=None)
        assert laneless(none, torch.zeros(1, dtype=torch.int64)).shape == (0, 0)
        assert len(laneless.table_weights()) == len(tables)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_tables_of_one_row_of_none_and_of_millions(backend, optimizer):
    spec = make_spec((0, 2), optimizer=optimizer, rows=(1, 0, 10_000_000), dims=(4, 4, 4))
    if optimizer is None:  # a dense gradient of ten million rows is not the point here
        spec = make_spec((0, 2), optimizer="SGD", rows=(1, 0, 10_000_000), dims=(4, 4, 4))
    kernel = make_kernel(spec, backend=backend)
    kernel.table_weights()[0].fill_(2.0)
    kernel.table_weights()[2][-1] = 5.0
    out = kernel(torch.tensor([0, 0, 9_999_999]), torch.tensor([0, 2, 3]))
    assert out.tolist() == [[4.0] * 4 + [5.0] * 4]
    out.sum().backward()
    assert kernel.table_weights()[2][-1, 0] < 5.0 and kernel.table_weights()[2][0, 0] == 0.0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [None, *OPTIMIZER_KINDS])
@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("rows", [(5, 0), (0, 5), (0, 0), (1, 0, 3)])
def test_lanes_of_tables_without_rows(backend, kind, pooled, rows):
    """A rank may own none of a table's rows: its lane is then always empty."""
    spec = make_spec(range(len(rows)), pooled, kind, rows=rows, dims=(4,) * len(rows))
    kernel = make_kernel(spec, backend=backend)
    for table in kernel.table_weights():
        table.fill_(1.0)
    lengths = torch.tensor([[2 if n else 0, 0, 1 if n else 0] for n in rows])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.flatten().cumsum(0)])
    out = kernel(torch.zeros(int(offsets[-1]), dtype=torch.int64), offsets)
    out.sum().backward()
    if pooled:
        assert out[0].tolist() == [2.0 if n else 0.0 for n in rows for _ in range(4)]
    else:
        assert torch.equal(out.detach(), torch.ones(int(offsets[-1]), 4))
    if kind == "SGD":
        assert all(table[0].tolist() == pytest.approx([0.7] * 4) for table in kernel.table_weights() if len(table))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_integer_types_and_strided_input(backend, optimizer):
    spec = make_spec(optimizer=optimizer)
    (kernel,) = with_random_weights(make_kernel(spec, backend=backend))
    ids, offsets = random_batch(spec, batch_size=4)
    expected = kernel(ids, offsets).detach()
    strided = torch.stack([ids, ids + 1], dim=1)[:, 0]
    assert not strided.is_contiguous() or len(ids) < 2
    for values, starts in [(ids.int(), offsets), (ids, offsets.int()), (ids.int(), offsets.int()), (strided, offsets)]:
        assert torch.equal(kernel(values, starts).detach(), expected)
    with pytest.raises(TypeError, match="int32 or int64"):
        kernel(ids.float(), offsets)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("data_type", [DataType.FP16, DataType.BF16])
@pytest.mark.parametrize("pooled", [True, False])
def test_narrow_weights_are_summed_in_float32(backend, data_type, pooled):
    spec = make_spec(pooled=pooled, optimizer="SGD", data_type=data_type)
    if backend == "fbgemm" and data_type == DataType.BF16:
        kernel = make_kernel(spec)
        assert kernel.backend == "pytorch" and "BF16" in kernel.backend_reason
        with pytest.raises(ValueError, match="BF16"):
            make_kernel(spec, backend="fbgemm")
    else:
        kernel = make_kernel(spec, backend=backend)
    with_random_weights(kernel)
    ids, offsets = random_batch(spec, batch_size=5)
    before = [table.float() for table in kernel.table_weights()]
    out = kernel(ids, offsets)
    assert out.dtype == torch.float32
    reference = make_kernel(make_spec(pooled=pooled, optimizer="SGD"), backend="pytorch")
    for table, values in zip(reference.table_weights(), before):
        table.copy_(values)
    expected = reference(ids, offsets)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    out.sum().backward()
    expected.sum().backward()
    for table, wide in zip(kernel.table_weights(), reference.table_weights()):
        torch.testing.assert_close(table.float(), wide, rtol=1e-2, atol=1e-2)


def test_odd_dims_go_to_pytorch_and_say_so():
    kernel = make_kernel(make_spec(dims=(6, 4)))
    if kernel.backend_reason and "multiples of 4" not in kernel.backend_reason:
        pytest.skip(f"FBGEMM is out anyway: {kernel.backend_reason}")
    assert kernel.backend == "pytorch"
    assert kernel(*random_batch(kernel.spec, 3)).shape == (3, 16)


def test_lanes_that_share_a_table_apart_are_updated_by_our_own_optimizer():
    kernel = make_kernel(make_spec((0, 1, 0), optimizer="ADAGRAD"))
    if kernel.backend == "pytorch":
        pytest.skip(kernel.backend_reason)
    assert "side by side" in kernel.backend_reason


def test_a_bad_spec_is_refused():
    with pytest.raises(ValueError, match="lane 1 reads table 5"):
        make_spec((0, 5))
    with pytest.raises(ValueError, match="share one dim"):
        KernelSpec((TableSpec("a", 3, 4), TableSpec("b", 3, 8)), (0, 1), pooled=False)
    with pytest.raises(ValueError, match="INT8"):
        make_spec(data_type=DataType.INT8)
    with pytest.raises(ValueError, match="'ADAMAX'"):
        make_spec(optimizer="ADAMAX")
    with pytest.raises(ValueError, match="offsets for 3 lanes"):
        make_kernel(make_spec())(torch.tensor([0]), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="'cutlass'"):
        make_kernel(make_spec(), backend="cutlass")


def test_flatten_keeps_parameters_and_values_and_is_idempotent():
    parameters = [torch.nn.Parameter(torch.randn(rows, dim)) for rows, dim in ((5, 4), (0, 8), (3, 8))]
    values = [parameter.detach().clone() for parameter in parameters]
    assert flat_buffer(parameters) is None
    assert flatten_tables(parameters)
    flat = flat_buffer(parameters)
    assert torch.equal(flat, torch.cat([value.flatten() for value in values]))
    address = flat.data_ptr()
    assert flatten_tables(parameters) and flat_buffer(parameters).data_ptr() == address
    with torch.no_grad():
        parameters[0][0, 0] = 42.0
    assert flat[0] == 42.0
    assert not flatten_tables([parameters[0], parameters[0]])
    assert not flatten_tables([torch.nn.Parameter(torch.empty(2, 4, device="meta"))])
    assert not flatten_tables([parameters[0], torch.nn.Parameter(torch.zeros(2, 4, dtype=torch.float16))])


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_functional_lookup_is_differentiable_flat_or_not(flat, weighted):
    spec = make_spec()
    parameters = [torch.nn.Parameter(torch.randn(table.num_rows, table.dim)) for table in spec.tables]
    parameters[1].requires_grad_(False)
    if flat:
        flatten_tables(parameters)
    ids, offsets = random_batch(spec, 5)
    results = []
    for backend in (None, "pytorch"):
        sample_weights = torch.linspace(0, 1, len(ids)).requires_grad_() if weighted else None
        out = pooled_lookup(parameters, spec.lane_tables, ids, offsets, sample_weights, backend)
        out.square().sum().backward(retain_graph=True)
        results.append([out.detach(), parameters[0].grad, sample_weights.grad if weighted else torch.zeros(1)])
        assert parameters[1].grad is None
        parameters[0].grad = None
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


def test_backward_twice_and_after_an_in_place_update():
    parameters = [torch.nn.Parameter(torch.ones(3, 4))]
    flatten_tables(parameters)
    out = pooled_lookup(parameters, (0,), torch.tensor([0, 0, 2]), torch.tensor([0, 2, 3]))
    out.sum().backward(retain_graph=True)
    with torch.no_grad():
        parameters[0].add_(1.0)
    out.sum().backward()
    assert parameters[0].grad[:, 0].tolist() == [4.0, 0.0, 2.0]


def test_sequence_lookup_gradient_counts_repeats():
    parameters = [torch.nn.Parameter(torch.ones(3, 4))]
    sequence_lookup(parameters, (0,), torch.tensor([0, 0, 2]), torch.tensor([0, 2, 3])).sum().backward()
    assert parameters[0].grad[:, 0].tolist() == [2.0, 0.0, 1.0]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_copied_kernel_is_independent_and_equal(optimizer):
    spec = make_spec(optimizer=optimizer)
    (kernel,) = with_random_weights(make_kernel(spec))
    ids, offsets = random_batch(spec, 4)
    twin = copy.deepcopy(kernel).to("cpu")
    assert flat_buffer(twin.table_weights()) is not None
    torch.testing.assert_close(twin(ids, offsets), kernel(ids, offsets))
    twin.table_weights()[0].zero_()
    assert kernel.table_weights()[0].abs().sum() > 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("pooled", [True, False])
def test_deterministic_algorithms_are_allowed(backend, optimizer, pooled):
    torch.use_deterministic_algorithms(True)
    try:
        spec = make_spec(pooled=pooled, optimizer=optimizer)
        runs = []
        for _ in range(2):
            torch.manual_seed(3)
            (kernel,) = with_random_weights(make_kernel(spec, backend=backend))
            ids, offsets = random_batch(spec, 6)
            kernel(ids, offsets).square().sum().backward()
            runs.append([p.grad for p in kernel.parameters() if p.grad is not None] + kernel.table_weights())
        assert all(torch.equal(a, b) for a, b in zip(*runs))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.fbgemm
@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("kind", ["SGD", "ADAGRAD", "ROWWISE_ADAGRAD", "ADAM"])
def test_backends_agree_at_size_and_on_two_threads(kind, pooled):
    """Thousands of ids, most of them few hot rows: the sorting and threading of real batches."""
    torch.set_num_threads(2)
    spec = make_spec((1, 0, 0, 2), pooled, kind, rows=(3000, 2000, 1), dims=(8, 16, 4))
    one, other = both_backends(spec)
    for _ in range(2):
        ids, offsets = random_batch(spec, 200, longest=20)
        bounds = offsets[::200].tolist()
        for start, stop, rows in zip(bounds, bounds[1:], spec.lane_rows):
            ids[start:stop] = (torch.rand(stop - start) ** 4 * rows).long()
        outs = [kernel(ids, offsets) for kernel in (one, other)]
        torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-4)
        gradient = torch.randn_like(outs[0])
        for out in outs:
            out.backward(gradient)
    assert_same_tables(one, other, rtol=1e-3, atol=1e-3)
