"""Readers and cache on made-up files; what needs the real data is skipped where it can be neither found nor fetched."""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import zipfile

import numpy as np
import polars as pl
import pytest
import torch

from recsys_edu.datasets import baselines, download
from recsys_edu.datasets.movielens import (
    DEFAULT_COLUMN_NAMES,
    load_movielens_100k,
    movielens_20m,
    movielens_25m,
    movielens_ctr,
    read_movielens,
)
from recsys_edu.datasets.movielens_ctr import _out_of_fold_mean, random_split
from recsys_edu.datasets.movielens_formats import MovieLens
from recsys_edu.datasets.tabular import JaggedColumn
from recsys_edu.datasets.text_tables import MalformedLineError

U_DATA = "1\t2\t3\t881250949\n2\t1\t5\t891717742\n"
U_USER = "1|24|M|technician|85711\n2|53|F|other|T8H1N\n"
FLAGS = {"Toy": "0|0|0|1|1|1" + "|0" * 13, "none": "1" + "|0" * 18}
U_ITEM = (
    f"1|Toy Story (1995)|01-Jan-1995||http://us.imdb.com/M/title-exact?Toy%20Story%20(1995)|{FLAGS['Toy']}\n"
    f"2|Misérables, Les (1995) (V) |01-Jan-1995|||{FLAGS['none']}\n"
    f"3|unknown||||{FLAGS['none']}\n"
)


def made_up_zip() -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, text in (("u.data", U_DATA), ("u.user", U_USER), ("u.item", U_ITEM)):
            archive.writestr(f"ml-100k/{name}", text.encode("latin-1"))
    return content.getvalue()


def expect_these(monkeypatch, files: dict[str, bytes]) -> None:
    known = {name: (body.count(b"\n") - 1, hashlib.sha256(body).hexdigest()) for name, body in files.items()}
    monkeypatch.setattr(download, "CACHED_FILES", known)


def no_network(monkeypatch) -> None:
    def refuse(*_args):
        raise OSError("no network here")

    monkeypatch.setattr(download, "_download", refuse)
    monkeypatch.setattr(download, "_download_wheel", refuse)


def test_grouplens_zip_is_rewritten_and_read_like_the_raw_files(tmp_path, monkeypatch):
    files = download.read_grouplens_zip(made_up_zip())
    assert files["items.tsv"].decode().splitlines()[1:] == [
        "1\tToy Story\t1995\tAnimation|Children's|Comedy",
        "2\tMisérables, Les\t1995\tunknown",
        "3\tunknown\t\tunknown",
    ]
    expect_these(monkeypatch, files)
    no_network(monkeypatch)
    (tmp_path / "ml-100k.zip").write_bytes(made_up_zip())
    cached = read_movielens(download.fetch_movielens_100k(tmp_path))
    raw = tmp_path / "raw"
    raw.mkdir()
    for name, text in (("u.data", U_DATA), ("u.user", U_USER), ("u.item", U_ITEM)):
        (raw / name).write_bytes(text.encode("latin-1"))
    direct = read_movielens(raw)
    for frame in ("ratings", "items", "users"):
        assert getattr(cached, frame).equals(getattr(direct, frame)), frame
        assert getattr(cached, frame).schema == getattr(direct, frame).schema
    assert cached.items["year"].to_list() == [1995, 1995, None]
    assert cached.ratings.row(0) == (1, 2, 3.0, 881250949)


def test_recbole_rows_become_the_same_items():
    rows = [
        ["1", "Toy Story", "1995", "Animation Children's Comedy"],
        ["2", "Misérables, Les (1995)", "V", "unknown"],
        ["3", "unkonwn", "unkonwn", "unknown"],
    ]
    lines = ["\t".join(download._item_from_recbole(row)) for row in rows]
    assert lines == download.read_grouplens_zip(made_up_zip())["items.tsv"].decode().splitlines()[1:]


