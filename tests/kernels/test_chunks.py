"""Lookups in chunks answer and train as the one call does, to the bit, and leave the threads in order."""

from __future__ import annotations

import itertools
import os
import threading

import pytest
import torch
from kernel_helpers import assert_same_tables, make_spec, random_batch, with_random_weights

from recsys_edu.kernels import chunks, fbgemm, lookup, make_kernel
from recsys_edu.kernels.chunks import Chunk, chunks_for, cut, on_threads
from recsys_edu.kernels.modules import FbgemmFusedKernel
from recsys_edu.kernels.quantized import QuantizedKernel, QuantizedSpec
from recsys_edu.kernels.quantized_rows import quantize_rows
from recsys_edu.types import DataType

THREADS = 3
NEVER = {"forward": 10**12, "backward": 10**12}
ALWAYS = {"forward": -1, "backward": -1}
# Tables with several lanes, an unused one, one of a single row, and lanes that do not ascend.
LANES = [(0, 1, 2), (0, 0, 1, 3, 3, 3), (2, 1, 0), (0, 1, 0, 2, 2), (1,)]
ROWS, DIMS = (50, 20, 1, 7), (8, 4, 16, 4)


@pytest.fixture(autouse=True)
def _three_threads():
    torch.set_num_threads(THREADS)


def run_both(monkeypatch, run):
    """What `run` gives with one call and with chunks; how many chunks the second took."""
    answers, counts = [], []
    real = chunks.cut

    def counted(*arguments):
        found = real(*arguments)
        counts.append(len(found))
        return found

    for few in (NEVER, ALWAYS):
        monkeypatch.setattr(chunks, "FEW_NUMBERS", few)
        monkeypatch.setattr(chunks, "cut", counted)
        counts.clear()
        answers.append(run())
    return *answers, max(counts, default=0)


@pytest.mark.parametrize("count", [1, 2, 5, 100])
@pytest.mark.parametrize("lanes", LANES)
def test_chunks_cover_the_lanes_in_order_and_never_share_a_table(lanes, count):
    dims = tuple(DIMS[table] for table in lanes)
    found = cut(lanes, dims, count)
    assert [lane for chunk in found for lane in range(chunk.first, chunk.last)] == list(range(len(lanes)))
    assert (found[0].start, found[-1].end) == (0, sum(dims))
    assert all(before.end == after.start for before, after in itertools.pairwise(found))
    assert all(chunk.width == sum(dims[chunk.lanes]) for chunk in found)
    tables = [set(lanes[chunk.lanes]) for chunk in found]
    assert sum(map(len, tables)) == len(set.union(*tables))
    assert len(found) <= count


def test_columns_are_shared_out_evenly():
    assert cut((0, 1, 2, 3), (8, 8, 8, 8), 2) == (Chunk(0, 2, 0, 16), Chunk(2, 4, 16, 32))
    assert [chunk.num_lanes for chunk in cut(tuple(range(12)), (4,) * 12, 4)] == [3, 3, 3, 3]


@pytest.mark.fbgemm
@pytest.mark.parametrize("id_type", [torch.int32, torch.int64])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("data_type", [DataType.FP32, DataType.FP16])
@pytest.mark.parametrize("optimizer", [None, "SGD", "ADAGRAD", "ROWWISE_ADAGRAD", "ADAM"])
@pytest.mark.parametrize("lanes", LANES)
def test_training_is_the_same_to_the_bit(monkeypatch, lanes, optimizer, data_type, weighted, id_type):
    spec = make_spec(lanes, True, optimizer, data_type, ROWS, DIMS)
    kernels = iter(with_random_weights(make_kernel(spec, backend="fbgemm"), make_kernel(spec, backend="fbgemm")))
    batches = [random_batch(spec, 30, id_type) for _ in range(3)] + [random_batch(spec, 1, id_type)]
    sample_weights = [torch.rand(ids.numel()) if weighted else None for ids, _ in batches]
    width = spec.output_dim
    gradients = [torch.randn(30, width) for _ in range(3)] + [torch.randn(1, width)]

    def run():
        kernel, outs, sample_gradients = next(kernels), [], []
        for (ids, offsets), weights, gradient in zip(batches, sample_weights, gradients):
            weights = None if weights is None else weights.clone().requires_grad_(optimizer is None)
            outs.append(kernel(ids, offsets, weights))
            outs[-1].backward(gradient)
            sample_gradients += [weights.grad] if weighted and optimizer is None else []
        return kernel, outs, sample_gradients

    (one, one_outs, one_samples), (other, other_outs, other_samples), count = run_both(monkeypatch, run)
    # Unless FBGEMM updates them, chunks have parts of one buffer as their roots: the tables must come in order.
    in_order = list(lanes) == sorted(lanes) or isinstance(one, FbgemmFusedKernel)
    assert (count > 1) == (in_order and len(cut(lanes, spec.lane_dims, 99)) > 1)
    assert all(torch.equal(a, b) for a, b in zip(one_outs + one_samples, other_outs + other_samples, strict=True))
    assert_same_tables(one, other, rtol=0, atol=0)
    for a, b in zip(one.parameters(), other.parameters()):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or torch.equal(a.grad, b.grad)
    if optimizer:
        assert one.step_count == other.step_count


