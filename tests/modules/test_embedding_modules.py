"""EmbeddingBagCollection and EmbeddingCollection against a lookup written out by hand."""

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys_edu.kernels.lookup import flat_buffer
from recsys_edu.modules.embedding_configs import DataType, EmbeddingBagConfig, EmbeddingConfig, PoolingType
from recsys_edu.modules.embedding_modules import (
    EmbeddingBagCollection,
    EmbeddingCollection,
    get_embedding_names_by_table,
    process_pooled_embeddings,
    reorder_inverse_indices,
)
from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor

ROWS = {"t1": 7, "t2": 5}


def bag_configs(**changes) -> list[EmbeddingBagConfig]:
    """Two tables, f2 in both, the second averaged: every naming and pooling rule at once."""
    common = {"data_type": DataType.FP32, **changes}
    return [
        EmbeddingBagConfig(ROWS["t1"], 4, "t1", feature_names=["f1", "f2"], **common),
        EmbeddingBagConfig(ROWS["t2"], 8, "t2", feature_names=["f2", "f3"], pooling=PoolingType.MEAN, **common),
    ]


def sequence_configs() -> list[EmbeddingConfig]:
    return [
        EmbeddingConfig(ROWS["t1"], 4, "t1", feature_names=["f1", "f2"]),
        EmbeddingConfig(ROWS["t2"], 4, "t2", feature_names=["f2"]),
    ]


def make_kjt(bags: dict[str, list[list[int]]], weighted: bool = False, dtype=torch.int64) -> KeyedJaggedTensor:
    values = [id for rows in bags.values() for row in rows for id in row]
    lengths = [len(row) for rows in bags.values() for row in rows]
    weights = torch.arange(1.0, len(values) + 1) / 4 if weighted else None
    return KeyedJaggedTensor(
        keys=list(bags),
        values=torch.tensor(values, dtype=dtype),
        lengths=torch.tensor(lengths, dtype=torch.int32),
        weights=weights,
    )


BAGS = {"f1": [[6, 0], [], [1]], "f2": [[4], [3, 3, 0], []], "f3": [[], [2, 4], [1]]}


def by_hand(ebc: EmbeddingBagCollection, features: KeyedJaggedTensor) -> torch.Tensor:
    """Bag by bag: add the rows (times their weights), divide by the count for MEAN."""
    blocks = []
    jagged = features.to_dict()
    for config in ebc.embedding_bag_configs():
        table = ebc.embedding_bags[config.name].weight.detach().float()
        for feature in config.feature_names:
            ids_per_bag = jagged[feature].to_dense()
            weights_per_bag = jagged[feature].to_dense_weights() if ebc.is_weighted() else None
            rows = []
            for bag, ids in enumerate(ids_per_bag):
                total = torch.zeros(config.embedding_dim)
                for position, id in enumerate(ids.tolist()):
                    total += table[id] * (weights_per_bag[bag][position] if weights_per_bag else 1.0)
                if config.pooling is PoolingType.MEAN and len(ids):
                    total /= len(ids)
                rows.append(total)
            blocks.append(torch.stack(rows))
    return torch.cat(blocks, dim=1)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("weighted", [False, True])
def test_pooled_equals_by_hand(weighted: bool, dtype: torch.dtype) -> None:
    ebc = EmbeddingBagCollection(bag_configs(), is_weighted=weighted)
    features = make_kjt(BAGS, weighted, dtype)
    out = ebc(features)
    assert out.keys() == ["f1", "f2@t1", "f2@t2", "f3"]
    assert out.length_per_key() == [4, 4, 8, 8]
    torch.testing.assert_close(out.values(), by_hand(ebc, features))


id_bags = st.integers(0, 4).flatmap(
    lambda batch: st.fixed_dictionaries(
        {
            key: st.lists(st.lists(st.integers(0, 4), max_size=4), min_size=batch, max_size=batch)
            for key in ("f3", "f1", "spare", "f2")
        }
    )
)


@settings(max_examples=40, deadline=None)
@given(bags=id_bags, weighted=st.booleans())
def test_fast_and_portable_paths_agree_forward_and_backward(bags: dict, weighted: bool) -> None:
    features = make_kjt(bags, weighted)
    if features.stride() == 0:
        return  # zero examples: test_empty_batch
    ebc = EmbeddingBagCollection(bag_configs(), is_weighted=weighted)
    weights = [bag.weight for bag in ebc.embedding_bags.values()]
    fast, portable = ebc(features).values(), ebc._forward_by_table(features, weights).values()
    torch.testing.assert_close(fast, portable)
    torch.testing.assert_close(fast, by_hand(ebc, features))
    upstream = torch.randn_like(fast)
    fast_grads = torch.autograd.grad((fast * upstream).sum(), weights)
    portable_grads = torch.autograd.grad((portable * upstream).sum(), weights)
    for fast_grad, portable_grad in zip(fast_grads, portable_grads):
        torch.testing.assert_close(fast_grad, portable_grad)


