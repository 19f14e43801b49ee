"""Checkpoints of sharded models: saved under one plan on some ranks, loaded under any other on any number.

    save_checkpoint("run/step_100", model, optimizer)        every rank writes its tiles, once
    load_checkpoint("run/step_100", model, optimizer)        every rank reads the pieces of them that it needs

torch.distributed.checkpoint does the reading and writing; `TiledTensor` tells it which rectangles exist. A checkpoint
is a folder: torch's files, and `recsys_edu.json` with what is not a tensor and the checksum of every file. It appears
under its name only when it is complete. Loading looks at everything (checksums, names, sizes) before it writes anything
into the model. All ranks have to see the same folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from recsys_edu.distributed.exchange import gather_objects
from recsys_edu.distributed.tiled_tensor import TiledTensor
from recsys_edu.optim.keyed import KeyedOptimizer

FACTS_FILE = "recsys_edu.json"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be loaded: torn, incomplete, or of another model. The model has not been touched."""


def save_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: KeyedOptimizer | None = None,
    extra: Mapping[str, Any] | None = None,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Write a checkpoint; called by all ranks of `group` (default: the world; without one, a single process).

    Args:
        path: the folder to make; an older checkpoint of this name is replaced at the end, in one rename.
        model: its `state_dict()` is saved, sharded or not.
        optimizer: keyed, so that its state is saved by parameter names.
        extra: anything JSON can hold, e.g. {"step": 100}; rank 0's is kept.

    Raises:
        TypeError: an optimizer without names, or state that is neither a tensor nor fit for JSON.
    """
    group = _group(group)
    path = Path(path)
    tensors, values = _state(model, optimizer)
    aside = path.with_name(f"{path.name}.saving")
    if _rank(group) == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    _barrier(group)
    with _no_remark_without_ranks():
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(aside), process_group=group, no_dist=group is None)
    cuts = {name: list(t.column_cuts) for name, t in tensors.items() if _column_cuts(t)}
    if _rank(group) == 0:
        facts = {
            "format": 1,
            "extra": dict(extra or {}),
            "values": values,
            "column_cuts": cuts,
            "files": {file.name: _checksum(file) for file in sorted(aside.iterdir())},
        }
        (aside / FACTS_FILE).write_text(json.dumps(facts, indent=1))
        _replace_folder(aside, path)
    _barrier(group)


def load_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: KeyedOptimizer | None = None,
    group: dist.ProcessGroup | None = None,
) -> dict[str, Any]:
    """Read a checkpoint into a model, sharded anyhow or not at all; returns what was saved as `extra`.

    Row-wise optimizers keep one number per row *and column block*. Where the checkpoint's column blocks differ from the
    model's, that state has no meaning here: it starts again from zero, and a warning says so.

    Raises:
        CheckpointError: on all ranks alike; names the missing or differing entries or the damaged file.
    """
    group = _group(group)
    path = Path(path)
    if not path.exists() and _old(path).exists():
        path = _old(path)
    facts = _read_facts(path)
    _raise_together(_damaged_files(path, facts["files"], _rank(group), _world_size(group)), path, group)
    reader = _Reader(path)
    saved = reader.read_metadata().state_dict_metadata
    if optimizer is not None and any(name.startswith("optimizer.") for name in saved):
        _make_lazy_state(optimizer, saved)
    tensors, values = _state(model, optimizer)
    restarted = [name for name, t in tensors.items() if _column_cuts(t) != tuple(facts["column_cuts"].get(name, ()))]
    _raise_together(_differences(tensors, saved, restarted), path, group)
    for name in restarted:
        _restart(tensors.pop(name), name)
    with _no_remark_without_ranks():
        dcp.load(tensors, storage_reader=reader, process_group=group, no_dist=group is None)
    if optimizer is not None:
        _load_values(optimizer, {name: facts["values"].get(name, value) for name, value in values.items()})
        optimizer.post_load_state_dict()
    return facts["extra"]


# ---------------------------------------------------------------- what is in a checkpoint


def _state(model: nn.Module, optimizer: KeyedOptimizer | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Live tensors by name, and the optimizer's plain values by name."""
    if optimizer is not None and not isinstance(optimizer, KeyedOptimizer):
        raise TypeError(
            f"a {type(optimizer).__name__} numbers its parameters; checkpoints go by names: wrap it in "
            "KeyedOptimizerWrapper(dict(model.named_parameters()), ...) from recsys_edu.optim.keyed"
        )
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    values: dict[str, Any] = {}
    for name, value in _leaves(optimizer.state_dict()["state"] if optimizer else {}, "optimizer"):
        if isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(value, (int, float, str, bool, type(None))):
            values[name] = value
        else:
            raise TypeError(f"{name}: a {type(value).__name__} is neither a tensor nor a plain value")
    return tensors, values