@pytest.mark.fbgemm
@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("output_dtype", [torch.float32, torch.float16])
def test_quantised_answers_are_the_same_to_the_bit(monkeypatch, pooled, weighted, output_dtype):
    lanes = (0, 1, 1, 2, 3)
    spec = make_spec(lanes, pooled, None, DataType.FP32, ROWS, DIMS)
    types = (DataType.INT8, DataType.INT4, DataType.FP16, DataType.INT8)
    kernel = QuantizedKernel(QuantizedSpec(spec.tables, types, lanes, pooled, output_dtype), backend="fbgemm")
    for index, (table, data_type) in enumerate(zip(spec.tables, types)):
        kernel.assign(index, quantize_rows(torch.randn(table.num_rows, table.dim), data_type))
    ids, offsets = random_batch(spec, 40)
    weights = torch.rand(ids.numel()) if weighted and pooled else None
    one, other, count = run_both(monkeypatch, lambda: kernel(ids, offsets, weights))
    assert count == 4
    assert one.dtype == output_dtype
    assert torch.equal(one, other)


@pytest.mark.fbgemm
@pytest.mark.parametrize("optimizer", [None, "ADAGRAD"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_of_the_caller_hold_on_every_thread(monkeypatch, mode, optimizer):
    spec = make_spec((0, 1, 2), True, optimizer, DataType.FP32, ROWS, DIMS)
    kernel = make_kernel(spec, backend="fbgemm")
    with_random_weights(kernel)
    with mode():
        batch = random_batch(spec, 30)  # made here: inference tensors must not be recorded anywhere
        one, other, count = run_both(monkeypatch, lambda: kernel(*batch))
    assert count == 3
    assert torch.equal(one, other)
    assert not other.requires_grad


@pytest.mark.fbgemm
@pytest.mark.parametrize("id_type", [torch.int32, torch.int64])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("data_type", [DataType.FP32, DataType.FP16])
@pytest.mark.parametrize("optimizer", [None, "SGD", "ADAM"])
@pytest.mark.parametrize("lanes", LANES)
def test_bags_of_one_id_are_gathered_to_the_same_numbers(monkeypatch, lanes, optimizer, data_type, weighted, id_type):
    spec = make_spec(lanes, True, optimizer, data_type, ROWS, dims=(8, 8, 8, 8))
    kernel = make_kernel(spec, backend="fbgemm")
    with_random_weights(kernel)
    gathered = []
    real = fbgemm.single_id_lookup

    def spied(*arguments):
        gathered.append(real(*arguments))
        return gathered[-1]

    for module in (fbgemm, lookup):
        monkeypatch.setattr(module, "single_id_lookup", spied)
    ids = torch.cat([torch.randint(rows, (25,)) for rows in spec.lane_rows]).to(id_type)
    offsets = torch.arange(len(ids) + 1, dtype=id_type)
    weights = torch.rand(len(ids)) if weighted else None
    with torch.no_grad():
        by_gather = kernel(ids, offsets, weights)
        assert gathered.pop() is not None
        torch.set_num_threads(1)
        by_call = kernel(ids, offsets, weights)
        assert gathered.pop() is None
        torch.set_num_threads(THREADS)
        offsets[1] = 2  # as many ids as bags, but two in the first and none in the second
        kernel(ids, offsets, weights)
        assert gathered.pop() is None
    assert torch.equal(by_gather, by_call)


@pytest.mark.fbgemm
@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("optimizer", ["SGD", "ADAGRAD", "ROWWISE_ADAGRAD"])
def test_fused_tables_serve_in_inference_mode_and_train_on(optimizer, pooled):
    spec = make_spec((0, 1, 2), pooled, optimizer, DataType.FP32, ROWS, DIMS)
    kernel = make_kernel(spec, backend="fbgemm")
    with_random_weights(kernel)
    batch = random_batch(spec, 30)
    with torch.inference_mode():
        served = kernel(*batch)
    trained = kernel(*batch)
    assert torch.equal(served, trained.detach())
    trained.sum().backward()
    assert not torch.equal(kernel(*batch), served)


@pytest.mark.fbgemm
def test_a_second_backward_has_to_be_asked_for(monkeypatch):
    monkeypatch.setattr(chunks, "FEW_NUMBERS", ALWAYS)
    spec = make_spec((0, 1, 2), True, None, DataType.FP32, ROWS, DIMS)
    kernel = make_kernel(spec, backend="fbgemm")
    loss = kernel(*random_batch(spec, 30)).sum()
    loss.backward(retain_graph=True)
    first = [table.grad.clone() for table in kernel.weights if table.grad is not None]
    loss.backward()
    assert all(torch.equal(2 * a, b.grad) for a, b in zip(first, kernel.weights))
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.fbgemm
def test_gradients_of_sample_weights_see_the_tables_of_the_forward(monkeypatch):
    spec = make_spec((0, 1, 2), True, "SGD", DataType.FP32, ROWS, DIMS)
    kernels = iter(with_random_weights(make_kernel(spec, backend="fbgemm"), make_kernel(spec, backend="fbgemm")))
    ids, offsets = random_batch(spec, 30)
    given = torch.rand(ids.numel())

    def run():
        weights = given.clone().requires_grad_()
        next(kernels)(ids, offsets, weights).square().sum().backward()
        return weights.grad

    one, other, _ = run_both(monkeypatch, run)
    assert torch.equal(one, other)


@pytest.mark.parametrize(("threads", "numbers", "several"), [(1, 1 << 30, False), (3, 100, False), (3, 1 << 30, True)])
def test_few_ids_and_one_thread_take_one_chunk(threads, numbers, several):
    torch.set_num_threads(threads)
    ids = torch.empty(1, dtype=torch.int64).expand(numbers // 8)
    assert (len(chunks_for((0, 1), (8, 8), ids, backward=True)) > 1) == several


def test_traced_tensors_take_one_chunk(monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(chunks, "FEW_NUMBERS", ALWAYS)
    with FakeTensorMode():
        ids = torch.empty(100, dtype=torch.int64)
    assert len(chunks_for((0, 1), (8, 8), ids, backward=True)) == 1
    assert len(chunks_for((0, 1), (8, 8), torch.empty(100, dtype=torch.int64), backward=True)) == 2


def test_jobs_run_once_each_on_several_threads():
    done, threads, together = [], set(), threading.Barrier(THREADS, timeout=30)

    def job(number):
        if number < THREADS:
            together.wait()  # only passes when three threads are inside a job at once
        done.append(number)
        threads.add(threading.get_ident())

    on_threads(job, 20)
    assert sorted(done) == list(range(20))
    assert len(threads) == THREADS and threading.get_ident() in threads


@pytest.mark.parametrize("place", ["this thread", "a helper"])
def test_the_exception_of_a_job_is_raised_when_all_have_ended(place):
    running, together = [], threading.Barrier(THREADS, timeout=30)

    def job(number):
        together.wait()
        here = threading.current_thread() is threading.main_thread()
        if here == (place == "this thread"):
            raise KeyError(f"table {number}")
        running.append(number)

    with pytest.raises(KeyError, match="table"):
        on_threads(job, THREADS)
    assert len(running) == (THREADS - 1 if place == "this thread" else 1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own():
    on_threads(lambda number: None, 9)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        done = []
        on_threads(done.append, 9)
        os.write(writer, bytes(sorted(done)))
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as answer:
        assert answer.read() == bytes(range(9))
    assert os.waitpid(child, 0)[1] == 0
