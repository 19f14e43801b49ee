from __future__ import annotations

import builtins

import pytest
import torch

from recsys_edu.retrieval.index import KINDS, IndexFileError, IndexSettings, ItemIndex, has_faiss, recall_against

APPROXIMATE = [kind for kind in KINDS if kind != "exact"]
needs_faiss = pytest.mark.skipif(not has_faiss(), reason="faiss is not installed")


def vectors(num_items: int = 2000, width: int = 16) -> torch.Tensor:
    return torch.randn(num_items, width, generator=torch.Generator().manual_seed(0))


def every(kind: str) -> IndexSettings:
    return IndexSettings(kind=kind, probes=1000, effort=1000)


def test_exact_search_by_hand():
    items, queries = vectors(50), vectors(3)
    ids = torch.arange(50) * 7 + 1
    scores, found = ItemIndex(items, ids).search(queries, k=5)
    for row in range(3):
        dots = [float(queries[row] @ item) for item in items]
        best = sorted(range(50), key=lambda place: -dots[place])[:5]
        assert found[row].tolist() == [place * 7 + 1 for place in best]
        assert scores[row].tolist() == pytest.approx([dots[place] for place in best], abs=1e-4)


@needs_faiss
@pytest.mark.parametrize("kind", APPROXIMATE)
def test_approximate_search_finds_what_exact_search_finds(kind):
    items, queries = vectors(), vectors(20)
    exact = ItemIndex(items).search(queries, 10)
    scores, found = ItemIndex(items, settings=every(kind)).search(queries, 10)
    assert recall_against(exact[1], found) >= (0.9 if kind == "ivf_int8" else 0.99)
    assert torch.allclose(scores[:, 0], exact[0][:, 0], rtol=0.02)


@needs_faiss
def test_eight_bits_need_a_quarter_of_the_memory():
    items = vectors(5000, 64)
    size = {kind: ItemIndex(items, settings=IndexSettings(kind, cells=4)).num_bytes for kind in ("ivf", "ivf_int8")}
    assert size["ivf_int8"] < 0.35 * size["ivf"]


@pytest.mark.parametrize("kind", ["exact", pytest.param("hnsw", marks=needs_faiss)])
def test_excluded_items_never_come_back_and_k_stays_full(kind):
    items, queries = vectors(300), vectors(2)
    index = ItemIndex(items, settings=every(kind))
    _, first = index.search(queries, 20)
    scores, rest = index.search(queries, 20, exclude=[first[0, ::2], torch.tensor([], dtype=torch.int64)])
    assert not torch.isin(rest[0], first[0, ::2]).any()
    assert rest[0, :10].tolist() == first[0, 1::2].tolist()
    assert torch.equal(rest[1], first[1])
    assert (rest >= 0).all() and (scores.diff(dim=1) <= 0).all()
    everything, ids = index.search(queries[:1], 400)
    assert (ids[0, 300:] == -1).all() and torch.isneginf(everything[0, 300:]).all()


@pytest.mark.parametrize("kind", ["exact", *(pytest.param(kind, marks=needs_faiss) for kind in APPROXIMATE)])
def test_saved_and_loaded_index_answers_the_same(kind, tmp_path):
    ids = torch.arange(2000).flip(0) + 5
    index = ItemIndex(vectors(), ids, every(kind))
    path = tmp_path / "films.index"
    index.save(path)
    again = ItemIndex.load(path)
    assert again.settings == index.settings and len(again) == 2000
    for ours, theirs in zip(index.search(vectors(4), 7), again.search(vectors(4), 7)):
        assert torch.equal(ours, theirs)
    assert [entry.name for entry in tmp_path.iterdir()] == ["films.index"]


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "films.index"
    ItemIndex(vectors(20)).save(path)
    data = path.read_bytes()
    for damaged, message in (
        (data[:-3], "cut short"),
        (data[:-3] + b"abc", "checksum"),
        (b"PK" + data, "not an item index"),
        (data[:40], "head cannot be read"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(IndexFileError, match=message):
            ItemIndex.load(path)


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "films.index"
    ItemIndex(vectors(20)).save(path)
    before = path.read_bytes()

    def no_space(*_):
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", no_space)
    with pytest.raises(OSError, match="no space"):
        ItemIndex(vectors(30)).save(path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_without_faiss_exact_works_and_the_rest_says_what_to_install(monkeypatch):
    real_import = builtins.__import__

    def without_faiss(name, *args, **kwargs):
        if name == "faiss":
            raise ImportError("No module named 'faiss'")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_faiss)
    assert not has_faiss()
    assert len(ItemIndex(vectors(5)).search(vectors(1), 2)[1][0]) == 2
    with pytest.raises(ModuleNotFoundError, match="pip install faiss-cpu"):
        ItemIndex(vectors(5), settings=IndexSettings("hnsw"))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="item 7 has NaN"):
        ItemIndex(torch.tensor([[1.0], [float("nan")]]), torch.tensor([3, 7]))
    with pytest.raises(ValueError, match="item id 3 occurs 2 times"):
        ItemIndex(torch.ones(2, 2), torch.tensor([3, 3]))
    with pytest.raises(ValueError, match="kind='tree'"):
        ItemIndex(torch.ones(2, 2), settings=IndexSettings("tree"))
    with pytest.raises(ValueError, match=r"expected \[queries, 2\]"):
        ItemIndex(torch.ones(2, 2)).search(torch.ones(1, 3), 1)
    with pytest.raises(ValueError, match="1 queries but 2 exclusions"):
        ItemIndex(torch.ones(2, 2)).search(torch.ones(1, 2), 1, exclude=[torch.tensor([0])] * 2)


@needs_faiss
def test_more_probes_find_more():
    items, queries = vectors(), vectors(30)
    few = ItemIndex(items, settings=IndexSettings("ivf", cells=50, probes=1))
    many = few.with_settings(IndexSettings("ivf", cells=50, probes=50))
    exact = ItemIndex(items).search(queries, 10)[1]
    low, high = (recall_against(exact, index.search(queries, 10)[1]) for index in (few, many))
    assert low < high and high >= 0.99
    with pytest.raises(ValueError, match="cells cannot change"):
        few.with_settings(IndexSettings("ivf", cells=9))
