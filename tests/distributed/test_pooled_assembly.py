"""Putting pooled pieces in their places: run by run and chunk by chunk, the same bits."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recsys_edu.distributed import sharding_plan as plans
from recsys_edu.distributed.pooled_assembly import Chunks, ColumnRun, _chunks_of
from recsys_edu.distributed.simulation import forward_all, simulate
from recsys_edu.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from recsys_edu.modules.embedding_modules import EmbeddingBagCollection
from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor

WORLD_SIZE, NUM_TABLES, ROWS = 4, 24, 10


def make_collection(width: int, pooling: PoolingType = PoolingType.SUM) -> EmbeddingBagCollection:
    torch.manual_seed(0)
    tables = [
        EmbeddingBagConfig(ROWS, (1 + i % 2) * width, f"t{i}", feature_names=[f"f{i}"], pooling=pooling)
        for i in range(NUM_TABLES)
    ]
    return EmbeddingBagCollection(tables)


def make_batches(sizes: list[int]) -> list[KeyedJaggedTensor]:
    generator = torch.Generator().manual_seed(1)
    batches = []
    for size in sizes:
        lengths = torch.randint(0, 4, (NUM_TABLES * size,), generator=generator)
        values = torch.randint(0, ROWS, (int(lengths.sum()),), generator=generator)
        batches.append(KeyedJaggedTensor([f"f{i}" for i in range(NUM_TABLES)], values, lengths=lengths))
    return batches


GENERATORS = {
    "dealt": lambda i: plans.table_wise(rank=i % WORLD_SIZE),
    "columns": lambda i: plans.column_wise(ranks=[i % WORLD_SIZE, (i + 1) % WORLD_SIZE]),
    "on one host": lambda i: plans.table_row_wise(host_index=i % 2),
    "mixed": lambda i: [plans.table_wise(rank=i % 3), plans.row_wise(), plans.data_parallel()][i % 3],
}


@pytest.mark.parametrize("kind", GENERATORS)
def test_chunks_give_the_bits_of_runs(kind: str) -> None:
    collection, batches = make_collection(16), make_batches([3, 0, 5, 1])
    generators = {f"t{i}": GENERATORS[kind](i) for i in range(NUM_TABLES)}
    plan = plans.construct_module_sharding_plan(
        collection, generators, world_size=WORLD_SIZE, local_size=2, device_type="cpu"
    )
    found = []
    for chunked in (True, False):
        ranks = simulate(copy.deepcopy(collection), plan, WORLD_SIZE, local_size=2)
        for rank in ranks:
            assert rank._assembly.chunks is not None
            if not chunked:
                rank._assembly.chunks = None
        answers = [answer.values() for answer in forward_all(ranks, batches)]
        torch.cat([answer.square().flatten() for answer in answers]).sum().backward()
        gradients = [p.grad for rank in ranks for _, p in sorted(rank.named_parameters())]
        found.append([*answers, *gradients])
    assert len(found[0]) == len(found[1]) > WORLD_SIZE
    for one, other in zip(*found):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ["dealt", "columns"])
def test_means_have_the_bits_of_the_unsharded_collection(kind: str) -> None:
    collection, batches = make_collection(16, PoolingType.MEAN), make_batches([3, 0, 5, 1])
    generators = {f"t{i}": GENERATORS[kind](i) for i in range(NUM_TABLES)}
    plan = plans.construct_module_sharding_plan(
        collection, generators, world_size=WORLD_SIZE, local_size=2, device_type="cpu"
    )
    for answer, batch in zip(forward_all(simulate(collection, plan, WORLD_SIZE, local_size=2), batches), batches):
        assert torch.equal(answer.values(), collection(batch).values())


def test_narrow_or_few_runs_are_copied_run_by_run() -> None:
    def runs(count: int, width: int) -> list[ColumnRun]:
        cut = [slice(i * width, (i + 1) * width) for i in range(count)]
        return [ColumnRun(0, cut[i], cut[count - 1 - i], 0) for i in range(count)]

    assert Chunks.of(runs(8, 16), [128], 128) is not None
    assert Chunks.of(runs(8, 4), [32], 32) is None
    assert Chunks.of(runs(2, 16), [32], 32) is None


@given(st.permutations(range(6)), st.integers(0, 3), st.lists(st.integers(0, 1), min_size=6, max_size=6))
def test_positions_by_hand(order: list[int], batch_size: int, sources: list[int]) -> None:
    """Chunk `order[i]` of the answer is what source `sources[i]` returns next."""
    width, width_S, runs = 8, [0, 0], []
    for answer, source in zip(order, sources):
        received = slice(width_S[source], width_S[source] + width)
        runs.append(ColumnRun(source, received, slice(answer * width, (answer + 1) * width), 0))
        width_S[source] += width
    chunks = Chunks.of(runs, width_S, 6 * width)
    assert chunks is not None
    returned = [(s, bag, c) for s in (0, 1) for bag in range(batch_size) for c in range(width_S[s] // width)]
    wanted = {order[i]: (s, sources[:i].count(s)) for i, s in enumerate(sources)}
    for at, row in enumerate(chunks.received(batch_size, torch.device("cpu")).tolist()):
        bag, answer = divmod(at, 6)
        source, place = wanted[answer]
        assert returned[row] == (source, bag, place)
    for step in (6, 9):
        back = chunks.answers(batch_size, step, torch.device("cpu")).tolist()
        assert len(back) == len(returned)
        for (source, bag, place), row in zip(returned, back):
            assert wanted[row - bag * step] == (source, place)


@pytest.mark.parametrize("size", [0, 1, 3])
def test_a_gradient_is_read_where_it_lies(size: int) -> None:
    wide = torch.arange(size * 5 * 8.0).view(size, 40)
    for gradient in (wide[:, 8:32], wide[:, 4:28], wide[:, :24].contiguous(), torch.ones(1, 1).expand(size, 24)):
        chunks, step = _chunks_of(gradient, 8)
        assert chunks.shape[1] == 8
        for bag in range(size):
            assert torch.equal(chunks[bag * step : bag * step + 3].flatten(), gradient[bag])
    assert _chunks_of(wide[:, 8:32], 8)[0].data_ptr() == wide[:, 8:32].data_ptr()  # no copy