def test_empty_batch_and_no_tables() -> None:
    ebc = EmbeddingBagCollection(bag_configs())
    assert ebc(make_kjt({"f1": [], "f2": [], "f3": []})).values().shape == (0, 24)
    no_ids = make_kjt({"f1": [[]], "f2": [[]], "f3": [[]]})
    assert bool((ebc(no_ids).values() == 0).all())
    nothing = EmbeddingBagCollection([])(make_kjt(BAGS))
    assert nothing.keys() == [] and nothing.values().shape == (3, 0)


def test_output_is_in_config_order_whatever_the_keys_order() -> None:
    ebc = EmbeddingBagCollection(bag_configs())
    shuffled = make_kjt({"x": [[9999], [], []], "f3": BAGS["f3"], "f2": BAGS["f2"], "f1": BAGS["f1"]})
    torch.testing.assert_close(ebc(shuffled).values(), ebc(make_kjt(BAGS)).values())


def test_keys_in_lane_order_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    configs = [EmbeddingBagConfig(5, 4, name, feature_names=[name]) for name in ("a", "b")]
    features = make_kjt({"a": [[1]], "b": [[2]]})
    monkeypatch.setattr(KeyedJaggedTensor, "permute", lambda *_: pytest.fail("permuted without need"))
    assert EmbeddingBagCollection(configs)(features).values().shape == (1, 8)


def test_missing_feature_is_named() -> None:
    with pytest.raises(KeyError, match=r"no feature 'f3'; its keys are \['f1', 'f2'\]"):
        EmbeddingBagCollection(bag_configs())(make_kjt({"f1": [[1]], "f2": [[1]]}))


@pytest.mark.parametrize("collection", [EmbeddingBagCollection(bag_configs()), EmbeddingCollection(sequence_configs())])
def test_anything_but_a_keyed_jagged_tensor_is_refused(collection: torch.nn.Module) -> None:
    with pytest.raises(TypeError, match=r"takes a KeyedJaggedTensor.*got a Tensor"):
        collection(torch.zeros(3, dtype=torch.long))


@pytest.mark.parametrize("bad_id", [5, -1])
def test_id_out_of_range_names_feature_id_table_and_size(bad_id: int) -> None:
    ebc = EmbeddingBagCollection(bag_configs())
    with pytest.raises(IndexError, match=rf"'f3'.*{bad_id}.*'t2'.*5 rows"):
        ebc(make_kjt({**BAGS, "f3": [[], [2, bad_id], [1]]}))


def test_weighted_collection_needs_weights() -> None:
    with pytest.raises(AssertionError, match="weights"):
        EmbeddingBagCollection(bag_configs(), is_weighted=True)(make_kjt(BAGS))


def test_sample_weights_receive_gradients() -> None:
    ebc = EmbeddingBagCollection(bag_configs(), is_weighted=True)
    features = make_kjt(BAGS, weighted=True)
    features.weights().requires_grad_()
    ebc(features).values().sum().backward()
    first_row = ebc.embedding_bags["t1"].weight[6].sum()
    torch.testing.assert_close(features.weights().grad[0], first_row.detach())


@pytest.mark.parametrize("data_type", [DataType.FP16, DataType.BF16])
def test_narrow_tables_give_float32_sums(data_type: DataType) -> None:
    ebc = EmbeddingBagCollection(bag_configs(data_type=data_type))
    features = make_kjt(BAGS)
    out = ebc(features).values()
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, by_hand(ebc, features))
    weights = [bag.weight for bag in ebc.embedding_bags.values()]
    torch.testing.assert_close(out, ebc._forward_by_table(features, weights).values())


def test_tables_of_mixed_types() -> None:
    configs = bag_configs()
    configs[1].data_type = DataType.FP16
    ebc = EmbeddingBagCollection(configs)
    assert [bag.weight.dtype for bag in ebc.embedding_bags.values()] == [torch.float32, torch.float16]
    features = make_kjt(BAGS)
    torch.testing.assert_close(ebc(features).values(), by_hand(ebc, features))
    with pytest.raises(IndexError, match="'f1'"):
        ebc(make_kjt({**BAGS, "f1": [[7], [], []]}))


