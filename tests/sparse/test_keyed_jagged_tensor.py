"""KeyedJaggedTensor: by hand, and random batches against plain Python lists."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jagged_strategies import kjt_of, rows_of, rows_per_key

from recsys_edu.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, jt_is_equal, kjt_is_equal
from recsys_edu.sparse.jagged_tensor_validator import validate_keyed_jagged_tensor
from recsys_edu.sparse.tensor_dict import maybe_td_to_kjt

CPU = torch.device("cpu")
quick = settings(max_examples=60, deadline=None)


def make(weighted: bool = False) -> KeyedJaggedTensor:
    values = torch.tensor([1.0, 2.0, 3.0])
    return KeyedJaggedTensor.from_lengths_sync(
        ["a", "b"], values, torch.tensor([1, 0, 2, 0]), values * 10 if weighted else None
    )


def make_variable() -> KeyedJaggedTensor:
    """Key a has one row from each of two ranks, key b two from each; a full batch of three examples."""
    return KeyedJaggedTensor(
        ["a", "b"],
        torch.arange(6),
        lengths=torch.tensor([1, 0, 2, 1, 1, 1]),
        stride_per_key_per_rank=[[1, 1], [2, 2]],
        inverse_indices=(["a", "b"], torch.tensor([[0, 0, 1], [3, 2, 0]])),
    )


def test_bookkeeping_by_hand():
    kjt = make()
    assert kjt.stride() == 2
    assert kjt.stride_per_key() == [2, 2]
    assert kjt.stride_per_key_per_rank() == []
    assert kjt.length_per_key() == [1, 2]
    assert kjt.offset_per_key() == [0, 1, 3]
    assert kjt.lengths_offset_per_key() == [0, 2, 4]
    assert kjt.index_per_key() == {"a": 0, "b": 1}
    assert kjt.offsets().tolist() == [0, 1, 1, 3, 3]
    assert kjt.unsync() is kjt
    assert kjt.length_per_key_or_none() is None
    assert kjt.sync().length_per_key_or_none() == [1, 2]


def test_variable_batch_by_hand():
    kjt = make_variable()
    assert kjt.variable_stride_per_key()
    assert kjt.stride() == 3  # the full batch
    assert kjt.stride_per_key() == [2, 4]
    assert kjt.lengths_offset_per_key() == [0, 2, 6]
    assert kjt.length_per_key() == [1, 5]
    assert rows_of(kjt) == [("a", [[0], []]), ("b", [[1, 2], [3], [4], [5]])]
    permuted = kjt.permute([1, 0, 1])
    assert permuted.stride_per_key_per_rank() == [[2, 2], [1, 1], [2, 2]]
    assert permuted.inverse_indices()[0] == ["b", "a", "b"]
    assert permuted.inverse_indices()[1].tolist() == [[3, 2, 0], [0, 0, 1], [3, 2, 0]]
    assert KeyedJaggedTensor(["a", "b"], torch.arange(3), lengths=torch.ones(3, dtype=torch.int32),
                             stride_per_key=[1, 2]).stride_per_key_per_rank() == [[1], [2]]  # fmt: skip


def test_strides_given_as_a_tensor():
    kjt = KeyedJaggedTensor(
        ["a", "b"], torch.arange(6), lengths=torch.tensor([1, 0, 2, 1, 1, 1]),
        stride_per_key_per_rank=torch.tensor([[1, 1], [2, 2]], dtype=torch.int32),
    )  # fmt: skip
    assert kjt.stride_per_key_per_rank() == [[1, 1], [2, 2]]
    assert kjt.stride() == 4


def test_exact_string():
    assert str(make()) == 'KeyedJaggedTensor({\n    "a": [[1.0], []],\n    "b": [[2.0, 3.0], []]\n})\n'
    assert str(make(weighted=True)) == (
        'KeyedJaggedTensor({\n    "a": {\n        "values": [[1.0], []],\n        "weights": [[10.0], []]\n    },\n'
        '    "b": {\n        "values": [[2.0, 3.0], []],\n        "weights": [[20.0, 30.0], []]\n    }\n})\n'
    )
    assert str(KeyedJaggedTensor.empty()) == "KeyedJaggedTensor()\n"
    assert repr(make()) == "KeyedJaggedTensor(keys=['a', 'b'], stride=2, values=torch.float32[3])"
    assert "stride=variable" in repr(make_variable())


@pytest.mark.parametrize("error", [TypeError, ValueError])
def test_lists_are_no_tensors(error):
    with pytest.raises(error, match=r"KeyedJaggedTensor: values must be a tensor, got list. Use torch.tensor"):
        KeyedJaggedTensor(["a"], [1, 2], lengths=torch.tensor([2]))
    with pytest.raises(error, match=r"lengths must be a tensor, got list"):
        KeyedJaggedTensor(["a"], torch.arange(2), lengths=[2])
    with pytest.raises(error, match=r"JaggedTensor: values must be a tensor, got ndarray"):
        JaggedTensor(torch.arange(2).numpy(), offsets=torch.tensor([0, 2]))


@pytest.mark.parametrize("error", [AssertionError, ValueError])
def test_what_does_not_fit_is_refused(error):
    values = torch.arange(3)
    with pytest.raises(error, match=r"3 lengths do not divide among 2 keys \['a', 'b'\].*stride_per_key_per_rank"):
        KeyedJaggedTensor(["a", "b"], values, lengths=torch.tensor([1, 1, 1]))
    with pytest.raises(error, match=r"2 keys .* stride \(batch size\) 3 need 6 lengths, got 4"):
        KeyedJaggedTensor(["a", "b"], values, lengths=torch.tensor([1, 1, 1, 0]), stride=3)
    with pytest.raises(error, match=r"batch sizes \[1, 3\] need 4 lengths, got 3"):
        KeyedJaggedTensor(["a", "b"], values, lengths=torch.tensor([1, 1, 1]), stride_per_key_per_rank=[[1], [3]])
    with pytest.raises(error, match="1 rows for 2 keys"):
        KeyedJaggedTensor(["a", "b"], values, lengths=torch.tensor([1, 1, 1]), stride_per_key_per_rank=[[3]])
    with pytest.raises(error, match="needs lengths or offsets"):
        KeyedJaggedTensor(["a"], values)
    with pytest.raises(error, match="integer type"):
        KeyedJaggedTensor(["a"], values, offsets=torch.tensor([0.0, 3.0]))
    with pytest.raises(error, match="2 weights for 3 values"):
        KeyedJaggedTensor(["a"], values, torch.ones(2), torch.tensor([3]))
    with pytest.raises(error, match="3 lengths but no keys"):
        KeyedJaggedTensor([], values, lengths=torch.tensor([1, 1, 1]))
    with pytest.raises(error, match=r"keys must be a list of feature names, got 'ab'. Use \['ab'\]"):
        KeyedJaggedTensor("ab", values, lengths=torch.tensor([1, 2]))
    with pytest.raises(error, match="no weights"):
        make().weights()
    with pytest.raises(error, match="no inverse indices"):
        make().inverse_indices()


def test_asking_for_what_is_not_there():
    with pytest.raises(KeyError, match=r"No key 'z'.*\['a', 'b'\]"):
        make()["z"]
    with pytest.raises(IndexError, match="key number 2, but there are 2 keys"):
        make().permute([0, 2])
    with pytest.raises(IndexError, match="asks for 3 keys, but there are 2"):
        make().split([1, 2])


def test_concat_refuses_parts_that_do_not_fit():
    other = KeyedJaggedTensor(["c"], torch.arange(3), lengths=torch.tensor([1, 1, 1]))
    with pytest.raises(ValueError, match="empty list"):
        KeyedJaggedTensor.concat([])
    with pytest.raises(ValueError, match=r"without weights: keys \[\['a', 'b'\]\]"):
        KeyedJaggedTensor.concat([make(), make(weighted=True)])
    with pytest.raises(AssertionError, match=r"one stride.*\(\['c'\], 3\)"):
        KeyedJaggedTensor.concat([make(), other])
    with pytest.raises(AssertionError, match="fixed and of variable stride"):
        KeyedJaggedTensor.concat([make(), make_variable()])


@given(rows_per_key(), st.booleans(), st.booleans())
@quick
def test_a_batch_gives_back_its_rows(rows, weighted, from_offsets):
    kjt = kjt_of(rows, weighted, from_offsets)
    assert rows_of(kjt) == list(rows.items())
    assert validate_keyed_jagged_tensor(kjt)
    assert kjt.length_per_key() == [sum(map(len, key_rows)) for key_rows in rows.values()]
    for key, jagged in kjt.to_dict().items():
        assert [row.tolist() for row in jagged.to_dense()] == rows[key]
        assert jagged.offsets_or_none() is not None
        assert jagged.offsets().tolist()[0] == 0
        assert jt_is_equal(jagged, kjt[key])
    assert all(jagged.offsets_or_none() is None for jagged in kjt_of(rows).to_dict(compute_offsets=False).values())


@given(rows_per_key(), st.booleans(), st.booleans(), st.data())
@quick
def test_permute_is_indexing_keys(rows, weighted, synced, data):
    kjt = kjt_of(rows, weighted)
    if synced:
        kjt.sync()
    indices = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=6) if rows else st.just([]))
    permuted = kjt.permute(indices)
    assert rows_of(permuted) == [list(rows.items())[index] for index in indices]
    assert permuted.length_per_key() == [kjt.length_per_key()[index] for index in indices]
    if weighted:
        expected = [weight for index in indices for weight in kjt[kjt.keys()[index]].weights().tolist()]
        assert permuted.weights().tolist() == expected


@given(rows_per_key(), st.booleans(), st.data())
@quick
def test_split_then_concat_is_the_identity(rows, weighted, data):
    kjt = kjt_of(rows, weighted)
    cut = data.draw(st.integers(0, len(rows)))
    parts = kjt.split([cut, 0, len(rows) - cut])
    assert rows_of(parts[0]) == list(rows.items())[:cut]
    assert parts[1].keys() == []
    assert parts[2].values().numel() == 0 or parts[2].values()._is_view()
    joined = KeyedJaggedTensor.concat(parts)
    assert kjt_is_equal(joined, kjt)


@given(rows_per_key(), st.booleans())
@quick
def test_jt_dict_and_trees_and_devices_keep_the_batch(rows, weighted):
    kjt = kjt_of(rows, weighted)
    if rows:
        assert rows_of(KeyedJaggedTensor.from_jt_dict(kjt.to_dict())) == list(rows.items())
    assert kjt_is_equal(kjt.to(CPU), kjt)
    copied = KeyedJaggedTensor.empty_like(kjt)
    assert copied.stride_per_key() == kjt.stride_per_key()
    assert kjt_is_equal(copied.copy_(kjt), kjt)
    assert kjt_is_equal(kjt.flatten_lengths(), kjt)


def test_lengths_may_have_two_dimensions():
    kjt = KeyedJaggedTensor(["a", "b"], torch.arange(3), lengths=torch.tensor([[1, 0], [2, 0]]))
    assert kjt.stride() == 2
    assert kjt["b"].lengths().tolist() == [2, 0]
    assert kjt.flatten_lengths().lengths().tolist() == [1, 0, 2, 0]
    assert rows_of(kjt.permute([1]))[0] == ("b", [[1, 2], []])


def test_to_casts_weights_only():
    moved = make(weighted=True).to(CPU, dtype=torch.float16)
    assert moved.weights().dtype == torch.float16
    assert moved.values().dtype == torch.float32
    assert moved.length_per_key_or_none() == [1, 2]
    assert make_variable().to(torch.device("meta")).inverse_indices()[1].is_meta


def test_copy_changes_all_or_nothing():
    target = make()
    with pytest.raises(ValueError, match=r"equal keys: here \['a', 'b'\], in the source \['x', 'b'\]"):
        target.copy_(KeyedJaggedTensor(["x", "b"], torch.ones(3), lengths=torch.tensor([1, 0, 2, 0])))
    with pytest.raises(ValueError, match="values here is"):
        target.copy_(KeyedJaggedTensor(["a", "b"], torch.ones(2), lengths=torch.tensor([1, 0, 1, 0])))
    assert kjt_is_equal(target, make())
    target.to_dict()
    target.copy_(KeyedJaggedTensor(["a", "b"], torch.ones(3), lengths=torch.tensor([0, 0, 0, 3])))
    assert target.length_per_key() == [0, 3]
    assert target["b"].lengths().tolist() == [0, 3]


def test_clear_storage_frees_and_counts():
    kjt = make(weighted=True)
    kjt.offsets()
    assert kjt.clear_storage() == 3 * 4 + 3 * 4 + 4 * 8 + 5 * 8
    assert kjt.values().untyped_storage().nbytes() == 0


def test_meta_tensors_are_never_read():
    kjt = KeyedJaggedTensor.from_lengths_sync(
        ["a", "b"], torch.empty(3, device="meta"), torch.empty(4, dtype=torch.int64, device="meta")
    )
    assert kjt.stride() == 2
    assert kjt.length_per_key_or_none() is None
    assert str(kjt) == repr(kjt)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs a CUDA driver")
def test_pin_memory():
    pinned = make(weighted=True).pin_memory()
    assert pinned.values().is_pinned() and pinned.weights().is_pinned()
    assert kjt_is_equal(pinned, make(weighted=True))


def test_equality():
    assert kjt_is_equal(make(), make())
    assert not kjt_is_equal(make(), make(weighted=True))
    assert not kjt_is_equal(make(), KeyedJaggedTensor(["a", "c"], make().values(), lengths=make().lengths()))
    assert not kjt_is_equal(make(), make_variable())
    assert not kjt_is_equal(make(), None)


# ---- between ranks ----------------------------------------------------------------------------------------------


def test_what_travels():
    kjt = make(weighted=True)
    assert kjt.dist_labels() == ["lengths", "values", "weights"]
    assert kjt.dist_splits([1, 1]) == [[2, 2], [1, 2], [1, 2]]
    assert [tensor.numel() for tensor in kjt.dist_tensors()] == [4, 3, 3]
    assert make_variable().dist_labels() == ["lengths", "values", "strides"]
    assert make_variable().dist_splits([0, 2]) == [[0, 6], [0, 6], [0, 2]]
    assert make_variable().dist_tensors()[2].tolist() == [2, 4]


def test_batches_of_two_ranks_are_joined_key_by_key():
    from_ranks = [
        kjt_of({"a": [[1], []], "b": [[2], [3, 4]]}),
        kjt_of({"a": [[5, 6]], "b": [[]]}),
    ]
    tensors = [torch.cat(parts) for parts in zip(*(kjt.dist_tensors() for kjt in from_ranks))]
    recat = torch.tensor([0, 2, 1, 3], dtype=torch.int32)  # (rank, key) blocks to (key, rank)
    joined = KeyedJaggedTensor.dist_init(["a", "b"], tensors, False, 2, recat, [2, 1])
    assert rows_of(joined) == [("a", [[1], [], [5, 6]]), ("b", [[2], [3, 4], []])]
    assert joined.stride() == 3
    by_length = torch.tensor([0, 1, 4, 2, 3, 5], dtype=torch.int32)  # the same, one entry per length
    again = KeyedJaggedTensor.dist_init(["a", "b"], tensors, False, 2, by_length, [2, 1])
    assert kjt_is_equal(joined, again)


# ---- on request -------------------------------------------------------------------------------------------------


def broken(**changes) -> KeyedJaggedTensor:
    """A batch whose parts were exchanged behind the constructor's back."""
    kjt = KeyedJaggedTensor(["a", "b"], torch.arange(3), lengths=torch.tensor([1, 0, 2, 0]))
    for name, value in changes.items():
        setattr(kjt, f"_{name}", value)
    return kjt


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keys": ["a", "a"]}, "unique, but 'a'"),
        ({"lengths": None}, "both missing"),
        ({"lengths": torch.tensor([1, 0, -1, 3])}, r"key 'b' \(row 0\) has a row of length -1"),
        ({"lengths": torch.tensor([1, 0, 1, 0])}, "sum to 2, but there are 3 values"),
        ({"lengths": torch.tensor([1, 0, 2])}, "multiple of the number of keys"),
        ({"offsets": torch.tensor([1, 1, 1, 3, 3])}, "start with 0, got 1"),
        ({"offsets": torch.tensor([0, 1, 0, 3, 3])}, r"key 'a' \(row 1\) has a row from 1 to 0"),
        ({"offsets": torch.tensor([0, 1, 1, 3, 4])}, "end at 4, but there are 3"),
        ({"offsets": torch.tensor([0, 0, 1, 3, 3])}, "disagree"),
        ({"offsets": torch.tensor([0, 1, 1])}, "must have one more"),
        ({"weights": torch.ones(2)}, "2 weights for 3 values"),
        ({"keys": []}, "no keys"),
    ],
)
def test_full_validation_names_the_failed_check(changes, message):
    with pytest.raises(ValueError, match=message):
        validate_keyed_jagged_tensor(broken(**changes))