def test_a_damaged_cache_is_fetched_again_and_a_good_one_is_left_alone(tmp_path, monkeypatch):
    files = download.read_grouplens_zip(made_up_zip())
    expect_these(monkeypatch, files)
    calls = []
    monkeypatch.setattr(download, "GROUPLENS_MD5", hashlib.md5(made_up_zip()).hexdigest())
    monkeypatch.setattr(download, "_download", lambda url: calls.append(url) or made_up_zip())
    folder = download.fetch_movielens_100k(tmp_path)
    download.fetch_movielens_100k(tmp_path)
    assert len(calls) == 1
    (folder / "ratings.tsv").write_bytes(files["ratings.tsv"][:-5])
    assert not download.is_movielens_100k_cached(tmp_path)
    download.fetch_movielens_100k(tmp_path)
    assert len(calls) == 2 and (folder / "ratings.tsv").read_bytes() == files["ratings.tsv"]
    assert sorted(path.name for path in folder.iterdir()) == sorted(files)


def test_without_network_or_cache_the_error_says_what_to_do(tmp_path, monkeypatch):
    no_network(monkeypatch)
    with pytest.raises(download.DataUnavailableError) as caught:
        download.fetch_movielens_100k(tmp_path)
    message = str(caught.value)
    assert str(tmp_path) in message and "ml-100k.zip" in message and download.DATA_VARIABLE in message
    assert message.count("no network here") == 2


