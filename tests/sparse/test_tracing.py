"""The ragged classes in pytrees, torch.fx, torch.export and torch.compile."""

from __future__ import annotations

import io
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from recsys_edu.sparse.jagged_tensor import (
    ComputeJTDictToKJT,
    ComputeKJTToJTDict,
    JaggedTensor,
    KeyedJaggedTensor,
    KeyedTensor,
    flatten_kjt_list,
    jt_is_equal,
    kjt_is_equal,
    unflatten_kjt_list,
)


def make(lengths=(1, 0, 2, 0)) -> KeyedJaggedTensor:
    lengths = torch.tensor(lengths)
    return KeyedJaggedTensor(["a", "b"], torch.arange(int(lengths.sum())), lengths=lengths)


def make_variable() -> KeyedJaggedTensor:
    inverse = (["b", "a"], torch.tensor([[0, 0], [0, 1]]))
    return KeyedJaggedTensor(["a", "b"], torch.arange(3), lengths=torch.tensor([1, 0, 2]),
                             stride_per_key_per_rank=[[2], [1]], inverse_indices=inverse)  # fmt: skip


def test_trees_are_lists_of_tensors_with_keys_aside():
    leaves, spec = pytree.tree_flatten(make())
    assert len(leaves) == 6
    assert spec.context == ["a", "b"]
    assert kjt_is_equal(pytree.tree_unflatten(leaves, spec), make())
    jagged = JaggedTensor(torch.arange(3), lengths=torch.tensor([1, 2]))
    assert jt_is_equal(pytree.tree_map(lambda leaf: leaf, jagged), jagged)
    keyed = KeyedTensor(["x"], [2], torch.ones(1, 2))
    doubled = pytree.tree_map_only(torch.Tensor, lambda leaf: leaf * 2, keyed)
    assert doubled["x"].tolist() == [[2, 2]]


def test_variable_batch_survives_the_tree():
    leaves, spec = pytree.tree_flatten(make_variable())
    again = pytree.tree_unflatten(leaves, spec)
    assert again.stride_per_key_per_rank() == [[2], [1]]
    assert again.inverse_indices()[0] == ["a", "b"]
    assert again.inverse_indices()[1].tolist() == [[0, 1], [0, 0]]  # its rows follow the batch's keys


def from_offsets(lengths=(1, 0, 2, 0)) -> KeyedJaggedTensor:
    fresh = make(lengths)
    return KeyedJaggedTensor(fresh.keys(), fresh.values(), offsets=fresh.offsets())


def with_caches(lengths=(1, 0, 2, 0)) -> KeyedJaggedTensor:
    kjt = make(lengths).sync()
    kjt.offsets()
    return kjt


def test_the_tree_does_not_depend_on_what_was_computed_before():
    expected, spec = pytree.tree_flatten(make())
    for kjt in (with_caches(), from_offsets()):
        leaves, other_spec = pytree.tree_flatten(kjt)
        assert spec == other_spec
        assert [leaf is None for leaf in leaves] == [leaf is None for leaf in expected]
        assert leaves[2].tolist() == expected[2].tolist()
        assert leaves[2] is pytree.tree_leaves(kjt)[2]  # the same tensor each time
        assert kjt_is_equal(pytree.tree_unflatten(leaves, other_spec), make())
    computed = JaggedTensor(torch.arange(3), offsets=torch.tensor([0, 1, 3]))
    fresh = JaggedTensor(torch.arange(3), lengths=torch.tensor([1, 2]))
    assert [leaf is None for leaf in pytree.tree_leaves(computed)] == [
        leaf is None for leaf in pytree.tree_leaves(fresh)
    ]
    assert jt_is_equal(pytree.tree_map(lambda leaf: leaf, computed), fresh)


def test_wrong_number_of_leaves():
    for instance in (make(), JaggedTensor.empty(), KeyedTensor(["x"], [2], torch.ones(1, 2))):
        leaves, context = pytree.SUPPORTED_NODES[type(instance)].flatten_fn(instance)
        with pytest.raises(ValueError, match=rf"{type(instance).__name__} is made of {len(leaves)} leaves"):
            pytree.SUPPORTED_NODES[type(instance)].unflatten_fn([*leaves, None], context)


