"""MovieLens: streams of rating rows as TorchRec has them, and whole releases as typed frames.

- `movielens_20m`, `movielens_25m`: datapipes of one dict per rating (TorchRec's names and meaning).
- `load_movielens_100k`, `read_movielens`: any release as polars frames (`movielens_formats`).
- `movielens_ctr`: batches ready for DLRM (`movielens_ctr`).
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import IterDataPipe

from recsys_edu.datasets.download import fetch_movielens_100k
from recsys_edu.datasets.movielens_ctr import MovieLensCTR, movielens_ctr
from recsys_edu.datasets.movielens_formats import MovieLens, load_movielens_100k, read_movielens
from recsys_edu.datasets.text_tables import MalformedLineError
from recsys_edu.datasets.utils import safe_cast

__all__ = [
    "DEFAULT_COLUMN_NAMES", "DEFAULT_MOVIES_COLUMN_NAMES", "DEFAULT_RATINGS_COLUMN_NAMES", "MOVIES_FILENAME",
    "MovieLens", "MovieLensCTR", "RATINGS_FILENAME", "fetch_movielens_100k", "load_movielens_100k", "movielens_20m",
    "movielens_25m", "movielens_ctr", "read_movielens",
]  # fmt: skip

RATINGS_FILENAME = "ratings.csv"
MOVIES_FILENAME = "movies.csv"
DEFAULT_RATINGS_COLUMN_NAMES: list[str] = ["userId", "movieId", "rating", "timestamp"]
DEFAULT_MOVIES_COLUMN_NAMES: list[str] = ["movieId", "title", "genres"]
DEFAULT_COLUMN_NAMES: list[str] = DEFAULT_RATINGS_COLUMN_NAMES + DEFAULT_MOVIES_COLUMN_NAMES[1:]
# how each column is read, and what stands where its text does not parse
_CASTERS: tuple[tuple[Callable[[str], Any], Any], ...] = (
    (int, 0),
    (int, 0),
    (float, 0.0),
    (int, 0),
    (str, ""),
    (str, ""),
)


def _default_row_mapper(row: list[str]) -> dict[str, int | float | str]:
    return {name: safe_cast(text, *caster) for name, text, caster in zip(DEFAULT_COLUMN_NAMES, row, _CASTERS)}


class _RatingsRows(IterDataPipe):
    """One row per line of ratings.csv, joined with movies.csv where asked, each through `row_mapper`."""

    def __init__(
        self,
        root: str,
        include_movies_data: bool,
        row_mapper: Callable[[list[str]], Any] | None,
        open_kw: dict[str, Any],
    ) -> None:
        self.root = root
        self.include_movies_data = include_movies_data
        self.row_mapper = row_mapper
        self.open_kw = open_kw

    def _rows(self, filename: str, num_columns: int) -> Iterator[tuple[int, list[str]]]:
        path = os.path.join(self.root, filename)
        with open(path, **{"encoding": "utf-8", "newline": "", **self.open_kw}) as stream:
            reader = csv.reader(stream)
            next(reader, None)
            for row in reader:
                if len(row) != num_columns:
                    problem = f"expected {num_columns} columns, got {len(row)}"
                    raise MalformedLineError(path, reader.line_num, problem, ",".join(row))
                yield reader.line_num, row

    def __iter__(self) -> Iterator[Any]:
        movies = {}
        if self.include_movies_data:
            movies = {row[0]: row[1:] for _, row in self._rows(MOVIES_FILENAME, len(DEFAULT_MOVIES_COLUMN_NAMES))}
        for line, row in self._rows(RATINGS_FILENAME, len(DEFAULT_RATINGS_COLUMN_NAMES)):
            if self.include_movies_data:
                if row[1] not in movies:
                    path = os.path.join(self.root, RATINGS_FILENAME)
                    raise MalformedLineError(path, line, f"movieId {row[1]} is not in {MOVIES_FILENAME}", ",".join(row))
                row = row + movies[row[1]]
            yield row if self.row_mapper is None else self.row_mapper(row)


def movielens_20m(
    root: str,
    *,
    include_movies_data: bool = False,
    row_mapper: Callable[[list[str]], Any] | None = _default_row_mapper,
    **open_kw: Any,
) -> IterDataPipe:
    """The ratings of the unpacked MovieLens 20M release in `root`, one dict per rating.

    >>> next(iter(movielens_20m("ml-20m")))                         # doctest: +SKIP
    {'userId': 1, 'movieId': 2, 'rating': 3.5, 'timestamp': 1112486027}

    `include_movies_data` adds title and genres (movies.csv is held in memory). `row_mapper=None` gives lists of
    strings. With the default mapper a field that does not parse becomes 0; for an error with file and line use
    `read_movielens`, which is also much faster. `open_kw` goes to `open`.

    Raises (while iterating):
        MalformedLineError: a line has the wrong number of columns, or rates a movie that movies.csv lacks.
    Counterpart: torchrec.datasets.movielens.movielens_20m.
    """
    return _RatingsRows(root, include_movies_data, row_mapper, open_kw)


def movielens_25m(
    root: str,
    *,
    include_movies_data: bool = False,
    row_mapper: Callable[[list[str]], Any] | None = _default_row_mapper,
    **open_kw: Any,
) -> IterDataPipe:
    """The same for MovieLens 25M. Counterpart: torchrec.datasets.movielens.movielens_25m."""
    return _RatingsRows(root, include_movies_data, row_mapper, open_kw)