def test_validation_against_tables(caplog):
    table = SimpleNamespace(name="t", feature_names=["a", "b"], num_embeddings=3)
    assert validate_keyed_jagged_tensor(broken(), [table])
    small = SimpleNamespace(name="t", feature_names=["b", "z"], num_embeddings=2)
    assert not validate_keyed_jagged_tensor(broken(), [small])
    assert "Feature 'b' has id 2, but table 't' has 2 rows" in caplog.text
    assert "'z', which is not among the keys" in caplog.text


def test_other_inputs_pass_through():
    kjt = make()
    assert maybe_td_to_kjt(kjt) is kjt


def test_tensordict_becomes_a_batch():
    tensordict = pytest.importorskip("tensordict")
    nested = torch.nested.nested_tensor_from_jagged(torch.arange(3), torch.tensor([0, 1, 3]))
    features = tensordict.TensorDict({"x": nested, "y": nested}, batch_size=[2])
    kjt = maybe_td_to_kjt(features, ["y", "x"])
    assert rows_of(kjt) == [("y", [[0], [1, 2]]), ("x", [[0], [1, 2]])]
    with pytest.raises(KeyError, match="no feature 'q'"):
        maybe_td_to_kjt(features, ["q"])


def test_from_offsets_sync_and_from_lengths_sync_agree():
    offsets = torch.tensor([0, 1, 1, 3, 3], dtype=torch.int32)
    kjt = KeyedJaggedTensor.from_offsets_sync(["a", "b"], torch.tensor([1.0, 2.0, 3.0]), offsets)
    assert kjt.length_per_key_or_none() == [1, 2]
    assert kjt_is_equal(kjt, make())


def test_a_jagged_dict_of_unequal_batches_is_variable():
    parts = {key: JaggedTensor(torch.arange(n), lengths=torch.tensor([1] * n)) for key, n in (("a", 2), ("b", 1))}
    kjt = KeyedJaggedTensor.from_jt_dict(parts)
    assert kjt.stride_per_key_per_rank() == [[2], [1]]
    parts["b"] = JaggedTensor(torch.arange(1), torch.ones(1), torch.tensor([1]))
    with pytest.raises(ValueError, match=r"without: \['a'\]"):
        KeyedJaggedTensor.from_jt_dict(parts)
