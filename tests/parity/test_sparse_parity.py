"""Every operation of the ragged classes against TorchRec's, on random batches."""

from __future__ import annotations

import random

import pytest
import torch

theirs = pytest.importorskip("torchrec.sparse.jagged_tensor")

from recsys_edu.sparse import jagged_tensor as ours  # noqa: E402

CPU = torch.device("cpu")
KINDS = ["fixed", "weighted", "variable", "variable weighted"]


def random_parts(kind: str, seed: int, num_ranks: int = 1) -> dict:
    """Constructor arguments of a random batch with empty rows, an empty key and ids of up to two digits."""
    generator = random.Random(seed)
    keys = [f"f{index}" for index in range(generator.randint(1, 5))]
    stride = generator.randint(1, 5)
    strides = [[generator.randint(0, 3) for _ in range(num_ranks)] for _ in keys]
    counts = [sum(row) for row in strides] if "variable" in kind else [stride] * len(keys)
    rows = [generator.choice([0, 0, 1, 3]) for count in counts for _ in range(count)]
    rows[: counts[0]] = [0] * counts[0]
    parts = {
        "keys": keys,
        "values": torch.tensor([generator.randrange(100) for _ in range(sum(rows))], dtype=torch.int64),
        "lengths": torch.tensor(rows, dtype=generator.choice([torch.int32, torch.int64])),
    }
    if "weighted" in kind:
        parts["weights"] = torch.rand(sum(rows), generator=torch.Generator().manual_seed(seed))
    if "variable" in kind:
        parts["stride_per_key_per_rank"] = strides
    return parts


def both(kind: str, seed: int, num_ranks: int = 1):
    parts = random_parts(kind, seed, num_ranks)
    return ours.KeyedJaggedTensor(**parts), theirs.KeyedJaggedTensor(**parts)


def assert_tensors_equal(mine, other) -> None:
    if mine is None or other is None:
        assert mine is other
        return
    assert mine.shape == other.shape
    assert torch.equal(mine, other.to(mine.dtype))


def assert_jagged_equal(mine, other) -> None:
    assert_tensors_equal(mine.values(), other.values())
    assert_tensors_equal(mine.weights_or_none(), other.weights_or_none())
    assert_tensors_equal(mine.lengths(), other.lengths())
    assert_tensors_equal(mine.offsets(), other.offsets())


def assert_keyed_equal(mine, other) -> None:
    assert mine.keys() == other.keys()
    assert_tensors_equal(mine.values(), other.values())
    assert_tensors_equal(mine.weights_or_none(), other.weights_or_none())
    assert_tensors_equal(mine.lengths(), other.lengths())
    assert mine.length_per_key() == other.length_per_key()
    assert mine.offset_per_key() == other.offset_per_key()
    assert mine.stride_per_key() == other.stride_per_key()
    assert mine.stride_per_key_per_rank() == other.stride_per_key_per_rank()
    assert mine.variable_stride_per_key() == other.variable_stride_per_key()
    assert mine.lengths_offset_per_key() == other.lengths_offset_per_key()
    assert mine.index_per_key() == other.index_per_key()


every_batch = pytest.mark.parametrize(("kind", "seed"), [(kind, seed) for kind in KINDS for seed in range(6)])


@every_batch
def test_bookkeeping_and_printing(kind, seed):
    mine, other = both(kind, seed)
    assert_keyed_equal(mine, other)
    assert mine.stride() == other.stride()
    assert str(mine) == str(other)
    assert_tensors_equal(mine.offsets(), other.offsets())
    if "variable" not in kind:  # TorchRec keeps the strides as a tensor and counts it; here they are a list
        assert mine.size_in_bytes() == other.size_in_bytes()
    assert str(mine[mine.keys()[-1]]) == str(other[other.keys()[-1]])


