"""JaggedTensor and KeyedTensor by hand."""

from __future__ import annotations

import pytest
import torch

from recsys_edu.sparse.jagged_tensor import JaggedInputError, JaggedTensor, KeyedTensor, jt_is_equal, regroup_kts
from recsys_edu.sparse.jagged_tensor import permute_multi_embedding as permute_multi


def make(weighted: bool = False) -> JaggedTensor:
    values = torch.tensor([1.0, 2.0, 3.0])
    return JaggedTensor(values, values * 10 if weighted else None, torch.tensor([1, 0, 2]))


def test_lengths_and_offsets_are_two_views_of_one_structure():
    assert make().offsets().tolist() == [0, 1, 1, 3]
    from_offsets = JaggedTensor(torch.arange(3), offsets=torch.tensor([0, 1, 1, 3]))
    assert from_offsets.lengths_or_none() is None
    assert from_offsets.lengths().tolist() == [1, 0, 2]
    assert from_offsets.lengths_or_none() is not None


def test_to_dense_is_views_row_by_row():
    jagged = make(weighted=True)
    rows = jagged.to_dense()
    assert [row.tolist() for row in rows] == [[1.0], [], [2.0, 3.0]]
    assert [row.tolist() for row in jagged.to_dense_weights()] == [[10.0], [], [20.0, 30.0]]
    rows[0][0] = 7.0
    assert jagged.values()[0] == 7.0
    assert make().to_dense_weights() is None


def test_from_dense_and_from_dense_lengths():
    rows = [torch.tensor([1, 2]), torch.tensor([], dtype=torch.int64), torch.tensor([3])]
    jagged = JaggedTensor.from_dense(rows, [row.float() for row in rows])
    assert jagged.lengths().tolist() == [2, 0, 1]
    assert jagged.weights().tolist() == [1.0, 2.0, 3.0]
    padded = JaggedTensor.from_dense_lengths(torch.tensor([[1, 2, 9], [3, 9, 9]]), torch.tensor([2, 1]))
    assert padded.values().tolist() == [1, 2, 3]
    assert JaggedTensor.from_dense([]).to_dense() == []


def test_padding():
    assert make().to_padded_dense().tolist() == [[1, 0], [0, 0], [2, 3]]
    assert make().to_padded_dense(1, -1.0).tolist() == [[1], [-1], [2]]
    assert make(weighted=True).to_padded_dense_weights(3).tolist() == [[10, 0, 0], [0, 0, 0], [20, 30, 0]]
    assert make().to_padded_dense_weights() is None
    assert JaggedTensor.empty().to_padded_dense().shape == (0, 0)
    assert JaggedTensor(torch.empty(0), lengths=torch.tensor([0, 0])).to_padded_dense().shape == (2, 0)


def test_exact_string():
    assert str(make()) == "JaggedTensor({\n    [[1.0], [], [2.0, 3.0]]\n})\n"
    assert str(make(weighted=True)) == (
        'JaggedTensor({\n    "values": [[1.0], [], [2.0, 3.0]],\n    "weights": [[10.0], [], [20.0, 30.0]]\n})\n'
    )
    assert str(JaggedTensor.empty()) == "JaggedTensor({\n    []\n})\n"
    two_dims = JaggedTensor(torch.ones(1, 2), lengths=torch.tensor([1, 0]))
    assert str(two_dims) == "JaggedTensor({\n    [[[1.0, 1.0]], []]\n})\n"
    with pytest.raises(ValueError, match="1-D and 2-D"):
        str(JaggedTensor(torch.ones(1, 2, 2), lengths=torch.tensor([1])))
    assert repr(make()) == "JaggedTensor(rows=3, values=torch.float32[3])"


@pytest.mark.parametrize("error", [AssertionError, ValueError])
def test_what_does_not_fit_is_refused(error):
    with pytest.raises(error, match="needs lengths or offsets"):
        JaggedTensor(torch.arange(3))
    with pytest.raises(error, match=r"lengths must be of integer type.*torch\.float32"):
        JaggedTensor(torch.arange(3), lengths=torch.tensor([3.0]))
    with pytest.raises(error, match="2 weights for 3 values"):
        JaggedTensor(torch.arange(3), torch.ones(2), torch.tensor([3]))
    with pytest.raises(error, match="one entry more"):
        JaggedTensor(torch.arange(3), lengths=torch.tensor([3]), offsets=torch.tensor([3]))
    with pytest.raises(error, match="no weights"):
        make().weights()
    JaggedTensor(torch.empty(0), lengths=torch.empty(0))  # no elements: the dtype does not matter


def test_equality_never_raises():
    assert jt_is_equal(make(), JaggedTensor(torch.tensor([1.0, 2.0, 3.0]), offsets=torch.tensor([0, 1, 1, 3])))
    assert not jt_is_equal(make(), make(weighted=True))
    assert not jt_is_equal(make(), JaggedTensor(torch.ones(2), lengths=torch.tensor([2])))
    assert not jt_is_equal(make(), "something else")