def _leaves(state: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(state, Mapping):
        for key, value in state.items():
            yield from _leaves(value, f"{name}.{key}")
    else:
        yield name, state


def _column_cuts(tensor: Tensor) -> tuple[int, ...]:
    """Where the column blocks of per-row state begin; empty for everything else and for whole rows."""
    return tensor.column_cuts if isinstance(tensor, TiledTensor) else ()


def _differences(tensors: Mapping[str, Tensor], saved: Mapping[str, Any], restarted: list[str]) -> list[str]:
    """What keeps a checkpoint from being loaded, in words."""
    problems = [f"{name} is not in the checkpoint" for name in tensors if name not in saved]
    wanted = {name.split(".", 1)[0] for name in tensors}
    problems += [
        f"{name} is in the checkpoint but not in the model or optimizer"
        for name in saved
        if name not in tensors and name.split(".", 1)[0] in wanted
    ]
    for name, tensor in tensors.items():
        entry = saved.get(name)
        if isinstance(entry, TensorStorageMetadata) and name not in restarted and entry.size != tensor.shape:
            problems.append(f"{name} is {tuple(tensor.shape)} here and {tuple(entry.size)} in the checkpoint")
    return problems


@torch.no_grad()
def _restart(tensor: Tensor, name: str) -> None:
    warnings.warn(
        f"{name}: the checkpoint keeps one number per row and column block, and its column blocks are not those of "
        "this plan. This state starts again from zero; to keep it, keep the table's column cuts",
        stacklevel=3,
    )
    for part in [tile.tensor for tile in tensor.tiles] if isinstance(tensor, TiledTensor) else [tensor]:
        part.zero_()


def _make_lazy_state(optimizer: KeyedOptimizer, saved: Mapping[str, Any]) -> None:
    """torch's optimizers make their state in the first step; a state that is to be loaded has to exist before."""
    have = {name for name, _ in _leaves(optimizer.state_dict()["state"], "optimizer")}
    if any(name.startswith("optimizer.") and name not in have for name in saved):
        optimizer.init_state()


def _load_values(optimizer: KeyedOptimizer, values: Mapping[str, Any]) -> None:
    for name, state in optimizer.state_dict()["state"].items():
        for key in state:
            if f"optimizer.{name}.{key}" in values:
                optimizer.state[optimizer.params[name]][key] = values[f"optimizer.{name}.{key}"]


# ---------------------------------------------------------------- files


class _Reader(dcp.FileSystemReader):
    """torch's reader, whose metadata file is a pickle; here it may only contain what torch writes into it."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        try:
            with open(path, "rb") as file:
                metadata = _MetadataUnpickler(file).load()
        except (pickle.UnpicklingError, EOFError) as error:
            raise CheckpointError(f"{path} is not what torch writes there, and was not read: {error}") from None
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    """Knows torch's metadata classes and refuses to look up anything else."""

    _MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
    _NAMES = (
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("collections", "OrderedDict"),
        ("pathlib", "PosixPath"),
        ("pathlib", "WindowsPath"),
        ("pathlib._local", "PosixPath"),
        ("pathlib._local", "WindowsPath"),
    )

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if module in self._MODULES or (module, name) in self._NAMES or is_dtype:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"a checkpoint's metadata has no business with {module}.{name}")


def _read_facts(path: Path) -> dict[str, Any]:
    file = path / FACTS_FILE
    try:
        facts = json.loads(file.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is not a complete checkpoint: it has no {FACTS_FILE}") from None
    except ValueError as error:  # no UTF-8, no JSON
        raise CheckpointError(f"{file} is damaged: {error}") from None
    version = facts.get("format") if isinstance(facts, dict) else None
    if version != 1:
        raise CheckpointError(f"{file} has format {version!r}; this version reads format 1")
    missing = [key for key in ("extra", "values", "column_cuts", "files") if not isinstance(facts.get(key), dict)]
    if missing:
        raise CheckpointError(f"{file} is damaged: it lacks {missing}")
    return facts


def _damaged_files(path: Path, checksums: Mapping[str, str], rank: int, world_size: int) -> list[str]:
    """Problems of the files that this rank looks at; the ranks share them out."""
    problems = []
    for name in sorted(checksums)[rank::world_size]:
        file = path / name
        if not file.exists():
            problems.append(f"the file {name} is missing")
        elif _checksum(file) != checksums[name]:
            problems.append(f"the file {name} is damaged: its checksum is not the one written with it")
    return problems


def _checksum(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _replace_folder(new: Path, path: Path) -> None:
    old = _old(path)
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(path, old)
    os.replace(new, path)
    shutil.rmtree(old, ignore_errors=True)


def _old(path: Path) -> Path:
    """Where a checkpoint waits while a new one takes its name; a crash at that moment leaves it there, complete."""
    return path.with_name(f"{path.name}.old")


# ---------------------------------------------------------------- ranks


@contextmanager
def _no_remark_without_ranks() -> Iterator[None]:
    """torch warns whenever a single process saves or loads; here that is an ordinary thing to do."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _group(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    if group is None and dist.is_available() and dist.is_initialized():
        return dist.group.WORLD
    return group


def _rank(group: dist.ProcessGroup | None) -> int:
    return dist.get_rank(group) if group is not None else 0


def _world_size(group: dist.ProcessGroup | None) -> int:
    return dist.get_world_size(group) if group is not None else 1


def _barrier(group: dist.ProcessGroup | None) -> None:
    if group is not None:
        dist.barrier(group)


def _raise_together(problems: list[str], path: Path, group: dist.ProcessGroup | None) -> None:
    """Raise on every rank if any has a problem, so that none goes on alone."""
    everywhere = sorted({problem for of_rank in gather_objects(problems, group) for problem in of_rank})
    if everywhere:
        listed = "\n  ".join(everywhere[:20])
        raise CheckpointError(f"{path} cannot be loaded; nothing has been changed:\n  {listed}")
