"""FBGEMM's CPU lookups on all cores: cut by lanes, chunk by chunk on PyTorch's number of threads.

FBGEMM's CPU wheel is built without OpenMP: one call keeps one core busy, whatever `torch.set_num_threads` says. Here a
lookup becomes several, each of some neighbouring lanes:

    lanes     0 1 2 | 3 4 | 5 6 7         a table's lanes stay together: no two threads update one row
    ids       ------|-----|--------       lane after lane, so a chunk's ids are one slice
    output    columns of 0-2 | 3-4 | 5-7  each chunk fills its own (a sequence lookup: its own rows)

Backward goes chunk by chunk as well. Every table sees the calls that it would see without chunks, so the numbers are
the same to the bit. On one thread (ranks have one each), for few ids, on a GPU and while a model is traced there is one
chunk, and no thread is started.

Shapes: B batch, L lanes, N values, D columns of all lanes.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from recsys_edu.kernels import reference

CHUNKS_PER_THREAD = 4  # small enough that a chunk's output is still in the core's cache when it is copied to its place
FEW_NUMBERS = {"forward": 2**22, "backward": 2**19}  # in the rows looked up: below, threads cost what they save


@dataclass(frozen=True)
class Chunk:
    """Neighbouring lanes, `first` to `last` (not included), and the columns that they fill, `start` to `end`."""

    first: int
    last: int
    start: int
    end: int

    @property
    def lanes(self) -> slice:
        return slice(self.first, self.last)

    @property
    def num_lanes(self) -> int:
        return self.last - self.first

    @property
    def width(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Ids:
    """The ids of some lanes as kernels take them: [N], [L * B + 1], [N]."""

    values_N: Tensor
    offsets: Tensor
    per_sample_weights_N: Tensor | None = None


def chunks_for(
    lane_tables: tuple[int, ...], lane_dims: tuple[int, ...], values_N: Tensor, backward: bool
) -> tuple[Chunk, ...]:
    """The chunks that a lookup of these ids falls into here: one, unless threads would help.

    `backward`: whether a backward follows, which is most of the work.
    """
    # What a tracer passes off as a tensor is of another type, and only the tracing thread can follow it.
    plain = type(values_N) in (Tensor, torch.nn.Parameter) and values_N.device.type == "cpu"
    threads = torch.get_num_threads() if plain and not torch.compiler.is_compiling() else 1
    if threads > 1:
        numbers = values_N.numel() * sum(lane_dims) // max(len(lane_dims), 1)
        if numbers > FEW_NUMBERS["backward" if backward else "forward"]:
            return cut(lane_tables, lane_dims, CHUNKS_PER_THREAD * threads)
    return cut(lane_tables, lane_dims, 1)


@functools.lru_cache(maxsize=256)
def cut(lane_tables: tuple[int, ...], lane_dims: tuple[int, ...], count: int) -> tuple[Chunk, ...]:
    """At most `count` chunks of about as many columns each, cut only where no table has lanes on both sides.

    >>> [chunk.lanes for chunk in cut((0, 0, 1, 2), (8, 8, 8, 8), 2)]
    [slice(0, 2, None), slice(2, 4, None)]
    """
    columns = list(itertools.accumulate(lane_dims, initial=0))
    last_lane = {table: lane for lane, table in enumerate(lane_tables)}
    chunks: list[Chunk] = []
    first = reach = 0
    for lane, table in enumerate(lane_tables):
        reach = max(reach, last_lane[table])
        full = columns[lane + 1] * count >= columns[-1] * (len(chunks) + 1)
        if reach == lane and (full or lane + 1 == len(lane_tables)):
            chunks.append(Chunk(first, lane + 1, columns[first], columns[lane + 1]))
            first = lane + 1
    return tuple(chunks)


def lookup_in_chunks(
    lookup: Callable[[Chunk, Ids], Tensor],
    chunks: Sequence[Chunk],
    num_lanes: int,
    pooled: bool,
    ids: Ids,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """What `lookup` answers for all lanes, [B, D] for bags and [N, D] for sequences, without gradients."""
    if len(chunks) == 1:
        return lookup(chunks[0], ids)
    parts = _parts(chunks, num_lanes, ids)
    return _fill(lambda index: lookup(chunks[index], parts[index]), chunks, parts, pooled, dtype)


class LookupInChunks(torch.autograd.Function):
    """`lookup_in_chunks` with gradients: each chunk is recorded, and later differentiated, by itself.

    `lookup` also takes the chunk's root: the buffer of tables that it is differentiable in. A fused lookup updates its
    root during backward and leaves no gradient for it.
    """

    @staticmethod
    def forward(
        ctx,
        lookup: Callable[[Chunk, Ids, Tensor], Tensor],
        chunks: Sequence[Chunk],
        num_lanes: int,
        pooled: bool,
        values_N: Tensor,
        offsets: Tensor,
        per_sample_weights_N: Tensor | None,
        *roots: Tensor,
    ) -> Tensor:
        if per_sample_weights_N is not None:
            per_sample_weights_N = per_sample_weights_N.detach()
        parts = _parts(chunks, num_lanes, Ids(values_N, offsets, per_sample_weights_N))
        leaves = [root.detach().requires_grad_(needed) for root, needed in zip(roots, ctx.needs_input_grad[7:])]
        if ctx.needs_input_grad[6]:
            for part in parts:
                part.per_sample_weights_N.requires_grad_()
        edges: list[GradientEdge | None] = [None] * len(chunks)

        def record(index: int) -> Tensor:
            with torch.enable_grad():
                answer = lookup(chunks[index], parts[index], leaves[index])
            edges[index] = get_gradient_edge(answer) if answer.requires_grad else None
            return answer.detach()

        ctx.save_for_backward(offsets)  # a second backward has to be asked for, as everywhere in PyTorch
        ctx.chunks, ctx.parts, ctx.leaves, ctx.edges, ctx.pooled = chunks, parts, leaves, edges, pooled
        return record(0) if len(chunks) == 1 else _fill(record, chunks, parts, pooled, torch.float32)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        _ = ctx.saved_tensors
        places = _places(gradient, ctx.chunks, ctx.parts, ctx.pooled) if len(ctx.chunks) > 1 else [gradient]
        found: list[dict[int, Tensor | None]] = [{} for _ in ctx.chunks]

        def differentiate(index: int) -> None:
            wanted = [x for x in (ctx.leaves[index], ctx.parts[index].per_sample_weights_N) if _differentiable(x)]
            if ctx.edges[index] is None:
                return
            part = gradient.contiguous() if len(places) == 1 else torch.from_numpy(places[index].numpy().copy())
            # The inner graph is kept for callers who run backward twice; it goes when the outer one does.
            answers = torch.autograd.grad([ctx.edges[index]], wanted, part, retain_graph=True, allow_unused=True)
            found[index] = {id(x): answer for x, answer in zip(wanted, answers)}

        on_threads(differentiate, len(ctx.chunks))
        samples = None
        if ctx.needs_input_grad[6]:
            samples = torch.cat([each[id(part.per_sample_weights_N)] for each, part in zip(found, ctx.parts)])
        roots = [each.get(id(leaf)) for each, leaf in zip(found, ctx.leaves)]
        return None, None, None, None, None, None, samples, *roots


def on_threads(job: Callable[[int], None], count: int) -> None:
    """Call `job` with 0 ... count - 1 on as many threads as PyTorch has, this one among them; all end before this does.

    Raises:
        Exception: the first that a job raised.
    """
    helpers = min(torch.get_num_threads(), count) - 1
    numbers = iter(range(count))  # each thread takes the next when it is free
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()  # PyTorch keeps both for each thread

    def work() -> None:
        with torch.inference_mode(inference), torch.set_grad_enabled(grad):
            for number in numbers:
                job(number)

    if helpers <= 0:
        return work()
    waiting = [_pool(os.getpid(), helpers).submit(work) for _ in range(helpers)]
    try:
        work()
    finally:
        wait(waiting)
    for helper in waiting:
        helper.result()


@functools.lru_cache(maxsize=1)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    del process  # a forked process has none of its parent's threads and needs a pool of its own
    return ThreadPoolExecutor(threads, "lookup")


def _parts(chunks: Sequence[Chunk], num_lanes: int, ids: Ids) -> list[Ids]:
    """Each chunk's ids, its offsets starting at 0."""
    if len(chunks) == 1:
        return [ids]
    batch_size, bounds = reference.batch_size_of(ids.offsets, num_lanes), reference.lane_bounds(ids.offsets, num_lanes)
    parts = []
    for chunk in chunks:
        values = slice(bounds[chunk.first], bounds[chunk.last])
        offsets = ids.offsets[chunk.first * batch_size : chunk.last * batch_size + 1] - values.start
        weights = ids.per_sample_weights_N
        parts.append(Ids(ids.values_N[values], offsets, None if weights is None else weights[values]))
    return parts


