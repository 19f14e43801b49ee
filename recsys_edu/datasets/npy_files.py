"""Large .npy files: read the header or some rows only, and write rows as they come, never leaving half a file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np


def read_npy_header(path: str | Path) -> tuple[tuple[int, ...], np.dtype]:
    """(shape, dtype) of a .npy file; the data is not read.

    Raises:
        ValueError: not a .npy file, or one in Fortran order.
    """
    with open(path, "rb") as stream:
        try:
            version = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran_order, dtype = read(stream)
        except ValueError as error:
            raise ValueError(f"{path} is not a readable .npy file: {error}") from error
    if fortran_order:
        raise ValueError(f"{path} is stored in Fortran order: expected rows one after another (C order)")
    return shape, dtype


def read_npy_rows(path: str | Path, start_row: int, num_rows: int, mmap_mode: bool = False) -> np.ndarray:
    """Rows `[start_row, start_row + num_rows)` of a two-dimensional .npy file, copied or memory-mapped.

    Raises:
        ValueError: the array is not 2-D, holds pickled objects, or has fewer rows.
    """
    shape, _ = read_npy_header(path)
    if len(shape) != 2:
        raise ValueError(f"{path} has shape {shape}: expected two dimensions (rows, columns)")
    if start_row < 0 or num_rows < 0 or start_row + num_rows > shape[0]:
        raise ValueError(
            f"{path} has {shape[0]:,} rows: cannot read rows {start_row:,} to {start_row + num_rows - 1:,}"
        )
    if 0 in shape:
        return np.load(path, allow_pickle=False)
    # mapping does not read: only the pages that hold the wanted rows are
    rows = np.load(path, mmap_mode="r", allow_pickle=False)[start_row : start_row + num_rows]
    return rows if mmap_mode else np.array(rows)


@contextmanager
def replace_when_done(path: str | Path) -> Iterator[Path]:
    """A fresh path beside `path` to write to; moved onto `path` if the block succeeds, removed if it fails."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    try:
        yield Path(aside)
        os.replace(aside, path)
    finally:
        Path(aside).unlink(missing_ok=True)


class NpyAppender:
    """A .npy file of known row shape whose number of rows is only known at the end.

    >>> with NpyAppender("ids.npy", (26,), np.int64) as out:        # doctest: +SKIP
    ...     out.append(chunk)

    Rows go to a file aside; leaving the block without an error completes its header and moves it into place.
    """

    def __init__(self, path: str | Path, row_shape: tuple[int, ...], dtype: np.dtype | type) -> None:
        self.path = Path(path)
        self.row_shape = row_shape
        self.dtype = np.dtype(dtype)
        self.num_rows = 0
        self._aside = replace_when_done(self.path)
        self._stream: BinaryIO | None = None

    def _write_header(self) -> int:
        assert self._stream is not None
        # numpy pads headers so that the number of rows can grow without moving the data
        self._stream.seek(0)
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.num_rows, *self.row_shape)}
        np.lib.format.write_array_header_1_0(self._stream, header)
        return self._stream.tell()

    def __enter__(self) -> NpyAppender:
        self._stream = open(self._aside.__enter__(), "wb")
        self._header_bytes = self._write_header()
        return self

    def append(self, rows: np.ndarray) -> None:
        """Add rows of the right shape at the end."""
        if rows.shape[1:] != self.row_shape:
            raise ValueError(f"{self.path}: rows of shape {rows.shape[1:]}, expected {self.row_shape}")
        assert self._stream is not None
        self._stream.write(np.ascontiguousarray(rows, dtype=self.dtype).data)
        self.num_rows += len(rows)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._stream is not None
        if kind is None and self._write_header() != self._header_bytes:
            kind, error = RuntimeError, RuntimeError(f"{self.path}: the header outgrew its room")
        self._stream.close()
        self._aside.__exit__(kind, error, trace)
