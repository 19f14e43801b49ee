"""Criteo's .npy files in small: two days of synthetic rows."""

from pathlib import Path

import numpy as np

from recsys_edu.datasets.synthetic_criteo import SyntheticCriteo


def write_small_criteo(folder: Path) -> Path:
    folder.mkdir()
    for day, rows in enumerate((600, 400)):
        chunk = next(SyntheticCriteo(seed=3).chunks(rows, start_row=1000 * day))
        ids = np.ascontiguousarray(chunk.ids, dtype=np.int32)
        for part, values in (("dense", chunk.dense), ("sparse", ids), ("labels", chunk.labels)):
            np.save(folder / f"day_{day}_{part}.npy", np.ascontiguousarray(values))
    return folder