@every_batch
def test_permute(kind, seed):
    mine, other = both(kind, seed)
    generator = random.Random(seed)
    indices = [generator.randrange(len(mine.keys())) for _ in range(4)]
    assert_keyed_equal(mine.permute(indices), other.permute(indices))
    order = torch.tensor(indices, dtype=torch.int32)
    assert_keyed_equal(mine.permute(indices, order), other.permute(indices, order))


@every_batch
def test_split_and_concat(kind, seed):
    mine, other = both(kind, seed)
    cut = random.Random(seed).randint(0, len(mine.keys()))
    segments = [cut, len(mine.keys()) - cut]
    my_parts, other_parts = mine.split(segments), other.split(segments)
    for my_part, other_part in zip(my_parts, other_parts):
        assert_keyed_equal(my_part, other_part)
    if 0 < cut < len(mine.keys()):
        assert_keyed_equal(
            ours.KeyedJaggedTensor.concat(my_parts[::-1]), theirs.KeyedJaggedTensor.concat(other_parts[::-1])
        )


@every_batch
def test_to_dict_and_back(kind, seed):
    mine, other = both(kind, seed)
    my_dict, other_dict = mine.to_dict(), other.to_dict()
    assert list(my_dict) == list(other_dict)
    for key in my_dict:
        assert_jagged_equal(my_dict[key], other_dict[key])
        assert_jagged_equal(mine[key], other[key])
    assert_keyed_equal(ours.KeyedJaggedTensor.from_jt_dict(my_dict), theirs.KeyedJaggedTensor.from_jt_dict(other_dict))


@every_batch
def test_rows_and_padding(kind, seed):
    mine, other = both(kind, seed)
    for key in mine.keys():
        my_rows, other_rows = mine[key], other[key]
        assert [row.tolist() for row in my_rows.to_dense()] == [row.tolist() for row in other_rows.to_dense()]
        for width in (None, 1, 4):
            if width is None and my_rows.lengths().numel() == 0:
                continue  # TorchRec has no longest row to take there
            assert_tensors_equal(my_rows.to_padded_dense(width, 7.0), other_rows.to_padded_dense(width, 7.0))
            if "weighted" in kind:
                assert_tensors_equal(my_rows.to_padded_dense_weights(width), other_rows.to_padded_dense_weights(width))


@every_batch
def test_what_travels_between_ranks(kind, seed):
    mine, other = both(kind, seed)
    assert mine.dist_labels() == other.dist_labels()
    cut = random.Random(seed).randint(0, len(mine.keys()))
    splits = [cut, len(mine.keys()) - cut]
    assert mine.dist_splits(splits) == other.dist_splits(splits)
    for my_tensor, other_tensor in zip(mine.dist_tensors(), other.dist_tensors()):
        assert_tensors_equal(my_tensor, other_tensor)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_ranks", "stagger"), [(1, 1), (2, 1), (4, 2)])
