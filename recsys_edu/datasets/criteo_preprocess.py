"""Criteo's text files to .npy form, streamed: no step holds a whole file, whatever its size.

| step | memory at most |
|---|---|
| tsv_to_npys | about ten chunks of text (16 MiB each) |
| sparse_to_contiguous | 24 bytes per distinct id of the columns done in one pass, and one chunk of rows |
| shuffle | two buckets of rows (`bucket_rows` of 208 bytes: 7 GB at the default, which needs 250 open files for 1TB) |

Every output is written aside and moved into place when it is complete.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from recsys_edu.datasets.criteo_format import (
    CAT_FEATURE_COUNT,
    DAYS,
    FREQUENCY_THRESHOLD,
    INT_FEATURE_COUNT,
    read_criteo_chunks,
)
from recsys_edu.datasets.npy_files import NpyAppender, read_npy_header, read_npy_rows
from recsys_edu.datasets.text_tables import OnError
from recsys_edu.datasets.vocabulary import VocabularyBuilder

CHUNK_ROWS = 1 << 18
_BUCKET_ROWS = 1 << 24


def _row_chunks(path: str | Path, label: str) -> Iterator[np.ndarray]:
    """A .npy file's rows, `CHUNK_ROWS` at a time, with a progress bar."""
    num_rows = read_npy_header(path)[0][0]
    with tqdm(total=num_rows, unit="row", unit_scale=True, desc=f"{label} {Path(path).name}", leave=False) as bar:
        for start in range(0, num_rows, CHUNK_ROWS):
            rows = read_npy_rows(path, start, min(CHUNK_ROWS, num_rows - start), mmap_mode=True)
            yield rows
            bar.update(len(rows))


