"""Fetch MovieLens-100K once, verify it, and keep it in a cache that a crash or a second process cannot spoil.

GroupLens does not allow the data to be redistributed, so nothing of it is part of this project: it is fetched
from GroupLens itself or, where that server cannot be reached, taken out of the `recbole` wheel on the package
index. Both sources are rewritten into the same three plain text files, whose checksums are known:

    movielens-100k/ratings.tsv   user_id item_id rating timestamp
    movielens-100k/users.tsv     user_id age gender occupation zip_code
    movielens-100k/items.tsv     item_id title year genres      (genres joined by "|"; year may be empty)

Because the bytes are fixed, processes that fetch at the same time can only replace a file by an equal one.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path

DATA_VARIABLE = "RECSYS_EDU_DATA"
GROUPLENS_URL = "https://files.grouplens.org/datasets/movielens/ml-100k.zip"
GROUPLENS_MD5 = "0e33842e24a9c977be4e0107933c0723"
RECBOLE_REQUIREMENT = "recbole==1.2.1"
RECBOLE_SHA256 = {
    "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
    "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
    "ml-100k.user": "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972",
}
FOLDER_NAME = "movielens-100k"
# file: (data lines, SHA-256 of the rewritten file)
CACHED_FILES = {
    "ratings.tsv": (100_000, "ecb4025ec09d52830e65854de08fd07a79ff7bb9201f7067d753c2f0516e5674"),
    "users.tsv": (943, "d307879922714236e165fd2bc58ed81651098a488a5090e2de5738e81f2d74ae"),
    "items.tsv": (1_682, "a39728086e0707ccabefe317cd76e24abd1891b9fb9c7232e7f651eaf123d222"),
}
HEADERS = {
    "ratings.tsv": "user_id\titem_id\trating\ttimestamp",
    "users.tsv": "user_id\tage\tgender\toccupation\tzip_code",
    "items.tsv": "item_id\ttitle\tyear\tgenres",
}
_NETWORK_TIMEOUT_S = 10
_PIP_TIMEOUT_S = 120
_YEAR = re.compile(r"^(.*)\((\d{4})\)")
# u.item's nineteen 0/1 columns, in order
GENRES_100K = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip


class DataUnavailableError(RuntimeError):
    """A data set is neither cached nor obtainable; the message says what was tried and what to do by hand."""


def data_root(root: str | Path | None = None) -> Path:
    """The folder that holds fetched data: `root`, else $RECSYS_EDU_DATA, else `data/` of the checkout this module
    runs from, else the user's cache folder."""
    if root is not None:
        return Path(root)
    if chosen := os.environ.get(DATA_VARIABLE):
        return Path(chosen).expanduser()
    checkout = Path(__file__).resolve().parents[2]
    if (checkout / "pyproject.toml").is_file() and (checkout / "data").is_dir():
        return checkout / "data"
    if sys.platform == "win32":
        cache = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        cache = Path.home() / "Library" / "Caches"
    else:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "recsys_edu"


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def is_movielens_100k_cached(root: str | Path | None = None) -> bool:
    """Whether all three files are in the cache and have the right checksums."""
    folder = data_root(root) / FOLDER_NAME
    return all(
        (folder / name).is_file() and sha256_of(folder / name) == digest for name, (_, digest) in CACHED_FILES.items()
    )


def fetch_movielens_100k(root: str | Path | None = None) -> Path:
    """The folder with MovieLens-100K's three files, fetched first if the cache has not all of them intact.

    >>> fetch_movielens_100k()                                      # doctest: +SKIP
    PosixPath('.../data/movielens-100k')

    Tried in this order: the cache; `ml-100k.zip` or the recbole wheel put into `data_root(root)` by hand;
    GroupLens's zip; the recbole wheel through pip. 943 users, 1,682 items, 100,000 ratings.

    Raises:
        DataUnavailableError: nothing of that worked, or the files cannot be written (a full disk).
    """
    home = data_root(root)
    folder = home / FOLDER_NAME
    if is_movielens_100k_cached(home):
        return folder
    failures = []
    for source, read in _sources(home):
        try:
            files = read()
            _verify(files)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile, subprocess.SubprocessError) as error:
            failures.append(f"  {source}: {error}")
            continue
        _keep(folder, files)
        return folder
    raise DataUnavailableError(
        "MovieLens-100K is not cached and could not be fetched:\n" + "\n".join(failures) + "\n"
        f"With a browser, download {GROUPLENS_URL} and put ml-100k.zip into {home} "
        f"(or set {DATA_VARIABLE} to the folder that holds it), then run this again."
    )