def _fill(
    lookup: Callable[[int], Tensor], chunks: Sequence[Chunk], parts: Sequence[Ids], pooled: bool, dtype: torch.dtype
) -> Tensor:
    """One output for all chunks, each copied to its place by the thread that looked it up."""
    if pooled:
        rows = (parts[0].offsets.numel() - 1) // chunks[0].num_lanes
        output = torch.empty(rows, chunks[-1].end, dtype=dtype)
    else:
        dim = chunks[0].width // chunks[0].num_lanes
        output = torch.empty(sum(part.values_N.numel() for part in parts), dim, dtype=dtype)
    places = _places(output, chunks, parts, pooled)

    def look_up(index: int) -> None:
        places[index].numpy()[...] = lookup(index).numpy()  # NumPy copies on this thread; PyTorch would call on more

    on_threads(look_up, len(chunks))
    return output


def _places(output: Tensor, chunks: Sequence[Chunk], parts: Sequence[Ids], pooled: bool) -> list[Tensor]:
    """Where each chunk's answer stands in the output: columns of bags, rows of sequences."""
    if pooled:
        return [output[:, chunk.start : chunk.end] for chunk in chunks]
    return list(output.split([part.values_N.numel() for part in parts]))


def _differentiable(x: Tensor | None) -> bool:
    return x is not None and x.requires_grad