class BinaryCriteoUtils:
    """Criteo as .npy files: converting, numbering ids, shuffling, and reading a rank's share.

    >>> outputs = [f"day_0_{kind}.npy" for kind in ("dense", "sparse", "labels")]
    >>> BinaryCriteoUtils.tsv_to_npys("day_0", *outputs)            # doctest: +SKIP

    `path_manager_key` is accepted everywhere for compatibility; plain local paths are used.
    Counterpart: torchrec.datasets.criteo.BinaryCriteoUtils.
    """

    @staticmethod
    def tsv_to_npys(
        in_file: str,
        out_dense_file: str,
        out_sparse_file: str,
        out_labels_file: str,
        dataset_name: str = "criteo_1tb",
        path_manager_key: str = "torchrec",
        on_error: OnError = "raise",
    ) -> int:
        """Convert one text file; returns how many malformed lines were left out (0 with on_error="raise").

        dense float32 `[rows, 13]`: log(value + 3) for criteo_1tb, log(value + 5) for criteo_kaggle, whose smallest
        integers are -1 and -3 (TorchRec finds the smallest anew in each file; on the real data both agree).
        sparse int64 `[rows, 26]` from hex. labels int32 `[rows, 1]`. What is missing counts as 0.

        Raises:
            MalformedLineError: a line does not fit, with file and line; nothing is written then.
            ValueError: an unknown data set.
        """
        num_skipped = 0
        size = os.path.getsize(in_file) if not in_file.endswith(".gz") else None
        with (
            NpyAppender(out_dense_file, (INT_FEATURE_COUNT,), np.float32) as dense,
            NpyAppender(out_sparse_file, (CAT_FEATURE_COUNT,), np.int64) as sparse,
            NpyAppender(out_labels_file, (1,), np.int32) as labels,
            tqdm(unit="row", unit_scale=True, desc=f"converting {Path(in_file).name}", leave=False) as bar,
        ):
            if size is not None:
                bar.set_postfix_str(f"of {size / 1e6:,.0f} MB")
            for chunk in read_criteo_chunks(in_file, dataset_name=dataset_name, on_error=on_error):
                dense.append(chunk.dense)
                sparse.append(chunk.sparse)
                labels.append(chunk.labels)
                num_skipped += chunk.num_skipped
                bar.update(len(chunk))
        return num_skipped

    @staticmethod
    def get_shape_from_npy(path: str, path_manager_key: str = "torchrec") -> tuple[int, ...]:
        """The shape in a .npy file's header; the data is not read."""
        return read_npy_header(path)[0]

    @staticmethod
    def get_file_row_ranges_and_remainder(
        lengths: list[int], rank: int, world_size: int, start_row: int = 0, last_row: int | None = None
    ) -> tuple[dict[int, tuple[int, int]], int]:
        """Which rows of which files are a rank's, when all files' rows are shared out in equal, contiguous parts.

        >>> BinaryCriteoUtils.get_file_row_ranges_and_remainder([10, 5, 8], rank=1, world_size=3)
        ({0: (8, 9), 1: (0, 4), 2: (0, 0)}, 2)

        Returns {file: (first row, last row)}, both inclusive, and how many rows are left over when the total is
        divided by the world size; each of the first that many ranks has one of them. Only the rows `start_row`
        to `last_row` (inclusive, counted over all files) are shared out.
        """
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} does not lie in [0, world_size={world_size})")
        total = sum(lengths)
        last_row = total - 1 if last_row is None else last_row
        if not 0 <= start_row <= last_row + 1 <= total:
            raise ValueError(f"rows {start_row} to {last_row} do not lie within the files' {total} rows")
        each, remainder = divmod(last_row - start_row + 1, world_size)
        low = start_row + rank * each + min(rank, remainder)
        high = low + each + (rank < remainder)
        ranges, file_start = {}, 0
        for file, length in enumerate(lengths):
            first, end = max(low, file_start), min(high, file_start + length)
            if first < end:
                ranges[file] = (first - file_start, end - 1 - file_start)
            file_start += length
        return ranges, remainder

    @staticmethod
    def load_npy_range(
        fname: str, start_row: int, num_rows: int, path_manager_key: str = "torchrec", mmap_mode: bool = False
    ) -> np.ndarray:
        """Some rows of a two-dimensional .npy file, copied or (mmap_mode) mapped.

        Raises:
            ValueError: the array is not 2-D, or has fewer rows.
        """
        return read_npy_rows(fname, start_row, num_rows, mmap_mode)

    @staticmethod
    def sparse_to_contiguous(
        in_files: list[str],
        output_dir: str,
        frequency_threshold: int = FREQUENCY_THRESHOLD,
        columns: int = CAT_FEATURE_COUNT,
        path_manager_key: str = "torchrec",
        output_file_suffix: str = "_contig_freq.npy",
        columns_per_pass: int = CAT_FEATURE_COUNT,
    ) -> list[int]:
        """Number each column's ids 2, 3, ... in order of first appearance over all files; rare ids become 1.

        `day_0_sparse.npy` gives `day_0_sparse_contig_freq.npy` in `output_dir`. An id is rare when it appears
        fewer than `frequency_threshold` times. Fewer `columns_per_pass` need less memory and more passes.
        Returns the rows that each column's table needs (largest id + 1).

        Raises:
            ValueError: a file has another number of columns.
        """
        for path in in_files:
            if (shape := read_npy_header(path)[0]) and shape[1:] != (columns,):
                raise ValueError(f"{path} has shape {shape}: expected (rows, {columns})")
        num_rows, outputs = [], [Path(output_dir) / (Path(path).stem + output_file_suffix) for path in in_files]
        with tempfile.TemporaryDirectory(dir=output_dir, prefix=".contiguous.") as aside:
            parts = [Path(aside) / output.name for output in outputs]
            for first in range(0, columns, columns_per_pass):
                chosen = range(first, min(first + columns_per_pass, columns))
                builders = {column: VocabularyBuilder() for column in chosen}
                for path in in_files:
                    for rows in _row_chunks(path, "counting"):
                        for column in chosen:
                            builders[column].add(rows[:, column])
                vocabularies = {column: builders[column].finish(frequency_threshold) for column in chosen}
                num_rows += [vocabularies[column].num_rows for column in chosen]
                for path, part in zip(in_files, parts):
                    shape, dtype = read_npy_header(path)
                    mode = "w+" if first == 0 else "r+"
                    out = np.lib.format.open_memmap(part, mode=mode, dtype=dtype, shape=shape if first == 0 else None)
                    done = 0
                    for rows in _row_chunks(path, "numbering"):
                        for column in chosen:
                            out[done : done + len(rows), column] = vocabularies[column].encode(rows[:, column])
                        done += len(rows)
                    out.flush()
                    del out
            for part, output in zip(parts, outputs):
                os.replace(part, output)
        return num_rows

    @staticmethod
    def shuffle(
        input_dir_labels_and_dense: str,
        input_dir_sparse: str,
        output_dir_shuffled: str,
        rows_per_day: dict[int, int],
        output_dir_full_set: str | None = None,
        days: int = DAYS,
        int_columns: int = INT_FEATURE_COUNT,
        sparse_columns: int = CAT_FEATURE_COUNT,
        path_manager_key: str = "torchrec",
        random_seed: int = 0,
        bucket_rows: int = _BUCKET_ROWS,
    ) -> None:
        """Permute the rows of all days but the last uniformly, and write day files of the same sizes again.

        Reads and writes `day_{d}_{dense,sparse,labels}.npy`. The last day (validation and test) is copied as it
        is. Dense, sparse and labels of a row stay together. With `output_dir_full_set`, the shuffled training rows
        are also written as `full_{dense,sparse,labels}.npy` (TorchRec's single float32 `full.npy` cannot hold ids
        above 2**24).

        Every row first goes to a random bucket on disk; each bucket is then shuffled in memory. Together these
        make a uniform permutation, in the memory of one bucket.

        Raises:
            ValueError: a day's files have other shapes than `rows_per_day` and the column counts say.
        """
        folders = {
            "dense": input_dir_labels_and_dense,
            "sparse": input_dir_sparse,
            "labels": input_dir_labels_and_dense,
        }
        widths = {"dense": int_columns, "sparse": sparse_columns, "labels": 1}
        training_days = range(days - 1)
        _check_days(folders, widths, rows_per_day, training_days)
        output = Path(output_dir_shuffled)
        output.mkdir(parents=True, exist_ok=True)
        total = sum(rows_per_day[day] for day in training_days)
        num_buckets = max(1, -(-total // bucket_rows))
        for kind, folder in folders.items():
            inputs = [Path(folder) / f"day_{day}_{kind}.npy" for day in training_days]
            sizes = [rows_per_day[day] for day in training_days]
            targets = [(output / path.name, size) for path, size in zip(inputs, sizes)]
            if output_dir_full_set is None:
                _shuffle_rows(inputs, [targets], num_buckets, random_seed, output)
            else:
                full = [(Path(output_dir_full_set) / f"full_{kind}.npy", total)]
                _shuffle_rows(inputs, [targets, full], num_buckets, random_seed, output)
            last = f"day_{days - 1}_{kind}.npy"
            with tempfile.TemporaryDirectory(dir=output, prefix=".copy.") as aside:
                os.replace(shutil.copyfile(Path(folder) / last, Path(aside) / last), output / last)


def _check_days(
    folders: dict[str, str], widths: dict[str, int], rows_per_day: dict[int, int], training_days: range
) -> None:
    for kind, folder in folders.items():
        for day in training_days:
            path = Path(folder) / f"day_{day}_{kind}.npy"
            shape, expected = read_npy_header(path)[0], (rows_per_day[day], widths[kind])
            if shape != expected:
                raise ValueError(f"{path} has shape {shape}, expected {expected}")


def _shuffle_rows(
    inputs: list[Path],
    copies: list[list[tuple[Path, int]]],
    num_buckets: int,
    seed: int,
    scratch: Path,
) -> None:
    """Write the inputs' rows in an order that depends on the seed and the numbers of rows alone.

    copies: each a list of (file, rows) to spread the shuffled rows over.
    """
    shape, dtype = read_npy_header(inputs[0])
    with tempfile.TemporaryDirectory(dir=scratch, prefix=".buckets.") as aside:
        buckets = [Path(aside) / f"bucket_{b}.npy" for b in range(num_buckets)]
        scatter = np.random.default_rng([seed, 0])
        with contextlib.ExitStack() as stack:
            appenders = [stack.enter_context(NpyAppender(bucket, shape[1:], dtype)) for bucket in buckets]
            for path in inputs:
                for rows in _row_chunks(path, "scattering"):
                    bucket_of_row = scatter.integers(num_buckets, size=len(rows))
                    for number in np.unique(bucket_of_row):
                        appenders[number].append(rows[bucket_of_row == number])

        def shuffled() -> Iterator[np.ndarray]:
            inner = np.random.default_rng([seed, 1])
            for bucket in buckets:
                rows = np.load(bucket)
                yield rows[inner.permutation(len(rows))]

        for targets in copies:
            _spread(shuffled(), targets, shape[1:], dtype)


def _spread(
    pieces: Iterator[np.ndarray], targets: list[tuple[Path, int]], row_shape: tuple[int, ...], dtype: np.dtype
) -> None:
    """Write a stream of rows into files of the given numbers of rows."""
    rest = np.empty((0, *row_shape), dtype=dtype)
    for path, num_rows in targets:
        with NpyAppender(path, row_shape, dtype) as out:
            while out.num_rows < num_rows:
                if not len(rest):
                    rest = next(pieces)
                    continue
                take = min(num_rows - out.num_rows, len(rest))
                out.append(rest[:take])
                rest = rest[take:]