def _keep(folder: Path, files: dict[str, bytes]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_atomically(folder / name, content)
    except OSError as error:
        raise DataUnavailableError(
            f"MovieLens-100K (2 MB) cannot be written to {folder}: {error}\nFree some space there, or set "
            f"{DATA_VARIABLE} to a folder that can be written, then run this again."
        ) from error


def _sources(home: Path) -> list[tuple[str, Callable[[], dict[str, bytes]]]]:
    by_hand: list[tuple[str, Callable[[], dict[str, bytes]]]] = []
    if (home / "ml-100k.zip").is_file():
        by_hand.append((str(home / "ml-100k.zip"), lambda: read_grouplens_zip((home / "ml-100k.zip").read_bytes())))
    for wheel in sorted(home.glob("recbole-*.whl")):
        by_hand.append((str(wheel), lambda wheel=wheel: read_recbole_wheel(wheel.read_bytes())))
    return [
        *by_hand,
        (GROUPLENS_URL, lambda: read_grouplens_zip(_download(GROUPLENS_URL), md5=GROUPLENS_MD5)),
        (f"pip download {RECBOLE_REQUIREMENT}", lambda: read_recbole_wheel(_download_wheel(RECBOLE_REQUIREMENT))),
    ]


def _download(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=_NETWORK_TIMEOUT_S) as response:
        return response.read()


def _download_wheel(requirement: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary=:all:", "--dest", folder, requirement]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PIP_TIMEOUT_S, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            last_lines = " ".join(done.stderr.strip().splitlines()[-2:])
            raise OSError(f"pip ended with status {done.returncode}: {last_lines or 'no message'}")
        return wheels[0].read_bytes()


def read_grouplens_zip(content: bytes, md5: str | None = None) -> dict[str, bytes]:
    """The cache files' bytes from GroupLens's ml-100k.zip (u.data, u.user, u.item).

    Raises:
        ValueError: the MD5 differs, or a line does not fit the format.
        KeyError, zipfile.BadZipFile: not such a zip.
    """
    if md5 is not None and (got := hashlib.md5(content, usedforsecurity=False).hexdigest()) != md5:
        raise ValueError(f"MD5 is {got}, expected {md5}: the download was cut short or altered")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        text = {name: archive.read(f"ml-100k/{name}").decode("latin-1") for name in ("u.data", "u.user", "u.item")}
    items = [_item_from_grouplens(line.split("|")) for line in _lines(text["u.item"])]
    return {
        "ratings.tsv": _rewrite("ratings.tsv", [line.split("\t") for line in _lines(text["u.data"])]),
        "users.tsv": _rewrite("users.tsv", [line.split("|") for line in _lines(text["u.user"])]),
        "items.tsv": _rewrite("items.tsv", items),
    }


def read_recbole_wheel(content: bytes) -> dict[str, bytes]:
    """The cache files' bytes from the recbole wheel, whose three members' checksums are verified first.

    Raises:
        ValueError: a checksum differs. KeyError, zipfile.BadZipFile: not such a wheel.
    """
    text = {}
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for name, expected in RECBOLE_SHA256.items():
            member = archive.read(f"recbole/dataset_example/ml-100k/{name}")
            if (got := hashlib.sha256(member).hexdigest()) != expected:
                raise ValueError(f"{name} has SHA-256 {got}, expected {expected}")
            text[name] = member.decode("utf-8")
    rows = {name: [line.split("\t") for line in _lines(body)[1:]] for name, body in text.items()}
    return {
        "ratings.tsv": _rewrite("ratings.tsv", rows["ml-100k.inter"]),
        "users.tsv": _rewrite("users.tsv", rows["ml-100k.user"]),
        "items.tsv": _rewrite("items.tsv", [_item_from_recbole(row) for row in rows["ml-100k.item"]]),
    }


def _lines(text: str) -> list[str]:
    return [line for line in text.split("\n") if line]


def split_title(title: str) -> tuple[str, str]:
    """("Toy Story", "1995") from "Toy Story (1995)"; the year is "" where the title has none."""
    match = _YEAR.match(title)
    return (match[1].strip(), match[2]) if match else (title.strip(), "")


def _item_from_grouplens(row: list[str]) -> list[str]:
    if len(row) != 5 + len(GENRES_100K):
        raise ValueError(f"u.item: expected {5 + len(GENRES_100K)} columns, got {len(row)} in {row[:2]}")
    genres = [genre for genre, flag in zip(GENRES_100K, row[5:]) if flag == "1"]
    return [row[0], *split_title(row[1]), "|".join(genres)]


def _item_from_recbole(row: list[str]) -> list[str]:
    item_id, title, year, genres = row
    if title == "unkonwn":  # recbole's spelling for the one item whose title is "unknown"
        title, year = "unknown", ""
    if year and not year.isdigit():  # "... (1995)", "V": the parser took the tag after the year for the year
        title, year = split_title(title)
    return [item_id, title.strip(), year, genres.replace(" ", "|")]


def _rewrite(name: str, rows: list[list[str]]) -> bytes:
    width = HEADERS[name].count("\t") + 1
    for number, row in enumerate(rows, start=1):
        if len(row) != width:
            raise ValueError(f"row {number} for {name}: expected {width} columns, got {len(row)}: {row}")
    return ("\n".join([HEADERS[name], *("\t".join(row) for row in rows)]) + "\n").encode("utf-8")


def _verify(files: dict[str, bytes]) -> None:
    for name, (num_lines, digest) in CACHED_FILES.items():
        got_lines = files[name].count(b"\n") - 1
        if got_lines != num_lines:
            raise ValueError(f"{name} would have {got_lines:,} rows, expected {num_lines:,}")
        if (got := hashlib.sha256(files[name]).hexdigest()) != digest:
            raise ValueError(f"{name} would have SHA-256 {got}, expected {digest}")


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` beside `path` and move it there: a reader sees the old file or the new one, never a part."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as aside:
        try:
            aside.write(content)
            aside.flush()
            os.fsync(aside.fileno())
            aside.close()
            os.replace(aside.name, path)
        except BaseException:
            aside.close()
            Path(aside.name).unlink(missing_ok=True)
            raise