def test_what_arrives_from_ranks(kind, num_ranks, stagger):
    keys = ["a", "b", "c"]
    generator = random.Random(num_ranks)
    same = generator.randint(1, 3)
    sent = []
    for rank in range(num_ranks):
        counts = [generator.randint(0, 3) for _ in keys] if "variable" in kind else [same] * len(keys)
        rows = [generator.choice([0, 1, 2]) for count in counts for _ in range(count)]
        parts = [torch.tensor(rows, dtype=torch.int64), torch.arange(sum(rows)) + 100 * rank]
        if "variable" in kind:
            parts.append(torch.tensor(counts))
        if "weighted" in kind:
            parts.append(torch.rand(sum(rows)))
        sent.append(parts)
    tensors = [torch.cat(parts) for parts in zip(*sent)]
    ranks = [x + num_ranks // stagger * y for x in range(num_ranks // stagger) for y in range(stagger)]
    recat = torch.tensor([rank * len(keys) + key for key in range(len(keys)) for rank in ranks], dtype=torch.int32)
    arguments = (
        keys,
        tensors,
        "variable" in kind,
        num_ranks,
        recat,
        None if "variable" in kind else [same] * num_ranks,
    )
    mine = ours.KeyedJaggedTensor.dist_init(*arguments, stagger=stagger)
    other = theirs.KeyedJaggedTensor.dist_init(*arguments, stagger=stagger)
    assert_keyed_equal(mine, other)


@pytest.mark.parametrize("weighted", [False, True])
def test_ranks_with_unequal_batches(weighted):
    tensors = [torch.tensor([1, 0, 1, 2, 2, 0]), torch.arange(6)]
    if weighted:
        tensors.append(torch.rand(6))
    recat = torch.tensor([0, 1, 4, 2, 3, 5], dtype=torch.int32)  # ranks of 2 and 1 rows, keys a and b
    arguments = (["a", "b"], tensors, False, 2, recat, [2, 1])
    assert_keyed_equal(ours.KeyedJaggedTensor.dist_init(*arguments), theirs.KeyedJaggedTensor.dist_init(*arguments))


@pytest.mark.parametrize("seed", range(5))
def test_regroup(seed):
    generator = torch.Generator().manual_seed(seed)
    picker = random.Random(seed)
    keyed = []
    for index in range(picker.randint(1, 3)):
        keys = [f"t{index}k{position}" for position in range(picker.randint(1, 4))]
        widths = [picker.choice([1, 4, 8]) for _ in keys]
        keyed.append((keys, widths, torch.randn(3, sum(widths), generator=generator)))
    names = [key for keys, _, _ in keyed for key in keys]
    groups = [[picker.choice(names) for _ in range(picker.randint(1, 3))] for _ in range(2)]
    results, gradients = [], []
    for module in (ours, theirs):
        leaves = [values.clone().requires_grad_() for _, _, values in keyed]
        tensors = [module.KeyedTensor(keys, widths, leaf) for (keys, widths, _), leaf in zip(keyed, leaves)]
        result = module.KeyedTensor.regroup(tensors, groups)
        sum((tensor * (1 + index)).pow(2).sum() for index, tensor in enumerate(result)).backward()
        results.append(result)
        gradients.append([leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for leaf in leaves])
        assert str(tensors[0]) == str(theirs.KeyedTensor(*keyed[0]))
        as_dict = module.KeyedTensor.regroup_as_dict(tensors, groups, ["x", "y"])
        assert all(torch.equal(mine, other) for mine, other in zip(as_dict.values(), result))
    for mine, other in zip(results[0], results[1]):
        assert_tensors_equal(mine, other)
    for mine, other in zip(gradients[0], gradients[1]):
        torch.testing.assert_close(mine, other)


def test_jagged_tensor_strings_and_constructors():
    values, lengths = torch.arange(6.0).view(2, 3), torch.tensor([1, 3])
    for make in (
        lambda module: module.JaggedTensor.from_dense_lengths(values, lengths),
        lambda module: module.JaggedTensor.from_dense([values[0], values[1, :1]], [values[0], values[1, :1]]),
        lambda module: module.JaggedTensor(values, lengths=torch.tensor([2, 0])),
        lambda module: module.JaggedTensor.empty(),
    ):
        assert str(make(ours)) == str(make(theirs))
        assert_jagged_equal(make(ours), make(theirs))
    assert str(ours.KeyedJaggedTensor.empty(True)) == str(theirs.KeyedJaggedTensor.empty(True))


def test_public_names_and_arguments():
    import inspect

    for name in ("JaggedTensor", "KeyedJaggedTensor", "KeyedTensor"):
        mine, other = getattr(ours, name), getattr(theirs, name)
        for member, attribute in inspect.getmembers(other):
            if member.startswith("_") or not callable(attribute):
                continue
            assert hasattr(mine, member), f"{name}.{member}"
            my_names = list(inspect.signature(getattr(mine, member)).parameters)
            other_names = list(inspect.signature(attribute).parameters)
            assert my_names[: len(other_names)] == other_names, f"{name}.{member}"
