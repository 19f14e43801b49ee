"""Strict, fast reading of delimited text: typed columns, and an error with file and line for whatever does not fit.

A file is read in chunks of whole lines, split and converted by polars, so memory is bounded by the chunk size
(about ten times `chunk_bytes`), not by the file. A line fits when it has exactly the expected columns and each
parses as its kind; the first line that does not is an error, or all of them are counted and left out.
"""

from __future__ import annotations

import codecs
import csv
import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import polars as pl

OnError = Literal["raise", "skip"]
DEFAULT_CHUNK_BYTES = 16 << 20
_SHOWN_CHARACTERS = 80


class MalformedLineError(ValueError):
    """A line of a data file that does not fit its format.

    Attributes: path, line (1-based), problem (what was expected and found).
    """

    def __init__(self, path: str | Path, line: int, problem: str, text: str) -> None:
        shown = text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."
        super().__init__(
            f"{path}, line {line}: {problem}. The line reads {shown!r}. "
            f'Repair or re-download the file, or pass on_error="skip" to count and leave out such lines.'
        )
        self.path, self.line, self.problem = Path(path), line, problem


@dataclass(frozen=True)
class Column:
    """One column of a text table.

    kind: "int" (int64), "float" (float64), "hex" (hexadecimal digits, int64) or "str".
    optional: an empty field is a null instead of an error.
    """

    name: str
    kind: Literal["int", "float", "hex", "str"] = "str"
    optional: bool = False


@dataclass(frozen=True)
class TableChunk:
    """Some consecutive lines of a file as typed columns, and how many of them were left out as malformed."""

    frame: pl.DataFrame
    num_skipped: int


_KIND_WORDS = {"int": "an integer", "float": "a number", "hex": "a hexadecimal number", "str": "text"}


def _converted(column: Column) -> pl.Expr:
    text = pl.col(column.name)
    match column.kind:
        case "int":
            return text.cast(pl.Int64, strict=False)
        case "float":
            return text.cast(pl.Float64, strict=False)
        case "hex":
            return text.str.to_integer(base=16, dtype=pl.Int64, strict=False)
        case _:
            return text


def check_on_error(on_error: str) -> None:
    """Raise ValueError unless `on_error` is one of the two known words."""
    if on_error not in ("raise", "skip"):
        raise ValueError(f'on_error={on_error!r}: expected "raise" or "skip"')


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def iter_line_chunks(path: str | Path, encoding: str, chunk_bytes: int) -> Iterator[tuple[int, list[str]]]:
    """(number of the first line, lines without their ends) for consecutive chunks of whole lines."""
    # an incremental decoder keeps a character that is cut by the chunk border for the next chunk
    decoder = codecs.getincrementaldecoder(encoding)()
    first_line, tail = 1, ""
    with _open(Path(path)) as stream:
        while raw := stream.read(chunk_bytes):
            lines = (tail + decoder.decode(raw)).split("\n")
            tail = lines.pop()
            if lines:
                yield first_line, lines
                first_line += len(lines)
        tail += decoder.decode(b"", final=True)
        if tail:
            yield first_line, [tail]


def read_table_chunks(
    path: str | Path,
    columns: list[Column],
    separator: str,
    *,
    encoding: str = "utf-8",
    header: bool = False,
    quoted: bool = False,
    on_error: OnError = "raise",
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> Iterator[TableChunk]:
    """Typed chunks of a delimited text file, in file order.

    >>> columns = [Column("user", "int"), Column("rating", "float")]
    >>> next(read_table_chunks("ratings.dat", columns, "::")).frame  # doctest: +SKIP

    `quoted=True` understands CSV quoting (a field of several lines is malformed). A path ending in `.gz` is
    decompressed on the way.

    Raises:
        MalformedLineError: with `on_error="raise"`, at the first line that does not fit.
        UnicodeDecodeError: the file is not in `encoding`.
    """
    check_on_error(on_error)
    skip_header = header
    for first_line, lines in iter_line_chunks(path, encoding, chunk_bytes):
        if skip_header:
            skip_header, first_line, lines = False, first_line + 1, lines[1:]
        yield _parse_chunk(Path(path), first_line, lines, columns, separator, quoted, on_error)


def read_table(path: str | Path, columns: list[Column], separator: str, **options: object) -> TableChunk:
    """The whole file as one TableChunk; arguments and errors as for `read_table_chunks`."""
    chunks = list(read_table_chunks(path, columns, separator, **options))  # type: ignore[arg-type]
    if not chunks:
        chunks = [_parse_chunk(Path(path), 1, [], columns, separator, False, "raise")]
    return TableChunk(pl.concat([chunk.frame for chunk in chunks]), sum(chunk.num_skipped for chunk in chunks))


def _parse_chunk(
    path: Path,
    first_line: int,
    lines: list[str],
    columns: list[Column],
    separator: str,
    quoted: bool,
    on_error: OnError,
) -> TableChunk:
    stripped = pl.Series("line", lines, dtype=pl.String).str.strip_suffix("\r")
    if quoted:
        rows = [next(csv.reader([line], delimiter=separator), []) for line in stripped.to_list()]
        fields = pl.Series("fields", rows, dtype=pl.List(pl.String))
    else:
        fields = stripped.str.split(separator)
    frame = fields.to_frame("fields").select(
        pl.col("fields").list.len().alias("#width"),
        *(pl.col("fields").list.get(i, null_on_oob=True).alias(column.name) for i, column in enumerate(columns)),
    )
    empty = {column.name: pl.col(column.name) == "" for column in columns}
    typed = frame.select(
        *(
            pl.when(empty[column.name]).then(None).otherwise(_converted(column)).alias(column.name)
            if column.kind != "str" or column.optional
            else _converted(column)
            for column in columns
        )
    )
    # a field fits when it converted, or when it is empty and may be
    fits = pl.Series("fits", frame["#width"] == len(columns))
    for column in columns:
        field_fits = typed[column.name].is_not_null()
        if column.optional:
            field_fits |= (frame[column.name] == "").fill_null(False)
        fits &= field_fits
    num_bad = len(lines) - int(fits.sum())
    if num_bad and on_error == "raise":
        row = int(fits.arg_min())
        raise MalformedLineError(path, first_line + row, _problem(frame, typed, columns, row), stripped[row])
    return TableChunk(typed.filter(fits) if num_bad else typed, num_bad)


def _problem(frame: pl.DataFrame, typed: pl.DataFrame, columns: list[Column], row: int) -> str:
    width = frame["#width"][row]
    if width != len(columns):
        return f"expected {len(columns)} columns, got {width}"
    for number, column in enumerate(columns, start=1):
        field = frame[column.name][row]
        if typed[column.name][row] is None and not (column.optional and field == ""):
            return f"column {number} ({column.name}) should be {_KIND_WORDS[column.kind]}, got {field!r}"
    raise AssertionError("a malformed line has a malformed field")