def test_copy_changes_all_or_nothing():
    target = JaggedTensor.empty_like(make(weighted=True))
    assert target.copy_(make(weighted=True)) is target
    assert jt_is_equal(target, make(weighted=True))
    other = JaggedTensor(torch.zeros(3), torch.zeros(3), torch.tensor([1, 2]))
    with pytest.raises(JaggedInputError, match=r"lengths here is \(3,\), in the source \(2,\)"):
        target.copy_(other)
    assert jt_is_equal(target, make(weighted=True))


def test_to_and_sizes():
    assert jt_is_equal(make(True).to(torch.device("cpu"), non_blocking=True), make(True))
    assert make().to(torch.device("meta")).device().type == "meta"
    assert str(make().to(torch.device("meta"))).startswith("JaggedTensor(rows=3")
    assert make().size_in_bytes() == 3 * 4 + 3 * 8


class RecordingTensor(torch.Tensor):
    streams: list = []  # noqa: RUF012

    def record_stream(self, stream):
        RecordingTensor.streams.append(stream)


def test_record_stream_reaches_every_tensor():
    RecordingTensor.streams.clear()
    parts = [tensor.as_subclass(RecordingTensor) for tensor in (torch.ones(1), torch.ones(1), torch.tensor([1]))]
    JaggedTensor(*parts).record_stream("a stream")
    assert RecordingTensor.streams == ["a stream"] * 3


# ---- KeyedTensor ------------------------------------------------------------------------------------------------


def embeddings() -> KeyedTensor:
    return KeyedTensor(["a", "b"], [1, 2], torch.arange(6.0).view(2, 3))


def test_keyed_tensor_slices_are_views():
    assert embeddings()["b"].tolist() == [[1, 2], [4, 5]]
    assert {key: tensor.tolist() for key, tensor in embeddings().to_dict().items()} == {
        "a": [[0], [3]],
        "b": [[1, 2], [4, 5]],
    }
    assert embeddings().offset_per_key() == [0, 1, 3]
    keyed = embeddings()
    keyed["a"][0, 0] = 9
    assert keyed.values()[0, 0] == 9
    assert KeyedTensor(["a", "b"], [1, 2], torch.arange(6).view(3, 2), key_dim=0)["b"].tolist() == [[2, 3], [4, 5]]


def test_keyed_tensor_string():
    assert str(embeddings()) == ('KeyedTensor({\n    "a": [[0.0], [3.0]],\n    "b": [[1.0, 2.0], [4.0, 5.0]]\n})\n')
    assert str(KeyedTensor([], [], torch.empty(0))) == "KeyedTensor()\n"
    assert repr(embeddings()) == "KeyedTensor({'a': 1, 'b': 2}, values=torch.float32[2, 3])"


def test_keyed_tensor_refuses_widths_that_do_not_add_up():
    with pytest.raises(ValueError, match=r"'a': 1, 'b': 1.*add up to 2.*has 3"):
        KeyedTensor(["a", "b"], [1, 1], torch.ones(2, 3))
    with pytest.raises(AssertionError, match=r"2 keys .* but 1 widths"):
        KeyedTensor(["a", "b"], [3], torch.ones(2, 3))
    with pytest.raises(KeyError, match=r"No key 'c'.*\['a', 'b'\]"):
        embeddings()["c"]


@pytest.mark.parametrize("operation", [KeyedTensor.regroup, regroup_kts, permute_multi])
def test_regroup(operation):
    values = torch.arange(6.0).view(2, 3).requires_grad_()
    left = KeyedTensor(["a", "b"], [1, 2], values)
    right = KeyedTensor.from_tensor_list(["c"], [torch.tensor([[10.0], [20.0]])])
    first, second = operation([left, right], [["b", "c"], ["a", "b"]])
    assert first.tolist() == [[1, 2, 10], [4, 5, 20]]
    assert second.tolist() == [[0, 1, 2], [3, 4, 5]]
    (first.sum() + second.sum()).backward()
    assert values.grad.tolist() == [[1, 2, 2], [1, 2, 2]]
    with pytest.raises(KeyError, match="no KeyedTensor has key 'z'"):
        operation([left, right], [["z"]])


def test_regroup_as_dict():
    grouped = KeyedTensor.regroup_as_dict([embeddings()], [["b"], ["a"]], ["x", "y"])
    assert list(grouped) == ["x", "y"]
    assert grouped["y"].tolist() == [[0], [3]]
    with pytest.raises(AssertionError, match="1 names, 2 groups"):
        KeyedTensor.regroup_as_dict([embeddings()], [["b"], ["a"]], ["x"])