def vbe_kjt(with_inverse: bool = True) -> KeyedJaggedTensor:
    """f1 has 2 distinct bags, f2 one, f3 three, for 3 examples."""
    inverse = (["f1", "f2", "f3"], torch.tensor([[0, 1, 0], [0, 0, 0], [2, 1, 0]])) if with_inverse else None
    return KeyedJaggedTensor(
        keys=["f1", "f2", "f3"],
        values=torch.tensor([1, 2, 3, 4, 0, 1]),
        lengths=torch.tensor([1, 0, 2, 1, 1, 1]),
        stride_per_key_per_rank=[[2], [1], [3]],
        inverse_indices=inverse,
    )


def test_variable_batch_is_expanded_through_inverse_indices() -> None:
    ebc = EmbeddingBagCollection(bag_configs())
    full = make_kjt({"f1": [[1], [], [1]], "f2": [[2, 3]] * 3, "f3": [[1], [0], [4]]})
    torch.testing.assert_close(ebc(vbe_kjt()).values(), ebc(full).values())
    weights = [bag.weight for bag in ebc.embedding_bags.values()]
    torch.testing.assert_close(ebc._forward_by_table(vbe_kjt(), weights).values(), ebc(full).values())


def test_variable_batch_without_inverse_indices_is_refused() -> None:
    with pytest.raises(ValueError, match=r"different batch sizes.*'f1': 2"):
        EmbeddingBagCollection(bag_configs())(vbe_kjt(with_inverse=False))


def test_state_dict_names_and_children() -> None:
    ebc = EmbeddingBagCollection(bag_configs())
    assert list(ebc.state_dict()) == ["embedding_bags.t1.weight", "embedding_bags.t2.weight"]
    assert all(isinstance(bag, torch.nn.EmbeddingBag) for bag in ebc.embedding_bags.values())
    assert [bag.mode for bag in ebc.embedding_bags.values()] == ["sum", "mean"]
    ec = EmbeddingCollection(sequence_configs())
    assert list(ec.state_dict()) == ["embeddings.t1.weight", "embeddings.t2.weight"]
    assert all(isinstance(table, torch.nn.Embedding) for table in ec.embeddings.values())


def test_construction_errors() -> None:
    twice = [EmbeddingBagConfig(5, 4, "t", feature_names=["a"]), EmbeddingBagConfig(5, 4, "t", feature_names=["b"])]
    with pytest.raises(ValueError, match="Duplicate table name t"):
        EmbeddingBagCollection(twice)
    with pytest.raises(ValueError, match="NONE"):
        EmbeddingBagCollection([EmbeddingBagConfig(5, 4, "t", pooling=PoolingType.NONE)])
    unequal = [EmbeddingConfig(5, 4, "a"), EmbeddingConfig(5, 8, "b")]
    with pytest.raises(ValueError, match=r"'b' has 8.*'a' has 4"):
        EmbeddingCollection(unequal)


def test_table_without_features_serves_its_own_name() -> None:
    ebc = EmbeddingBagCollection([EmbeddingBagConfig(5, 4, "film")])
    assert ebc.embedding_bag_configs()[0].feature_names == ["film"]


def test_initial_values_and_reset() -> None:
    configs = bag_configs()
    configs[0].init_fn = lambda weight: weight.fill_(0.5)
    ebc = EmbeddingBagCollection(configs)
    assert bool((ebc.embedding_bags["t1"].weight == 0.5).all())
    bound = (1 / ROWS["t2"]) ** 0.5
    assert 0 < ebc.embedding_bags["t2"].weight.abs().max() <= bound
    with torch.no_grad():
        ebc.embedding_bags["t1"].weight.zero_()
    ebc.reset_parameters()
    assert bool((ebc.embedding_bags["t1"].weight == 0.5).all())


def test_meta_tables_have_no_data_until_they_get_memory() -> None:
    ebc = EmbeddingBagCollection(bag_configs(), device=torch.device("meta"))
    assert ebc.device.type == "meta" and all(p.is_meta for p in ebc.parameters())
    features = make_kjt(BAGS)
    with pytest.raises(RuntimeError, match=r"table 't1' is on the meta device.*to_empty"):
        ebc(features)
    ebc = ebc.to_empty(device="cpu")
    ebc.reset_parameters()
    assert ebc.device.type == "cpu"
    torch.testing.assert_close(ebc(features).values(), by_hand(ebc, features))


