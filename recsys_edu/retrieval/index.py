"""Find the items whose vectors have the largest dot product with a query: exactly, or approximately and fast.

    kind      needs   how                                                      1 million items
    exact     torch   every dot product                                        milliseconds
    flat      faiss   the same, in faiss
    ivf       faiss   cells (k-means); a query looks into `probes` of them
    ivf_int8  faiss   the same with 8 bits per number: a quarter of the memory
    hnsw      faiss   a graph of neighbours; memory for speed

`recall_against` says what an approximation loses. An index file is written aside, then moved into place, and carries a
checksum: a half-written or altered file is refused and never answers a query.

Shapes: Q queries, I items, D width, K results.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

IndexKind = Literal["exact", "flat", "ivf", "ivf_int8", "hnsw"]
KINDS: tuple[IndexKind, ...] = ("exact", "flat", "ivf", "ivf_int8", "hnsw")
_MAGIC = b"recsys_edu item index 1\n"


class IndexFileError(ValueError):
    """A file that is no index, is cut short, or was altered."""


@dataclass(frozen=True)
class IndexSettings:
    """kind: see `retrieval.index`. cells: of ivf (default: about 4 sqrt(I)). probes: cells a query looks into.
    neighbours: of hnsw; effort: how many candidates hnsw keeps while it searches. seed: of the k-means."""

    kind: IndexKind = "exact"
    cells: int | None = None
    probes: int = 16
    neighbours: int = 32
    effort: int = 128
    seed: int = 0


class ItemIndex:
    """I item vectors and the ids by which they are known.

    >>> index = ItemIndex(torch.eye(3), torch.tensor([10, 20, 30]))
    >>> index.search(torch.tensor([[0.1, 0.9, 0.5]]), k=2)
    (tensor([[0.9000, 0.5000]]), tensor([[20, 30]]))

    item_vectors float32 `[I, D]`; item_ids int64 `[I]`, default 0 to I - 1.

    Raises:
        ValueError: vectors of a wrong shape, NaN or infinite vectors, ids that are repeated, negative or not I many,
            an unknown kind.
        ModuleNotFoundError: every kind but "exact" needs faiss: `pip install faiss-cpu`.
    """

    def __init__(
        self, item_vectors: Tensor, item_ids: Tensor | None = None, settings: IndexSettings | None = None
    ) -> None:
        self.settings = settings or IndexSettings()
        if self.settings.kind not in KINDS:
            raise ValueError(f"kind={self.settings.kind!r}: expected one of {', '.join(KINDS)}")
        if item_vectors.dim() != 2 or not len(item_vectors):
            raise ValueError(f"item vectors have shape {tuple(item_vectors.shape)}, expected [items, width]")
        self.item_ids = torch.arange(len(item_vectors)) if item_ids is None else item_ids.long().cpu()
        _check_ids(self.item_ids, len(item_vectors))
        vectors_ID = item_vectors.detach().float().cpu().contiguous()
        if not vectors_ID.isfinite().all():  # host sync: faiss answers nonsense for NaN
            bad = int(self.item_ids[~vectors_ID.isfinite().all(dim=1)][0])
            raise ValueError(f"the vector of item {bad} has NaN or infinite numbers")
        self.width = vectors_ID.shape[1]
        self._vectors_ID = vectors_ID if self.settings.kind == "exact" else None
        self._faiss = None if self.settings.kind == "exact" else _build(vectors_ID, self.settings)

    def __len__(self) -> int:
        return len(self.item_ids)

    def __repr__(self) -> str:
        return f"ItemIndex({len(self):,} items of width {self.width}, {self.settings.kind}, {self.num_bytes:,} bytes)"

    @property
    def num_bytes(self) -> int:
        """Bytes of the vectors and whatever finds them."""
        return self._vectors_ID.nbytes if self._faiss is None else len(_faiss().serialize_index(self._faiss))

    def search(self, query_QD: Tensor, k: int, exclude: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """The k best items of each query, best first: scores float32 `[Q, K]` and ids int64 `[Q, K]`.

        exclude: for each query the ids that must not come back (what the user has seen). Where fewer than k items are
        found, the rest are id -1 with score -inf. (ivf does not look everywhere; raise `probes`.)

        Raises:
            ValueError: queries of another width, k below 1, or not one exclusion per query.
        """
        if query_QD.dim() != 2 or query_QD.shape[1] != self.width:
            raise ValueError(f"queries have shape {tuple(query_QD.shape)}, expected [queries, {self.width}]")
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        if exclude is not None and len(exclude) != len(query_QD):
            raise ValueError(f"{len(query_QD)} queries but {len(exclude)} exclusions")
        query_QD = query_QD.detach().float().cpu().contiguous()
        most = max((len(ids) for ids in exclude), default=0) if exclude is not None else 0
        scores, places = self._search(query_QD, min(k + most, len(self)))
        ids = torch.where(places >= 0, self.item_ids[places.clamp(min=0)], -1)
        scores = scores.masked_fill(places < 0, float("-inf"))
        if exclude is not None:
            scores, ids = _without(scores, ids, exclude)
        return _padded(scores[:, :k], k, float("-inf")), _padded(ids[:, :k], k, -1)

    def with_settings(self, settings: IndexSettings) -> ItemIndex:
        """The same built index, searched with other `probes` or `effort`; nothing is copied.

        Raises:
            ValueError: the kind, cells or neighbours differ: those need a new index.
        """
        fixed = ("kind", "cells", "neighbours", "seed")
        if changed := [name for name in fixed if getattr(settings, name) != getattr(self.settings, name)]:
            raise ValueError(f"{', '.join(changed)} cannot change without building the index anew")
        other = copy.copy(self)
        other.settings = settings
        return other

    def save(self, path: str | Path) -> None:
        """Write the index to one file, whole or not at all."""
        path = Path(path)
        if self._faiss is None:
            body = self._vectors_ID.numpy().tobytes()
        else:
            body = _faiss().serialize_index(self._faiss).tobytes()
        ids = self.item_ids.numpy().astype("<i8").tobytes()
        head = {"settings": asdict(self.settings), "num_items": len(self), "width": self.width}
        head |= {"sha256": hashlib.sha256(ids + body).hexdigest(), "num_bytes": len(ids) + len(body)}
        descriptor, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(_MAGIC + json.dumps(head).encode() + b"\n" + ids + body)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(aside, path)
        except BaseException:
            Path(aside).unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: str | Path) -> ItemIndex:
        """Read what `save` wrote.

        Raises:
            IndexFileError: the file is no index, is cut short, or its checksum does not fit.
            ModuleNotFoundError: it is a faiss index and faiss is not installed.
        """
        head, ids, body = _read(Path(path))
        index = cls.__new__(cls)
        index.settings = IndexSettings(**head["settings"])
        index.width = int(head["width"])
        index.item_ids = torch.from_numpy(np.frombuffer(ids, dtype="<i8").astype(np.int64))
        if index.settings.kind == "exact":
            numbers = np.frombuffer(body, dtype="<f4").astype(np.float32)
            index._vectors_ID, index._faiss = torch.from_numpy(numbers).view(len(index.item_ids), index.width), None
        else:
            index._vectors_ID = None
            index._faiss = _faiss().deserialize_index(np.frombuffer(body, dtype=np.uint8))
        return index

    def _search(self, query_QD: Tensor, k: int) -> tuple[Tensor, Tensor]:
        if self._faiss is None:
            best = (query_QD @ self._vectors_ID.T).topk(k, dim=1)
            return best.values, best.indices
        faiss = _faiss()
        options = {}
        if self.settings.kind.startswith("ivf"):
            options["params"] = faiss.SearchParametersIVF(nprobe=self.settings.probes)
        elif self.settings.kind == "hnsw":
            options["params"] = faiss.SearchParametersHNSW(efSearch=max(self.settings.effort, k))
        scores, places = self._faiss.search(query_QD.numpy(), k, **options)
        return torch.from_numpy(scores), torch.from_numpy(places)


def recall_against(exact_ids_QK: Tensor, found_ids_QK: Tensor) -> float:
    """The share of the exact results that were found, averaged over queries.

    >>> recall_against(torch.tensor([[1, 2], [3, 4]]), torch.tensor([[2, 1], [4, 9]]))
    0.75
    """
    return float((exact_ids_QK[:, :, None] == found_ids_QK[:, None, :]).any(dim=2).double().mean())


def has_faiss() -> bool:
    """Whether approximate indexes can be built here."""
    try:
        _faiss()
    except ModuleNotFoundError:
        return False
    return True


def _faiss() -> ModuleType:
    try:
        import faiss
    except ImportError as error:
        raise ModuleNotFoundError(
            "approximate search needs faiss, which is not installed; `pip install faiss-cpu` (or the extra"
            ' "retrieval"), or use kind="exact", which only needs torch'
        ) from error
    return faiss


def _build(vectors_ID: Tensor, settings: IndexSettings) -> Any:
    faiss = _faiss()
    num_items, width = vectors_ID.shape
    metric = faiss.METRIC_INNER_PRODUCT
    if settings.kind == "flat":
        index = faiss.IndexFlatIP(width)
    elif settings.kind == "hnsw":
        index = faiss.IndexHNSWFlat(width, settings.neighbours, metric)
    else:
        cells = settings.cells or max(1, min(int(4 * num_items**0.5), num_items // 39))  # 39 per cell: faiss's minimum
        middle = faiss.IndexFlatIP(width)
        if settings.kind == "ivf":
            index = faiss.IndexIVFFlat(middle, width, cells, metric)
        else:
            index = faiss.IndexIVFScalarQuantizer(middle, width, cells, faiss.ScalarQuantizer.QT_8bit, metric)
        index.cp.seed, index.cp.niter = settings.seed + 1, 10
        index.cp.max_points_per_centroid = 64  # a sample is enough for the k-means
    numbers = vectors_ID.numpy()
    if not index.is_trained:
        index.train(numbers)
    index.add(numbers)
    return index


def _check_ids(item_ids: Tensor, num_items: int) -> None:
    if item_ids.shape != (num_items,):
        raise ValueError(f"{num_items} vectors but ids of shape {tuple(item_ids.shape)}")
    unique, count = item_ids.unique(return_counts=True)
    if len(unique) != num_items:
        raise ValueError(f"item id {int(unique[count > 1][0])} occurs {int(count.max())} times; ids must be unique")
    if int(unique[0]) < 0:
        raise ValueError(f"item id {int(unique[0])} is negative")


def _without(scores_QN: Tensor, ids_QN: Tensor, exclude: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Move excluded ids behind all others, as missing."""
    bad_QN = torch.stack([torch.isin(ids, unwanted.to(ids.device)) for ids, unwanted in zip(ids_QN, exclude)])
    order_QN = bad_QN.int().argsort(dim=1, stable=True)
    scores_QN, ids_QN = scores_QN.masked_fill(bad_QN, float("-inf")), ids_QN.masked_fill(bad_QN, -1)
    return scores_QN.gather(1, order_QN), ids_QN.gather(1, order_QN)


def _padded(values_QN: Tensor, k: int, fill: float) -> Tensor:
    return torch.nn.functional.pad(values_QN, (0, k - values_QN.shape[1]), value=fill)


def _read(path: Path) -> tuple[dict, bytes, bytes]:
    data = path.read_bytes()
    if not data.startswith(_MAGIC):
        raise IndexFileError(f"{path}: not an item index (it should begin with {_MAGIC!r})")
    line_end = data.find(b"\n", len(_MAGIC))
    try:
        head = json.loads(data[len(_MAGIC) : line_end])
        size, num_items, expected = int(head["num_bytes"]), int(head["num_items"]), head["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise IndexFileError(f"{path}: its head cannot be read: {error}") from error
    body = data[line_end + 1 :]
    if len(body) != size:
        raise IndexFileError(
            f"{path}: {len(body):,} bytes of content, expected {size:,}; it was cut short; save it again"
        )
    if hashlib.sha256(body).hexdigest() != expected:
        raise IndexFileError(f"{path}: the checksum does not fit; the file was altered; save it again")
    return head, body[: 8 * num_items], body[8 * num_items :]
