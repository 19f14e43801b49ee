"""The training batch every dataset yields, and small datapipes to read, split and shorten streams of rows.

The datapipes here are `torch.utils.data.IterDataPipe`s: each wraps another iterable and can be iterated again
from the start. Counterpart: torchrec.datasets.utils.
"""

from __future__ import annotations

import csv
import io
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.utils.data import IterDataPipe, get_worker_info

from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor
from recsys_edu.streamable import Pipelineable

T = TypeVar("T")


@dataclass
class Batch(Pipelineable):
    """B training examples: what a model reads and what it must predict.

    >>> batch = Batch(dense_features, sparse_features, labels)      # doctest: +SKIP
    >>> batch.to(torch.device("cuda"), non_blocking=True)           # doctest: +SKIP

    dense_features: float32 `[B, num_dense]`. sparse_features: KeyedJaggedTensor of stride B. labels: `[B]`.
    Counterpart: torchrec.datasets.utils.Batch.
    """

    dense_features: torch.Tensor
    sparse_features: KeyedJaggedTensor
    labels: torch.Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        """A batch whose three parts are on `device`."""
        return Batch(
            dense_features=self.dense_features.to(device=device, non_blocking=non_blocking),
            sparse_features=self.sparse_features.to(device=device, non_blocking=non_blocking),
            labels=self.labels.to(device=device, non_blocking=non_blocking),
        )

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell the allocator that `stream` uses these tensors, so that their memory is not reused too early."""
        self.dense_features.record_stream(stream)
        self.sparse_features.record_stream(stream)
        self.labels.record_stream(stream)

    def pin_memory(self) -> Batch:
        """A batch in page-locked host memory, from which copies to a GPU can overlap with computation."""
        return Batch(
            dense_features=self.dense_features.pin_memory(),
            sparse_features=self.sparse_features.pin_memory(),
            labels=self.labels.pin_memory(),
        )


class _Select(IterDataPipe):
    """The items of `datapipe` for which a fresh selector says yes; a new selector is made for every pass."""

    def __init__(self, datapipe: Iterable[Any], make_selector: Callable[[], Callable[[], bool]]) -> None:
        self.datapipe = datapipe
        self.make_selector = make_selector

    def __iter__(self) -> Iterator[Any]:
        selected = self.make_selector()
        for item in self.datapipe:
            if selected():
                yield item


def _check_train_perc(train_perc: float) -> None:
    if not 0.0 < train_perc < 1.0:
        raise ValueError(f"train_perc must lie strictly between 0 and 1, got {train_perc}")


def _default_key_fn(idx: int) -> int:
    return idx


def idx_split_train_val(
    datapipe: IterDataPipe,
    train_perc: float,
    decimal_places: int = 2,
    key_fn: Callable[[int], int] = _default_key_fn,
) -> tuple[IterDataPipe, IterDataPipe]:
    """Split by row number: of every `10**decimal_places` rows, the first `train_perc` part trains.

    With `train_perc=0.8` rows 0-79 train, 80-99 validate, 100-179 train, and so on. `key_fn` maps the row number
    before the modulo, for example a hash that scatters neighbours.

    Raises:
        ValueError: train_perc is not strictly between 0 and 1.
    Counterpart: torchrec.datasets.utils.idx_split_train_val.
    """
    _check_train_perc(train_perc)
    period = 10**decimal_places
    num_train = round(train_perc * period)

    def selector(wanted: bool) -> Callable[[], bool]:
        row = -1

        def selected() -> bool:
            nonlocal row
            row += 1
            return (key_fn(row) % period < num_train) == wanted

        return selected

    return _Select(datapipe, lambda: selector(True)), _Select(datapipe, lambda: selector(False))


def rand_split_train_val(
    datapipe: IterDataPipe, train_perc: float, random_seed: int = 0
) -> tuple[IterDataPipe, IterDataPipe]:
    """Split by one seeded coin per row: the two parts never overlap and are the same on every pass.

    Raises:
        ValueError: train_perc is not strictly between 0 and 1.
    Counterpart: torchrec.datasets.utils.rand_split_train_val.
    """
    _check_train_perc(train_perc)

    def selector(wanted: bool) -> Callable[[], bool]:
        coin = random.Random(random_seed)
        return lambda: (coin.random() < train_perc) == wanted

    return _Select(datapipe, lambda: selector(True)), _Select(datapipe, lambda: selector(False))


def safe_cast(val: T, dest_type: Callable[[T], T], default: T) -> T:
    """`dest_type(val)`, or `default` where that raises ValueError.

    >>> safe_cast("7", int, 0), safe_cast("", int, 0)
    (7, 0)

    Counterpart: torchrec.datasets.utils.safe_cast.
    """
    try:
        return dest_type(val)
    except ValueError:
        return default


class Limit(IterDataPipe):
    """At most the first `limit` items of `datapipe`. Counterpart: torchrec.datasets.utils.Limit."""

    def __init__(self, datapipe: IterDataPipe, limit: int) -> None:
        self.datapipe = datapipe
        self.limit = limit

    def __iter__(self) -> Iterator[Any]:
        # zip asks the range first, so the row after the last one is never read
        for _, item in zip(range(self.limit), self.datapipe):
            yield item


class ReadLinesFromCSV(IterDataPipe):
    """Rows, as lists of strings, of (path, stream) pairs; `kw` goes to `csv.reader`.

    Binary streams are decoded as UTF-8. Counterpart: torchrec.datasets.utils.ReadLinesFromCSV.
    """

    def __init__(self, datapipe: IterDataPipe[tuple[str, io.IOBase]], skip_first_line: bool = False, **kw: Any) -> None:
        self.datapipe = datapipe
        self.skip_first_line = skip_first_line
        self.kw = kw

    def __iter__(self) -> Iterator[list[str]]:
        for _path, stream in self.datapipe:
            text = stream if isinstance(stream, io.TextIOBase) else io.TextIOWrapper(stream, encoding="utf-8")
            with text:
                if self.skip_first_line:
                    next(text, None)
                yield from csv.reader(text, **self.kw)


class LoadFiles(IterDataPipe):
    """Opens each path in turn and yields (path, stream); `open_kw` goes to `open`.

    `mode="b"` (the default) and `mode="t"` read bytes and text. `path_manager_key` is accepted for compatibility;
    files are opened with Python's own `open`. Counterpart: torchrec.datasets.utils.LoadFiles.
    """

    def __init__(
        self,
        datapipe: Iterable[str],
        mode: str = "b",
        length: int = -1,
        path_manager_key: str = "torchrec",
        **open_kw: Any,
    ) -> None:
        self.datapipe = datapipe
        self.mode = mode if mode[:1] in "rwax" else f"r{mode}"
        self.length = length
        self.path_manager_key = path_manager_key
        self.open_kw = open_kw

    def __iter__(self) -> Iterator[tuple[str, io.IOBase]]:
        for path in self.datapipe:
            if not isinstance(path, str):
                raise TypeError(f"LoadFiles expects paths as str, got {type(path).__name__}: {path!r}")
            # whoever consumes the stream closes it
            yield path, open(path, self.mode, **self.open_kw)  # noqa: SIM115

    def __len__(self) -> int:
        if self.length < 0:
            raise TypeError("this LoadFiles has no length: construct it with length=<number of files>")
        return self.length


def _default_dp_selector(datapipes: Sequence[IterDataPipe]) -> Sequence[IterDataPipe]:
    """All datapipes in the main process; inside a DataLoader worker its round-robin share."""
    worker = get_worker_info()
    if worker is None:
        return datapipes
    if worker.num_workers > len(datapipes):
        raise ValueError(
            f"{worker.num_workers} DataLoader workers for {len(datapipes)} datapipes: some would have nothing to "
            f"read. Use num_workers <= {len(datapipes)}, or split the data into more files."
        )
    return datapipes[worker.id :: worker.num_workers]


class ParallelReadConcat(IterDataPipe):
    """Chains datapipes; inside a DataLoader worker only those that are its share, so no row is read twice.

    Raises (while iterating):
        ValueError: there are more workers than datapipes.
    Counterpart: torchrec.datasets.utils.ParallelReadConcat.
    """

    def __init__(
        self,
        *datapipes: IterDataPipe,
        dp_selector: Callable[[Sequence[IterDataPipe]], Sequence[IterDataPipe]] = _default_dp_selector,
    ) -> None:
        self.datapipes = datapipes
        self.dp_selector = dp_selector

    def __iter__(self) -> Iterator[Any]:
        for datapipe in self.dp_selector(self.datapipes):
            yield from datapipe