def test_a_wrong_download_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    no_network(monkeypatch)
    monkeypatch.setattr(download, "_download", lambda url: made_up_zip()[:-30])
    with pytest.raises(download.DataUnavailableError, match="cut short or altered"):
        download.fetch_movielens_100k(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_data_variable_names_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv(download.DATA_VARIABLE, str(tmp_path))
    assert download.data_root() == tmp_path
    assert download.data_root("elsewhere").name == "elsewhere"


def _write_often(path: str) -> None:
    for _ in range(30):
        download.write_atomically(download.Path(path), b"x" * 200_000)


def test_two_writers_never_show_a_part(tmp_path):
    path = tmp_path / "file"
    _write_often(str(path))
    writers = [multiprocessing.get_context("spawn").Process(target=_write_often, args=(str(path),)) for _ in range(2)]
    for writer in writers:
        writer.start()
    sizes = set()
    while any(writer.is_alive() for writer in writers):
        sizes.add(path.stat().st_size)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert sizes <= {200_000} and [p.name for p in tmp_path.iterdir()] == ["file"]


# --- other releases ---


def test_1m_format(tmp_path):
    (tmp_path / "ratings.dat").write_text("1::7::5::978300760\n2::9::3::978302109\n", encoding="latin-1")
    (tmp_path / "users.dat").write_text("1::F::1::10::48067\n2::M::56::16::70072\n", encoding="latin-1")
    (tmp_path / "movies.dat").write_text("7::Café (1995)::Drama\n9::X::Action|War\n", encoding="latin-1")
    data = read_movielens(tmp_path)
    assert data.users["occupation"].to_list() == ["K-12 student", "self-employed"]
    assert data.items.rows() == [(7, "Café", 1995, ["Drama"]), (9, "X", None, ["Action", "War"])]
    assert data.ratings["rating"].dtype == pl.Float32


def write_csv_release(folder) -> None:
    (folder / "ratings.csv").write_text(
        "userId,movieId,rating,timestamp\n1,2,3.5,1112486027\n1,29,4.0,1112484676\n", encoding="utf-8"
    )
    (folder / "movies.csv").write_text(
        'movieId,title,genres\n2,"American President, The (1995)",Comedy|Drama\n29,Élan,(no genres listed)\n',
        encoding="utf-8",
    )


def test_csv_format(tmp_path):
    write_csv_release(tmp_path)
    data = read_movielens(tmp_path)
    assert data.items.rows() == [(2, "American President, The", 1995, ["Comedy", "Drama"]), (29, "Élan", None, [])]
    assert data.users is None and data.ratings.height == 2
    task = movielens_ctr(data, shares=(0.5, 0.25, 0.25))
    assert task.sparse_names == ["user", "item", "decade", "genres", "liked", "disliked"]


@pytest.mark.parametrize("reader", [movielens_20m, movielens_25m])
def test_datapipes(tmp_path, reader):
    write_csv_release(tmp_path)
    first = {"userId": 1, "movieId": 2, "rating": 3.5, "timestamp": 1112486027}
    assert next(iter(reader(str(tmp_path)))) == first
    joined = list(reader(str(tmp_path), include_movies_data=True))
    assert joined[0] == {**first, "title": "American President, The (1995)", "genres": "Comedy|Drama"}
    assert list(joined[0]) == DEFAULT_COLUMN_NAMES
    assert list(reader(str(tmp_path), row_mapper=None))[1] == ["1", "29", "4.0", "1112484676"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [("1,29", "expected 4 columns, got 2"), ("1,x,4.0,7", "column 2 .item_id. should be an integer, got 'x'"),
     ("1,29,,7", "column 3 .rating. should be a number, got ''")],
)  # fmt: skip
def test_malformed_lines_are_named_or_counted(tmp_path, line, problem):
    write_csv_release(tmp_path)
    path = tmp_path / "ratings.csv"
    path.write_text(path.read_text() + line + "\n1,2,1.0,5\n")
    with pytest.raises(MalformedLineError, match=problem) as caught:
        read_movielens(tmp_path)
    assert caught.value.line == 4 and f"{path}, line 4" in str(caught.value)
    data = read_movielens(tmp_path, on_error="skip")
    assert data.num_skipped == {"ratings": 1} and data.ratings.height == 3
    with pytest.raises(ValueError, match="on_error"):
        read_movielens(tmp_path, on_error="ignore")


def test_a_folder_without_a_release_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected an unpacked MovieLens release"):
        read_movielens(tmp_path)


# --- the click-through task ---


def made_up_release(num_users: int = 30, num_items: int = 40, num_ratings: int = 600) -> MovieLens:
    random = np.random.default_rng(0)
    pairs = random.permutation(num_users * num_items)[:num_ratings]
    ratings = pl.DataFrame(
        {
            "user_id": (pairs // num_items + 1).astype(np.int32),
            "item_id": (pairs % num_items + 1).astype(np.int32),
            "rating": random.integers(1, 6, num_ratings).astype(np.float32),
            "timestamp": random.integers(880_000_000, 880_000_400, num_ratings),  # many ties
        }
    )
    genres = [[["Drama"], ["Action", "War"], []][i % 3] for i in range(num_items)]
    items = pl.DataFrame(
        {
            "item_id": range(1, num_items + 1),
            "title": "x",
            "year": [1950 + i for i in range(num_items)],
            "genres": genres,
        }
    ).cast({"item_id": pl.Int32, "year": pl.Int32})
    users = pl.DataFrame(
        {"user_id": range(1, num_users + 1), "age": 20, "gender": "F", "occupation": "x", "zip_code": "12345"}
    ).cast({"user_id": pl.Int32, "age": pl.Int32})
    return MovieLens(ratings, items, users)


def bag(column: JaggedColumn, example: int) -> list[int]:
    return column.values[column.offsets[example] : column.offsets[example + 1]].tolist()


def test_histories_hold_only_the_past_of_the_training_part():
    data = made_up_release()
    task = movielens_ctr(data, history=3)
    ratings = data.ratings.with_row_index("row")
    train = ratings.filter(pl.col("row").is_in(task.rows["train"].tolist()))
    for part in ("train", "valid", "test"):
        table = getattr(task, part)
        for example, row in enumerate(task.rows[part].tolist()):
            user, _, rating, time = data.ratings.row(row)
            past = train.filter((pl.col("user_id") == user) & (pl.col("timestamp") < time)).sort("timestamp", "row")
            assert table.labels[example] == float(rating >= 4)
            for name, chosen in (("liked", pl.col("rating") >= 4), ("disliked", pl.col("rating") < 4)):
                assert bag(table.sparse[name], example) == past.filter(chosen)["item_id"].to_list()[-3:]


def test_no_feature_contains_its_own_or_any_held_out_label():
    data = made_up_release()
    before = movielens_ctr(data, seed=1)
    held_out = torch.cat([before.rows["valid"], before.rows["test"]]).numpy()
    flipped = data.ratings["rating"].to_numpy().copy()
    flipped[held_out] = 6 - flipped[held_out]
    changed = MovieLens(data.ratings.with_columns(pl.Series("rating", flipped)), data.items, data.users)
    after = movielens_ctr(changed, seed=1)
    for part in ("train", "valid", "test"):
        one, other = getattr(before, part), getattr(after, part)
        assert torch.equal(one.dense, other.dense)
        assert all(torch.equal(one.sparse[n].values, other.sparse[n].values) for n in before.sparse_names)


def test_out_of_fold_means_leave_out_the_examples_own_fold():
    random = np.random.default_rng(3)
    owner, fold = random.integers(0, 5, 60), random.integers(0, 10, 60)
    ratings, is_train = random.random(60), random.random(60) < 0.7
    means = _out_of_fold_mean(owner, ratings, is_train, fold, prior=0.5)
    for example in range(60):
        others = (owner == owner[example]) & is_train
        if is_train[example]:
            others &= fold != fold[example]
        assert means[example] == pytest.approx((ratings[others].sum() + 5 * 0.5) / (others.sum() + 5))


def test_batches_cover_every_example_once_and_shuffle_by_epoch():
    task = movielens_ctr(made_up_release(), seed=2)
    assert [len(task.train), len(task.valid), len(task.test)] == [480, 60, 60]
    batches = task.batches("train", 100, seed=5)
    first, second = list(batches), list(batches)
    assert len(batches) == len(first) == 5 and first[-1].labels.numel() == 80
    order = [torch.cat([b.dense_features for b in epoch]) for epoch in (first, second)]
    assert not torch.equal(*order)
    assert torch.equal(order[0].sort(0).values, task.train.dense.sort(0).values)
    batches.set_epoch(0)
    assert torch.equal(torch.cat([b.dense_features for b in batches]), order[0])
    assert len(list(task.batches("train", 100, drop_last=True))) == 4
    tests = list(task.batches("test", 25))
    assert torch.equal(torch.cat([b.labels for b in tests]), task.test.labels)
    kjt = tests[-1].sparse_features
    assert kjt.keys() == task.sparse_names and kjt.stride() == 10
    for example in range(10):
        jagged = kjt["liked"]
        ids = jagged.values()[jagged.offsets()[example] : jagged.offsets()[example + 1]].tolist()
        assert ids == bag(task.test.sparse["liked"], 50 + example)
    for name, rows in task.num_embeddings.items():
        assert all(int(part.sparse[name].values.max()) < rows for part in (task.train, task.valid, task.test))


def test_ranks_share_the_batches():
    task = movielens_ctr(made_up_release())
    alone = list(task.batches("train", 80))
    both = [list(task.batches("train", 80, rank=rank, world_size=2)) for rank in range(2)]
    assert [len(batches) for batches in both] == [3, 3]
    for number, batch in enumerate(alone):
        assert torch.equal(batch.dense_features, both[number % 2][number // 2].dense_features)


def test_wrong_arguments_are_named():
    data = made_up_release()
    with pytest.raises(ValueError, match="nonsense"):
        movielens_ctr(data, features=["user", "nonsense"])
    with pytest.raises(ValueError, match="sum to 1"):
        random_split(10, (0.5, 0.6), 0)
    with pytest.raises(ValueError, match="part="):
        movielens_ctr(data).batches("dev")


# --- the real data ---


@pytest.fixture(scope="module")
def real() -> MovieLens:
    try:
        return load_movielens_100k()
    except download.DataUnavailableError as error:
        pytest.skip(f"MovieLens-100K is not available: {str(error).splitlines()[0]}")


def test_real_data_has_the_published_counts(real):
    assert (real.ratings.height, real.users.height, real.items.height) == (100_000, 943, 1_682)
    assert real.ratings["rating"].value_counts().sort("rating")["count"].to_list() == [6110, 11370, 27145, 34174, 21201]
    assert real.items["year"].null_count() == 1
    assert real.ratings.row(0) == (196, 242, 3.0, 881250949)


def test_biases_reach_their_published_auc_on_the_ctr_split(real):
    task = movielens_ctr(real, seed=0, features=["user", "item"])
    users, items, labels = {}, {}, {}
    for part in ("train", "test"):
        table = getattr(task, part)
        users[part], items[part] = (table.sparse[name].values.numpy() for name in ("user", "item"))
        labels[part] = table.labels.numpy()
    fitted = baselines.fit_biases(users["train"], items["train"], labels["train"], 944, 1683)
    assert baselines.auc(fitted.predict(users["test"], items["test"]), labels["test"]) == pytest.approx(
        0.7755, abs=0.015
    )