def test_copies_are_independent_and_equal() -> None:
    ebc = EmbeddingBagCollection(bag_configs())
    features = make_kjt(BAGS)
    before = ebc(features).values().detach()
    twin = copy.deepcopy(ebc)
    torch.testing.assert_close(twin(features).values(), before)
    with torch.no_grad():
        twin.embedding_bags["t1"].weight.add_(1)
    torch.testing.assert_close(ebc(features).values(), before)
    buffer = io.BytesIO()
    torch.save(ebc.state_dict(), buffer)
    buffer.seek(0)
    twin.load_state_dict(torch.load(buffer, weights_only=True))
    torch.testing.assert_close(twin(features).values(), before)


def test_a_batch_without_rows() -> None:
    for dims in ((4, 4), (4, 8)):
        configs = [
            EmbeddingBagConfig(5, dim, f"t{i}", feature_names=[f"f{i}"], pooling=PoolingType.MEAN)
            for i, dim in enumerate(dims)
        ]
        features = KeyedJaggedTensor(["f0", "f1"], torch.empty(0, dtype=torch.int64), lengths=torch.empty(0).long())
        assert EmbeddingBagCollection(configs)(features).values().shape == (0, sum(dims))


def test_assigned_weights_are_looked_up() -> None:
    ebc = EmbeddingBagCollection(bag_configs())
    other = EmbeddingBagCollection(bag_configs())
    expected = {name: weight.clone() for name, weight in other.state_dict().items()}
    ebc.load_state_dict({name: weight.clone() for name, weight in expected.items()}, assign=True)
    features = make_kjt(BAGS)
    torch.testing.assert_close(ebc(features).values(), other(features).values())
    assert flat_buffer(list(ebc.parameters())) is not None
    assert all(torch.equal(weight, expected[name]) for name, weight in ebc.state_dict().items())
    meta = EmbeddingBagCollection(bag_configs(), device=torch.device("meta"))
    meta.load_state_dict({name: weight.clone() for name, weight in expected.items()}, assign=True)
    assert flat_buffer(list(meta.parameters())) is not None
    torch.testing.assert_close(meta(features).values(), other(features).values())


def test_torch_fx_trace_computes_the_same() -> None:
    for weighted in (False, True):
        ebc = EmbeddingBagCollection(bag_configs(), is_weighted=weighted)
        traced = torch.fx.symbolic_trace(ebc)
        features = make_kjt(BAGS, weighted)
        out = traced(features)
        assert out.keys() == ["f1", "f2@t1", "f2@t2", "f3"]
        torch.testing.assert_close(out.values(), ebc(features).values())
    torch.testing.assert_close(
        torch.fx.symbolic_trace(EmbeddingBagCollection(bag_configs()))(vbe_kjt()).values().shape, torch.Size([3, 24])
    )


def test_torch_export_computes_the_same_for_other_ids() -> None:
    ebc = EmbeddingBagCollection(bag_configs())
    exported = torch.export.export(ebc, (make_kjt(BAGS),)).module()
    same_sizes = make_kjt({"f1": [[1], [2, 3], []], "f2": [[], [0], [1, 2, 3]], "f3": [[4], [], [2, 1]]})
    out = exported(same_sizes)
    assert out.keys() == ["f1", "f2@t1", "f2@t2", "f3"]
    torch.testing.assert_close(out.values(), ebc(same_sizes).values())


def test_torch_compile_computes_the_same() -> None:
    ebc = EmbeddingBagCollection(bag_configs())
    compiled = torch.compile(ebc, backend="eager")  # what the tracer sees; code generation is torch's own matter
    torch.testing.assert_close(compiled(make_kjt(BAGS)).values(), ebc(make_kjt(BAGS)).values())


@pytest.mark.parametrize("need_indices", [False, True])
def test_sequence_equals_plain_indexing(need_indices: bool) -> None:
    ec = EmbeddingCollection(sequence_configs(), need_indices=need_indices)
    features = make_kjt({"x": [[1], [], []], "f2": BAGS["f2"], "f1": BAGS["f1"]})
    out = ec(features)
    assert list(out) == ["f1", "f2@t1", "f2@t2"]
    for name, table, key in (("f1", "t1", "f1"), ("f2@t1", "t1", "f2"), ("f2@t2", "t2", "f2")):
        torch.testing.assert_close(out[name].values(), ec.embeddings[table].weight[features[key].values()])
        assert out[name].lengths().tolist() == features[key].lengths().tolist()
        indices = out[name].weights_or_none()
        assert (indices is None) is (not need_indices)
        if need_indices:
            assert indices.tolist() == features[key].values().tolist()
    assert ec.embedding_names_by_table() == [["f1", "f2@t1"], ["f2@t2"]] and ec.embedding_dim() == 4


