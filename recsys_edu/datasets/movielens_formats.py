"""MovieLens in memory: ratings, items and users as typed polars frames, from any of GroupLens's file formats.

| release | files | separator |
|---|---|---|
| 100K | u.data, u.item, u.user (or the cache's ratings.tsv, items.tsv, users.tsv) | tab and `|` |
| 1M | ratings.dat, movies.dat, users.dat | `::` |
| 20M, 25M, latest | ratings.csv, movies.csv | `,` with CSV quoting |
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from recsys_edu.datasets.download import GENRES_100K, fetch_movielens_100k
from recsys_edu.datasets.text_tables import Column, OnError, TableChunk, read_table

OCCUPATIONS_1M = (
    "other", "academic/educator", "artist", "clerical/admin", "college/grad student", "customer service",
    "doctor/health care", "executive/managerial", "farmer", "homemaker", "K-12 student", "lawyer", "programmer",
    "retired", "sales/marketing", "scientist", "self-employed", "technician/engineer", "tradesman/craftsman",
    "unemployed", "writer",
)  # fmt: skip

_RATINGS = [Column("user_id", "int"), Column("item_id", "int"), Column("rating", "float"), Column("timestamp", "int")]
_USERS_100K = [Column("user_id", "int"), Column("age", "int"), Column("gender"), Column("occupation"),
               Column("zip_code")]  # fmt: skip
_USERS_1M = [Column("user_id", "int"), Column("gender"), Column("age", "int"), Column("occupation", "int"),
             Column("zip_code")]  # fmt: skip
_ITEMS_CACHE = [Column("item_id", "int"), Column("title"), Column("year", "int", optional=True), Column("genres")]
_ITEMS_100K = [
    *(Column("item_id", "int"), Column("title"), Column("released"), Column("video_released"), Column("url")),
    *(Column(genre, "int") for genre in GENRES_100K),
]
_ITEMS_TITLED = [Column("item_id", "int"), Column("title"), Column("genres")]


@dataclass(frozen=True)
class MovieLens:
    """One MovieLens release.

    ratings: user_id Int32, item_id Int32, rating Float32, timestamp Int64 (seconds since 1970, UTC), file order.
    items: item_id Int32, title String (without the year), year Int32 or null, genres List[String].
    users: user_id Int32, age Int32, gender String, occupation String, zip_code String; None where the release
    has no user file (20M and later).
    num_skipped: file name -> malformed lines left out (only with `on_error="skip"`).
    """

    ratings: pl.DataFrame
    items: pl.DataFrame
    users: pl.DataFrame | None = None
    num_skipped: dict[str, int] = field(default_factory=dict)

    def __repr__(self) -> str:
        skipped = sum(self.num_skipped.values())
        return (
            f"MovieLens({self.ratings.height:,} ratings by {self.ratings['user_id'].n_unique():,} users of "
            f"{self.ratings['item_id'].n_unique():,} items{f', {skipped:,} lines skipped' if skipped else ''})"
        )


def load_movielens_100k(root: str | Path | None = None) -> MovieLens:
    """MovieLens-100K from the cache, fetched on first use.

    >>> load_movielens_100k()                                       # doctest: +SKIP
    MovieLens(100,000 ratings by 943 users of 1,682 items)

    Raises:
        DataUnavailableError: neither cached nor obtainable (see `fetch_movielens_100k`).
    """
    return read_movielens(fetch_movielens_100k(root))


def read_movielens(folder: str | Path, on_error: OnError = "raise") -> MovieLens:
    """Read an unpacked MovieLens release; which one is told by the files in `folder`.

    >>> read_movielens("ml-1m").ratings.height                      # doctest: +SKIP
    1000209

    Raises:
        FileNotFoundError: the folder holds no known release, or lacks one of its files.
        MalformedLineError: a line does not fit, with file and line; with `on_error="skip"` such lines are left
            out and counted in `num_skipped`.
    """
    folder = Path(folder)
    readers = {
        "ratings.tsv": _read_cache,
        "u.data": _read_100k,
        "ratings.dat": _read_1m,
        "ratings.csv": _read_csv,
    }
    for ratings_file, reader in readers.items():
        if (folder / ratings_file).is_file():
            return reader(folder, on_error)
    raise FileNotFoundError(f"{folder} holds none of {', '.join(readers)}: expected an unpacked MovieLens release")


def _ids(*names: str) -> list[pl.Expr]:
    return [pl.col(name).cast(pl.Int32) for name in names]


def _ratings(table: TableChunk) -> pl.DataFrame:
    return table.frame.with_columns(*_ids("user_id", "item_id"), pl.col("rating").cast(pl.Float32))


def _titled_items(table: TableChunk) -> pl.DataFrame:
    """Items whose title ends in "(year)" and whose genres are joined by "|"."""
    title, genres = pl.col("title"), pl.col("genres")
    year = title.str.extract(r"^.*\((\d{4})\)", 1)
    return table.frame.select(
        *_ids("item_id"),
        pl.when(year.is_null()).then(title).otherwise(title.str.extract(r"^(.*)\(\d{4}\)", 1)).str.strip_chars(),
        year.cast(pl.Int32).alias("year"),
        pl.when(genres.is_in(["", "(no genres listed)"])).then(pl.lit([], dtype=pl.List(pl.String)))
        .otherwise(genres.str.split("|")).alias("genres"),
    )  # fmt: skip


def _skipped(**tables: TableChunk) -> dict[str, int]:
    return {name: table.num_skipped for name, table in tables.items() if table.num_skipped}


def _read_cache(folder: Path, on_error: OnError) -> MovieLens:
    options = {"header": True, "on_error": on_error}
    ratings = read_table(folder / "ratings.tsv", _RATINGS, "\t", **options)
    users = read_table(folder / "users.tsv", _USERS_100K, "\t", **options)
    items = read_table(folder / "items.tsv", _ITEMS_CACHE, "\t", **options)
    item_frame = items.frame.with_columns(*_ids("item_id", "year"), pl.col("genres").str.split("|"))
    return MovieLens(
        _ratings(ratings),
        item_frame,
        users.frame.with_columns(*_ids("user_id", "age")),
        _skipped(ratings=ratings, items=items, users=users),
    )


def _read_100k(folder: Path, on_error: OnError) -> MovieLens:
    options = {"encoding": "latin-1", "on_error": on_error}
    ratings = read_table(folder / "u.data", _RATINGS, "\t", **options)
    users = read_table(folder / "u.user", _USERS_100K, "|", **options)
    items = read_table(folder / "u.item", _ITEMS_100K, "|", **options)
    flags = [pl.when(pl.col(genre) == 1).then(pl.lit(genre)) for genre in GENRES_100K]
    joined = items.frame.select(
        "item_id", "title", pl.concat_str(flags, separator="|", ignore_nulls=True).alias("genres")
    )
    return MovieLens(
        _ratings(ratings),
        _titled_items(TableChunk(joined, 0)),
        users.frame.with_columns(*_ids("user_id", "age")),
        _skipped(ratings=ratings, items=items, users=users),
    )


def _read_1m(folder: Path, on_error: OnError) -> MovieLens:
    options = {"encoding": "latin-1", "on_error": on_error}
    ratings = read_table(folder / "ratings.dat", _RATINGS, "::", **options)
    users = read_table(folder / "users.dat", _USERS_1M, "::", **options)
    items = read_table(folder / "movies.dat", _ITEMS_TITLED, "::", **options)
    occupation = pl.col("occupation").replace_strict(dict(enumerate(OCCUPATIONS_1M)), default="other")
    user_frame = users.frame.select(*_ids("user_id", "age"), "gender", occupation, "zip_code")
    return MovieLens(
        _ratings(ratings), _titled_items(items), user_frame, _skipped(ratings=ratings, items=items, users=users)
    )


def _read_csv(folder: Path, on_error: OnError) -> MovieLens:
    options = {"header": True, "on_error": on_error}
    ratings = read_table(folder / "ratings.csv", _RATINGS, ",", **options)
    items = read_table(folder / "movies.csv", _ITEMS_TITLED, ",", quoted=True, **options)
    return MovieLens(_ratings(ratings), _titled_items(items), None, _skipped(ratings=ratings, items=items))