def test_lists_of_batches():
    batches = [make(), make_variable()]
    values, contexts = flatten_kjt_list(batches)
    assert contexts == [["a", "b"], ["a", "b"]]
    again = unflatten_kjt_list(values, contexts)
    assert kjt_is_equal(again[0], batches[0])
    assert again[1].stride_per_key() == [2, 1]
    with pytest.raises(ValueError, match="2 batches are 12 leaves, got 11"):
        unflatten_kjt_list(values[1:], contexts)


class Rearrange(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_dict = ComputeKJTToJTDict()
        self.to_kjt = ComputeJTDictToKJT()

    def forward(self, values, lengths):
        kjt = KeyedJaggedTensor(["a", "b"], values, lengths=lengths)
        return self.to_kjt(self.to_dict(kjt)).permute([1, 0])


class Regroup(nn.Module):
    def forward(self, left, right):
        first = KeyedTensor(["p", "q"], [1, 2], left)
        second = KeyedTensor(["r"], [1], right)
        tensors = KeyedTensor.regroup([first, second], [["p", "r"]])
        return tensors[0], KeyedTensor.regroup_as_dict([first, second], [["q"]], ["g"])["g"]


def test_fx_records_constructions_and_calls():
    graph = torch.fx.symbolic_trace(Rearrange())
    called = Counter(node.target for node in graph.graph.nodes if node.op == "call_function")
    assert called[KeyedJaggedTensor] == 1
    arguments = (torch.arange(3), torch.tensor([1, 0, 2, 0]))
    assert kjt_is_equal(graph(*arguments), Rearrange()(*arguments))
    graph = torch.fx.symbolic_trace(Regroup())
    arguments = (torch.arange(3.0)[None], torch.ones(1, 1))
    for mine, theirs in zip(graph(*arguments), Regroup()(*arguments)):
        assert torch.equal(mine, theirs)


class Lookup(nn.Module):
    def forward(self, kjt):
        running = kjt.values().float().cumsum(0)
        return KeyedTensor(["s"], [1], running[kjt.offsets()[1:].clamp(min=1) - 1][:, None])


class TakeApart(nn.Module):
    def forward(self, kjt):
        return kjt.permute([1, 0]).lengths(), kjt.to_dict()["b"].values(), kjt.split([1, 1])[0].values()


@pytest.mark.parametrize("strict", [False, True])
def test_export_takes_a_batch_and_gives_a_keyed_tensor(strict):
    exported = torch.export.export(Lookup(), (make(),), strict=strict)
    assert torch.equal(exported.module()(make()).values(), Lookup()(make()).values())


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("traced, run", [(make, with_caches), (with_caches, make), (from_offsets, make),
                                         (make, from_offsets)])  # fmt: skip
def test_an_exported_graph_takes_fresh_and_used_batches(traced, run, strict):
    exported = torch.export.export(Lookup(), (traced(),), strict=strict)
    assert torch.equal(exported.module()(run((0, 1, 1, 1))).values(), Lookup()(make((0, 1, 1, 1))).values())


def test_one_exported_graph_serves_other_batch_sizes_and_survives_the_disk():
    dynamic = ([{0: torch.export.Dim.AUTO}, None, {0: torch.export.Dim.AUTO}, None, None, None],)
    exported = torch.export.export(Lookup(), (make(),), dynamic_shapes=dynamic)
    other = make((1, 0, 2, 0, 3, 1))
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file)
    for program in (exported, loaded):
        assert torch.equal(program.module()(other).values(), Lookup()(other).values())


def test_export_of_operations_with_data_dependent_sizes():
    exported = torch.export.export(TakeApart(), (make((1, 0, 2, 0, 3, 1)),))
    batch = make((0, 1, 2, 1, 0, 3))
    for mine, theirs in zip(exported.module()(batch), TakeApart()(batch)):
        assert torch.equal(mine, theirs)


def test_compile_without_graph_breaks():
    def forward(values, lengths):
        kjt = KeyedJaggedTensor(["a", "b"], values, lengths=lengths)
        return kjt.values() * 2, kjt.offsets()

    values, offsets = torch.compile(forward, fullgraph=True, backend="eager")(
        torch.arange(3), torch.tensor([1, 0, 2, 0])
    )
    assert values.tolist() == [0, 2, 4]
    assert offsets.tolist() == [0, 1, 1, 3, 3]