def test_sequence_paths_agree_forward_and_backward() -> None:
    ec = EmbeddingCollection(sequence_configs())
    features = make_kjt(BAGS)
    weights = [table.weight for table in ec.embeddings.values()]
    fast, portable = ec(features), ec._forward_by_table(features, weights)
    assert list(fast) == list(portable)
    for name in fast:
        torch.testing.assert_close(fast[name].values(), portable[name].values())
    fast_grads = torch.autograd.grad(sum((jt.values() ** 2).sum() for jt in fast.values()), weights)
    portable_grads = torch.autograd.grad(sum((jt.values() ** 2).sum() for jt in portable.values()), weights)
    for fast_grad, portable_grad in zip(fast_grads, portable_grads):
        torch.testing.assert_close(fast_grad, portable_grad)


def test_sequence_of_a_variable_batch_and_of_nothing() -> None:
    ec = EmbeddingCollection(sequence_configs())
    out = ec(vbe_kjt())
    assert out["f1"].lengths().tolist() == [1, 0] and out["f2@t2"].lengths().tolist() == [2]
    torch.testing.assert_close(out["f2@t2"].values(), ec.embeddings["t2"].weight[torch.tensor([2, 3])])
    empty = ec(make_kjt({"f1": [[]], "f2": [[]]}))
    assert empty["f1"].values().shape == (0, 4)
    with pytest.raises(IndexError, match=r"'f2'.*5.*'t2'"):
        ec(make_kjt({"f1": [[0]], "f2": [[5]]}))
    with pytest.raises(KeyError, match="'f1'"):
        ec(make_kjt({"f2": [[0]]}))


def test_sequence_trace_and_export() -> None:
    ec = EmbeddingCollection(sequence_configs())
    features = make_kjt(BAGS)
    expected = ec(make_kjt(BAGS))
    for out in (torch.fx.symbolic_trace(ec)(make_kjt(BAGS)), torch.export.export(ec, (features,)).module()(features)):
        for name, jagged in expected.items():
            torch.testing.assert_close(out[name].values(), jagged.values())


def test_names_of_shared_features() -> None:
    assert get_embedding_names_by_table(bag_configs()) == [["f1", "f2@t1"], ["f2@t2", "f3"]]


def test_inverse_indices_helpers() -> None:
    indices = (["a", "b"], torch.tensor([[0, 1], [1, 0]]))
    assert reorder_inverse_indices(indices, ["b", "b", "a"]).tolist() == [[1, 0], [1, 0], [0, 1]]
    assert reorder_inverse_indices(None, ["a"]).numel() == 0
    with pytest.raises(KeyError, match="c"):
        reorder_inverse_indices(indices, ["c"])
    out = process_pooled_embeddings(
        [torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0]])], torch.tensor([[1, 0], [0, 0]])
    )
    assert out.tolist() == [[2.0, 3.0, 4.0], [1.0, 3.0, 4.0]]


def test_lengths_that_miss_the_values_are_refused_by_feature():
    tables = [
        EmbeddingBagConfig(name=f"t_{name}", num_embeddings=9, embedding_dim=4, feature_names=[name]) for name in "xy"
    ]
    kjt = KeyedJaggedTensor(["x", "y"], torch.tensor([1, 2, 3]), lengths=torch.tensor([1, 1, 1, 1]))
    with pytest.raises(ValueError, match=r"add up to 4 ids, but there are 3 values; per feature: {'x': 2, 'y': 2}"):
        EmbeddingBagCollection(tables=tables)(kjt)


def test_a_string_for_feature_names_is_refused():
    table = EmbeddingBagConfig(name="t", num_embeddings=9, embedding_dim=4, feature_names="xy")
    with pytest.raises(TypeError, match="table 't': feature_names must be a list, got the string 'xy'"):
        EmbeddingBagCollection(tables=[table])


@pytest.mark.parametrize("lengths", [[4, -1, 0, 0], [2, 2, 0, 0]])
def test_lengths_that_miss_the_values_never_reach_a_kernel(lengths):
    collection = EmbeddingBagCollection([EmbeddingBagConfig(5, 4, "t", feature_names=["x", "y"])])
    batch = KeyedJaggedTensor(["x", "y"], torch.tensor([0, 1, 2]), lengths=torch.tensor(lengths))
    with pytest.raises(ValueError, match="lengths add up to"):
        collection(batch)
