"""Starting the flights of later batches, and handing them to the sharded modules when those are called.

No tracing, no patched `forward`. One forward pre-hook stands at every sharded module:

    first batch      it notes which object arrives, and looks where in the batch that same object is:
                     `sparse_arch.ebc` gets `batch.sparse_features`
    later batches    the pipeline has called `start_input` and `exchange_input` on `batch.sparse_features` while the
                     batch before was computed. When that very object arrives, the hook puts its half-finished Flight
                     in its place, and `forward` goes on from there. Any other object goes through as it is.

So a model that turns out to do something else with a batch is slower and never wrong. What cannot be prepared (a
KeyedJaggedTensor made inside the model, or a part of the batch that ranks do not agree on) is named once in a warning.

A rank that has no batch says so in the flight's exchange of sizes (`start_absent`), and all ranks learn it together:
a loader that fails on one rank stops the others with its reason, in place of a hang.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from recsys_edu.distributed.exchange import gather_objects
from recsys_edu.distributed.flight import Flight, NoBatch
from recsys_edu.distributed.model_parallel import get_unwrapped_module
from recsys_edu.distributed.spans import span
from recsys_edu.distributed.train_pipeline.pipeline_context import TrainPipelineContext
from recsys_edu.distributed.train_pipeline.utils import new_stream, on_stream, record_stream
from recsys_edu.distributed.types import ShardedModule, ShardingEnv2D
from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor

Path = tuple[tuple[str, Any], ...]
"""Steps from the batch to one of its parts: ("attribute", "sparse_features"), ("item", 0), ..."""

# What a rank says in place of a batch.
FAILED, ENDED, NOT_THERE = 1, 2, 3
DEEPEST = 6  # levels of a batch that are searched


class InputFlights:
    """The sharded modules of a model, which part of a batch feeds each, and the flights about to be handed over.

    Args:
        model: anything that holds sharded modules, under DistributedModelParallel or not.
        device: where the flights' tensors are.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._device, self._stream = device, new_stream(device, priority=-1)
        named = get_unwrapped_module(model).named_modules()
        self.modules = {
            path: module
            for path, module in named
            if isinstance(module, ShardedModule) and hasattr(module, "start_absent")
        }
        self.routes: list[tuple[str, str, Path]] | None = None
        """(name of the flight, path of the module, where in the batch); None until a batch was watched."""
        self._hooks = [
            module.register_forward_pre_hook(self._hook_of(path), with_kwargs=True)
            for path, module in self.modules.items()
        ]
        self._everyone = _group_of_all_copies(model)
        self._arrivals: list[tuple[str, Path | None]] | None = None
        self._places: dict[int, Path] = {}
        self._ready: dict[tuple[str, int], deque[Flight]] = {}

    @property
    def world_size(self) -> int:
        return max((module.shards.exchange.world_size for module in self.modules.values()), default=1)

    def remove(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    # ------------------------------------------------------------ learning

    @contextmanager
    def watch(self, batch: Any) -> Iterator[None]:
        """Around the first forward: learn what feeds which module. All ranks do this at the same time."""
        self._arrivals, self._places = [], find_kjts(batch)
        try:
            yield
            arrivals = self._arrivals
        finally:
            self._arrivals, self._places = None, {}
        self._learn(arrivals)

    def _learn(self, arrivals: list[tuple[str, Path | None]]) -> None:
        routes, problems = [], []
        for path, module in self.modules.items():
            places = [place for arrived, place in arrivals if arrived == path]
            everywhere = gather_objects(places, _group_of(module))
            if any(other != places for other in everywhere):
                problems.append(f"{path!r} is fed by different parts of the batch on different ranks")
                continue
            routes += [(f"{path}[{call}]", path, place) for call, place in enumerate(places) if place is not None]
            if None in places:
                problems.append(
                    f"{path!r} gets a KeyedJaggedTensor that is no part of the batch (made, picked or processed inside "
                    "the model)"
                )
        self.routes = routes
        ranks = [module.shards.exchange.rank for module in self.modules.values()]
        if problems and ranks[0] == 0:
            warnings.warn(
                f"not pipelined: {'; '.join(problems)}. Ids are then exchanged when the model gets there, and nothing "
                "else changes. To pipeline it, make the KeyedJaggedTensor where batches are made, keep it in the "
                "batch, and pass that object on unchanged",
                stacklevel=6,
            )

    def agree(self, context: TrainPipelineContext) -> None:
        """Where no flight carries the news (the first batch, and models that cannot be pipelined): who has a batch?"""
        module = next(iter(self.modules.values()), None)
        if module is not None and self.world_size > 1:
            mine = 0 if context.absent is None else _reason(context.absent)
            self._resolve(context, module, gather_objects(mine, _group_of(module)))
        self._agree_with_copies(context)

    def _agree_with_copies(self, context: TrainPipelineContext) -> None:
        """Under 2D parallelism a flight's news reach one group of ranks; the dense layers need the same verdict in all.

        Costs a small exchange per batch, which a model in one group does not have.
        """
        if self._everyone is None:
            return
        failure = context.failure
        told = None if failure is None else context.news or str(failure)
        found = gather_objects((told, context.ended_everywhere), self._everyone)
        news = next((text for text, _ in found if text is not None), None)
        if news is None and any(ended for _, ended in found):
            short = [rank for rank, (_, ended) in enumerate(found) if ended]
            news = _uneven({rank: ENDED if rank in short else 0 for rank in range(len(found))}, context.index)
            news = None if len(short) == len(found) else news
        if news is not None and failure is None:
            context.failure = RuntimeError(f"no rank trained on batch {context.index}: {news}")
            context.ended_everywhere = False

    # ------------------------------------------------------------ starting

    def start(self, batch: Any, context: TrainPipelineContext) -> None:
        """Phase 1 for every module that this batch feeds."""
        context.started = True
        with span("start input"), on_stream(self._stream):
            self._wait_for_copy(batch, context)
            for name, path, place in self.routes or []:
                context.input_dist_splits_requests[name] = self._start(name, self.modules[path], batch, place, context)
            self._note_event(context)

    def _start(self, name: str, module: Any, batch: Any, place: Path, context: TrainPipelineContext) -> Flight:
        if context.absent is not None:
            return module.start_absent(_reason(context.absent))
        try:
            kjt = at(batch, place)
            if not isinstance(kjt, KeyedJaggedTensor):
                return module.start_absent(NOT_THERE)
            flight = module.start_input(kjt)
        except Exception as error:  # this rank's batch is unfit; the others must hear of it
            context.absent = error
            return module.start_absent(FAILED)
        context.given[name] = kjt
        return flight

    def exchange(self, context: TrainPipelineContext) -> None:
        """Phase 2 for every flight of the batch; what is wrong with the batch on any rank becomes its failure."""
        with span("exchange input"), on_stream(self._stream):
            for name, path, _ in self.routes or []:
                flight = context.input_dist_splits_requests.pop(name, None)
                if flight is None:
                    continue
                try:
                    self.modules[path].exchange_input(flight)
                    context.input_dist_tensors_requests[name] = flight
                except NoBatch as news:
                    self._resolve(context, self.modules[path], news.reason_W)
                except (IndexError, ValueError) as error:  # bad ids or lengths on some rank, told to all
                    context.failure = context.failure or error
            self._note_event(context)
        self._agree_with_copies(context)

    def _resolve(self, context: TrainPipelineContext, module: Any, reason_W: list[int]) -> None:
        """Make one verdict of what all ranks said; the same on each of them."""
        if context.failure is not None or not any(reason_W) or set(reason_W) == {NOT_THERE}:
            return
        if set(reason_W) == {ENDED}:
            context.ended_everywhere = True
            return
        if FAILED not in reason_W:
            group = _group_of(module)
            ranks = range(len(reason_W)) if group is None else dist.get_process_group_ranks(group)
            context.failure = RuntimeError(_uneven(dict(zip(ranks, reason_W)), context.index))
            return
        mine = context.absent
        telling = None if mine is None or isinstance(mine, StopIteration) else f"{type(mine).__name__}: {mine}"
        me = dist.get_rank() if dist.is_initialized() else 0
        told_W = gather_objects((me, telling), _group_of(module))
        news = "; ".join(f"rank {rank}: {text}" for rank, text in told_W if text is not None)
        context.news = news
        if telling is None:
            context.failure = RuntimeError(f"no rank trained on batch {context.index}: {news}")
        else:
            mine.add_note(f"batch {context.index}, which no rank trained on. {news}")
            context.failure = mine

    # ------------------------------------------------------------ handing over

    @contextmanager
    def hand_over(self, context: TrainPipelineContext) -> Iterator[None]:
        """Around a forward: sharded modules get the flights of this batch."""
        if self._stream is not None:
            self._give_to_current_stream(context)
        for name, path, _ in self.routes or []:
            flight = context.input_dist_tensors_requests.pop(name, None)
            if flight is not None:
                self._ready.setdefault((path, id(context.given[name])), deque()).append(flight)
        try:
            yield
        finally:
            self._ready.clear()

    def _hook_of(self, path: str) -> Any:
        def before_forward(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            features = args[0] if args else kwargs.get("features")
            if self._arrivals is not None and not isinstance(features, Flight):
                self._arrivals.append((path, self._places.get(id(features))))
            flights = self._ready.get((path, id(features)))
            if not flights:
                return None
            flight = flights.popleft()
            return ((flight, *args[1:]), kwargs) if args else (args, {**kwargs, "features": flight})

        return before_forward

    # ------------------------------------------------------------ CUDA: written with care, not run on a GPU yet

    def _wait_for_copy(self, batch: Any, context: TrainPipelineContext) -> None:
        if self._stream is not None:
            for event in context.events:
                self._stream.wait_event(event)
            record_stream(batch, self._stream)

    def _note_event(self, context: TrainPipelineContext) -> None:
        if self._stream is not None:
            context.events.append(self._stream.record_event())

    def _give_to_current_stream(self, context: TrainPipelineContext) -> None:
        """The flights' tensors come from this class's stream; the stream that computes waits, and keeps them alive."""
        stream = torch.cuda.current_stream(self._device)
        for event in context.events:
            stream.wait_event(event)
        for flight in context.input_dist_tensors_requests.values():
            transfers = [transfer.received for transfer in (flight.payload, flight.sizes) if transfer is not None]
            wire = [flight.wire.lengths_LB, flight.wire.values_N, flight.wire.source_N]
            under_way = [transfer.received for transfer in flight.under_way.values()]
            for tensor in (*transfers, *wire, *under_way, flight.weights):
                if tensor is not None:
                    record_stream(tensor, stream)
            record_stream(flight.kjt, stream)


def find_kjts(batch: Any) -> dict[int, Path]:
    """Where the batch holds KeyedJaggedTensors: identity of the object to the first path that leads to it.

    Looks into attributes (dataclasses and others), mappings, lists and tuples, nested.
    """
    found: dict[int, Path] = {}
    seen: set[int] = set()

    def visit(value: Any, path: Path) -> None:
        if isinstance(value, KeyedJaggedTensor):
            found.setdefault(id(value), path)
            return
        if isinstance(value, (Tensor, nn.Module, str, bytes, type)) or id(value) in seen or len(path) > DEEPEST:
            return
        seen.add(id(value))
        if isinstance(value, Mapping):
            parts = [("item", key, part) for key, part in value.items()]
        elif isinstance(value, (list, tuple)):
            parts = [("item", index, part) for index, part in enumerate(value)]
        else:
            names = [*getattr(value, "__dict__", ()), *getattr(type(value), "__slots__", ())]
            parts = [("attribute", name, getattr(value, name, None)) for name in names]
        for kind, key, part in parts:
            visit(part, (*path, (kind, key)))

    visit(batch, ())
    return found


def at(batch: Any, path: Path) -> Any:
    """The part of the batch at `path`; None where this batch has no such part."""
    for kind, key in path:
        try:
            batch = getattr(batch, key) if kind == "attribute" else batch[key]
        except (AttributeError, KeyError, IndexError, TypeError):
            return None
    return batch


def _reason(absent: Exception) -> int:
    return ENDED if isinstance(absent, StopIteration) else FAILED


def _group_of(module: Any) -> Any:
    return getattr(module.shards.exchange, "group", None)


def _group_of_all_copies(model: nn.Module) -> dist.ProcessGroup | None:
    """The ranks that train together where the sharded modules' groups are smaller: under a DMPCollection."""
    envs = [getattr(module, "_env", None) for module in model.modules()]
    return next((env.global_pg for env in envs if isinstance(env, ShardingEnv2D)), None)


def _uneven(reasons: Mapping[int, int], index: int | None) -> str:
    ended = [rank for rank, reason in reasons.items() if reason == ENDED]
    others = [rank for rank, reason in reasons.items() if reason != ENDED]
    if ended:
        return (
            f"ranks {ended} have no batch {index}, ranks {others} have one. All ranks need the same number of batches: "
            "drop the last ones, or repeat some (every earlier batch was trained on)"
        )
    missing = [rank for rank, reason in reasons.items() if reason == NOT_THERE]
    return f"batch {index} lacks a KeyedJaggedTensor on ranks {missing} that it has on the others"
