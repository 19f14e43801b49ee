"""Files that are whole or refused: torch's zip archives with a checksum of every entry inside, written aside.

    model.pt2
      model/models/model.json, model/data/...      what torch wrote
      model/recsys_edu/metadata.json               what we know about it
      model/recsys_edu/checksums.json              SHA-256 of every other entry

Checksums find damage: half a copy, a flipped bit, files of two versions mixed. They do not find malice, whoever can
change an entry can change its checksum; take models only from where you would take code.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

OURS = "recsys_edu"
CHECKSUMS = f"{OURS}/checksums.json"
METADATA = f"{OURS}/metadata.json"
ARCHIVE_FORMAT = 1


class PackageError(ValueError):
    """A file that is damaged, or that is not what it should be; the message names the file and what to do."""


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A path to write to; it becomes `path` when the block succeeds, and goes when it fails.

    A reader of `path` finds the old file or the new one, never half of either. It lies in a folder beside it, under
    its final name, because torch names an archive's entries after its file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.stem}.", dir=path.parent) as folder:
        aside = Path(folder) / path.name
        yield aside
        with aside.open("rb+") as file:
            os.fsync(file.fileno())  # the bytes before the name
        os.replace(aside, path)


def seal(path: Path, metadata: Mapping[str, Any]) -> None:
    """Add metadata and checksums to an archive that torch has written."""
    with zipfile.ZipFile(path, "a") as archive:
        folder = _folder_of(archive)
        archive.writestr(f"{folder}/{METADATA}", json.dumps(metadata, indent=1))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"{folder}/{CHECKSUMS}", json.dumps(_checksums(archive), indent=1))


def verify(path: Path) -> dict[str, Any]:
    """Check every entry of a sealed archive; returns its metadata.

    Raises:
        FileNotFoundError: no such file.
        PackageError: no archive, not one of ours, an entry that is missing, foreign or changed.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with zipfile.ZipFile(path) as archive:
            folder = _folder_of(archive)
            name = f"{folder}/{CHECKSUMS}"
            if name not in archive.namelist():
                raise PackageError(f"{path} has no {CHECKSUMS}: it was not written by recsys_edu")
            expected, found = json.loads(archive.read(name)), _checksums(archive)
            metadata = json.loads(archive.read(f"{folder}/{METADATA}"))
    except (zipfile.BadZipFile, KeyError, json.JSONDecodeError, OSError, EOFError, NotImplementedError) as error:
        raise PackageError(f"{path} is damaged ({error}): copy or write it again") from error
    for entry in sorted(expected.keys() | found.keys()):
        if expected.get(entry) != found.get(entry):
            what = "is missing" if entry not in found else "is not its own" if entry not in expected else "has changed"
            raise PackageError(f"{path} is damaged, its entry {entry} {what}: copy or write it again")
    return metadata


def _folder_of(archive: zipfile.ZipFile) -> str:
    """The folder that all of torch's entries lie in."""
    names = archive.namelist()
    if not names or "/" not in names[0]:
        raise zipfile.BadZipFile("it holds no archive of torch's")
    return names[0].split("/", 1)[0]


def _checksums(archive: zipfile.ZipFile) -> dict[str, str]:
    """SHA-256 by entry; reading one also checks the zip format's own sum."""
    sums = {}
    for name in archive.namelist():
        if name.endswith(CHECKSUMS):
            continue
        with archive.open(name) as entry:
            sums[name] = hashlib.file_digest(entry, "sha256").hexdigest()
    return sums


def save_quantized_state(model: nn.Module, path: str | Path) -> None:
    """Write the state dict of a quantised (or sharded quantised) model: codes, scales, biases, dense weights.

    >>> save_quantized_state(quantised, "model.pt")                         # doctest: +SKIP
    >>> load_quantized_state(the_same_architecture, "model.pt")             # doctest: +SKIP

    Sharded and unsharded models have the same state dict, so either loads what the other has saved.
    """
    path = Path(path)
    state = model.state_dict()
    with written_aside(path) as aside:
        torch.save(state, aside)
        seal(aside, {"format": ARCHIVE_FORMAT, "kind": "state", "entries": sorted(state), "torch": torch.__version__})


def load_quantized_state(model: nn.Module, path: str | Path, device: torch.device | str = "cpu") -> None:
    """Read what `save_quantized_state` wrote into a model of the same tables, in place.

    Everything is checked before anything is changed: the file's sums, then the names.

    Raises:
        FileNotFoundError, PackageError: no such file; damage; other names than the model's.
        RuntimeError: (from load_state_dict) other sizes than the model's.
    """
    path = Path(path)
    metadata = verify(path)
    if metadata.get("kind") != "state":
        raise PackageError(f"{path} holds a {metadata.get('kind')} model, not a state: load_package reads it")
    expected, found = set(model.state_dict()), set(metadata["entries"])
    if expected != found:
        missing, foreign = sorted(expected - found)[:3], sorted(found - expected)[:3]
        raise PackageError(
            f"{path} is of another model: it lacks {missing} and has {foreign} instead; build the model with the same "
            "tables and layers"
        )
    model.load_state_dict(torch.load(path, map_location=device, weights_only=True))
