"""Quantised collections: answers within the error of their rows, state dicts, pruning, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from recsys_edu.inference.modules import (
    quantize_embeddings,
    quantize_inference_model,
    set_index_remappings,
    set_pruning_data,
)
from recsys_edu.kernels.quantized_rows import dequantize_rows, error_bound
from recsys_edu.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType, QuantConfig
from recsys_edu.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from recsys_edu.quant import EmbeddingBagCollection as QuantEmbeddingBagCollection
from recsys_edu.quant import EmbeddingCollection as QuantEmbeddingCollection
from recsys_edu.quant.embedding_modules import (
    Precision,
    quant_prep_customize_row_alignment,
    quant_prep_enable_quant_state_dict_split_scale_bias_for_types,
    quant_prep_enable_register_tbes,
    quantize_state_dict,
)
from recsys_edu.quant.utils import meta_to_cpu_placement
from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor
from recsys_edu.types import DataType

DTYPES = [torch.int8, torch.qint8, torch.quint4x2, torch.quint2x4, torch.float16, torch.float8_e4m3fn, torch.float32]


class Model(nn.Module):
    def __init__(self, device: str = "cpu", weighted: bool = False) -> None:
        super().__init__()
        bags = [("a", 8, ["f"], PoolingType.SUM), ("b", 20, ["g", "h"], PoolingType.MEAN)]
        self.ebc = EmbeddingBagCollection(
            [EmbeddingBagConfig(12, dim, name, feature_names=f, pooling=p) for name, dim, f, p in bags],
            is_weighted=weighted,
            device=torch.device(device),
        )
        self.ec = EmbeddingCollection(
            [EmbeddingConfig(12, 8, name, feature_names=f) for name, f in (("s", ["f"]), ("t", ["f", "h"]))],
            need_indices=True,
            device=torch.device(device),
        )
        self.over = nn.Linear(48, 1)

    def forward(self, features: KeyedJaggedTensor):
        return self.ebc(features), self.ec(features)


def batch(weighted: bool = False) -> KeyedJaggedTensor:
    lengths = torch.tensor([2, 0, 1, 1, 0, 3, 2, 2, 0])
    ids = torch.tensor([0, 11, 3, 4, 5, 6, 7, 8, 9, 10, 1])
    return KeyedJaggedTensor(["h", "f", "g"], ids, torch.rand(11) if weighted else None, lengths=lengths)


@pytest.mark.parametrize("dtype", DTYPES)
def test_answers_are_within_the_error_of_their_rows(dtype: torch.dtype) -> None:
    model = Model()
    served = quantize_embeddings(model, dtype, inplace=False)
    pooled, sequences = served(batch())
    exact, exact_sequences = model(batch())
    bound = 0.0
    for collection in (served.ebc.embedding_bags, served.ec.embeddings):
        for table in collection.values():
            bound = max(bound, error_bound(table.weight, table.data_type, table.dim).max().item())
    assert pooled.keys() == exact.keys() and pooled.length_per_key() == exact.length_per_key()
    assert (pooled.values() - exact.values()).abs().max() <= 3 * bound + 1e-6  # at most three ids in a bag
    for name, part in exact_sequences.items():
        assert (sequences[name].values() - part.values()).abs().max() <= bound + 1e-6
        assert torch.equal(sequences[name].weights(), part.weights())
        assert torch.equal(sequences[name].lengths(), part.lengths())


def test_weights_of_ids() -> None:
    model, features = Model(weighted=True), batch(weighted=True)
    served = quantize_embeddings(model, torch.int8, inplace=False)
    torch.testing.assert_close(served.ebc(features).values(), model.ebc(features).values(), atol=0.01, rtol=0)
    with pytest.raises(ValueError, match="is_weighted"):
        served.ebc(batch())


def test_the_float_model_stays_unless_in_place() -> None:
    model = Model()
    before = copy.deepcopy(model.state_dict())
    served = quantize_embeddings(model, torch.int8, inplace=False)
    assert isinstance(model.ebc, EmbeddingBagCollection) and not hasattr(model.ebc, "qconfig")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert isinstance(served.ebc, QuantEmbeddingBagCollection) and isinstance(served.ec, QuantEmbeddingCollection)
    assert served.over is not model.over and torch.equal(served.over.weight, model.over.weight)
    again = quantize_inference_model(model)
    assert again is model and isinstance(model.ebc, QuantEmbeddingBagCollection)


def test_each_table_has_its_type() -> None:
    served = quantize_embeddings(
        Model(), torch.int8, inplace=False, per_table_weight_dtype={"b": torch.quint4x2, "s": torch.float16}
    )
    kinds = [config.data_type for config in served.ebc.embedding_bag_configs() + served.ec.embedding_configs()]
    assert kinds == [DataType.INT8, DataType.INT4, DataType.FP16, DataType.INT8]
    assert served.ebc.memory_bytes() == 12 * (8 + 4) + 12 * (10 + 4)
    with pytest.raises(ValueError, match=r"names \['c'\].*\['a', 'b', 's', 't'\]"):
        quantize_embeddings(Model(), torch.int8, inplace=False, per_table_weight_dtype={"c": torch.int8})


@pytest.mark.parametrize("output_dtype", [torch.float16, torch.bfloat16])
def test_output_dtype(output_dtype: torch.dtype) -> None:
    model = Model()
    exact = quantize_embeddings(model, torch.int8, inplace=False)(batch())
    rounded = quantize_embeddings(model, torch.int8, inplace=False, output_dtype=output_dtype)(batch())
    assert torch.equal(rounded[0].values(), exact[0].values().to(output_dtype))
    assert torch.equal(rounded[1]["h"].values(), exact[1]["h"].values().to(output_dtype))


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("alignment", [1, 16])
def test_state_dict_comes_back(split: bool, alignment: int) -> None:
    model, kinds = Model(), [EmbeddingBagCollection, EmbeddingCollection]
    quant_prep_customize_row_alignment(model, kinds, alignment)
    if split:
        quant_prep_enable_quant_state_dict_split_scale_bias_for_types(model, kinds)
    mixed = {"b": torch.quint4x2, "t": torch.float16}
    served = quantize_embeddings(model, torch.int8, inplace=False, per_table_weight_dtype=mixed)
    state = served.state_dict()
    assert state["ebc.embedding_bags.a.weight"].shape == (12, 8 if split else (16 if alignment == 16 else 12))
    assert ("ebc.embedding_bags.b.weight_qscale" in state) == split
    assert "ec.embeddings.t.weight_qscale" not in state, "FP16 rows have no scale"
    other = quantize_embeddings(Model(), torch.int8, inplace=False, per_table_weight_dtype=mixed)
    assert not torch.equal(other(batch())[0].values(), served(batch())[0].values())
    other.load_state_dict(state)  # whatever the padding, split or not
    assert torch.equal(other(batch())[0].values(), served(batch())[0].values())
    assert torch.equal(other(batch())[1]["h"].values(), served(batch())[1]["h"].values())


def test_state_dict_says_what_does_not_fit() -> None:
    served = quantize_embeddings(Model(), torch.int8, inplace=False)
    state = served.state_dict()
    state["ebc.embedding_bags.a.weight"] = torch.zeros(11, 16, dtype=torch.uint8)
    del state["ec.embeddings.s.weight"]
    with pytest.raises(RuntimeError, match=r"table 'a' has 12 rows, got 11") as error:
        served.load_state_dict(state)
    assert "ec.embeddings.s.weight" in str(error.value)


def test_first_rows_are_kept_and_others_refused() -> None:
    model = set_pruning_data(Model(), {"a": 5})
    served = quantize_embeddings(model, torch.int8, inplace=False)
    assert served.state_dict()["ebc.embedding_bags.a.weight"].shape == (5, 16)
    assert served.ebc.embedding_bag_configs()[0].num_embeddings_post_pruning == 5
    assert served.ebc.embedding_bag_configs()[0].num_embeddings == 12
    with pytest.raises(IndexError, match="'a', whose 5 rows"):
        served.ebc(batch())


def test_dropped_rows_answer_zeros_and_count_in_means() -> None:
    model, dropped = Model(), torch.tensor([4, 5, 7])
    keep = torch.ones(12, dtype=torch.bool)
    keep[dropped] = False
    array = torch.where(keep, keep.cumsum(0) - 1, -1)
    served = quantize_embeddings(set_index_remappings(model, {"a": array, "b": array, "t": array}), torch.int8, False)
    assert served.ebc.embedding_bags["a"].weight.shape[0] == 9 + 1  # and a row of zeros
    for table in (*model.ebc.embedding_bags.values(), model.ec.embeddings["t"]):
        table.weight.data[dropped] = 0
    pooled, sequences = served(batch())
    exact, exact_sequences = model(batch())
    torch.testing.assert_close(pooled.values(), exact.values(), atol=0.01, rtol=0)
    for name in exact_sequences:
        torch.testing.assert_close(sequences[name].values(), exact_sequences[name].values(), atol=0.01, rtol=0)
        assert torch.equal(sequences[name].weights(), exact_sequences[name].weights()), "ids are the original ones"
    with pytest.raises(IndexError, match="'a', whose 12 rows"):
        served.ebc(KeyedJaggedTensor(["f", "g", "h"], torch.tensor([12]), lengths=torch.tensor([1, 0, 0])))
    again = quantize_embeddings(set_index_remappings(Model(), {"a": array, "b": array, "t": array}), torch.int8, False)
    again.load_state_dict(served.state_dict())
    assert torch.equal(again(batch())[0].values(), pooled.values())


def test_a_remapping_has_to_fit_its_table() -> None:
    configs = [EmbeddingBagConfig(4, 8, "a", data_type=DataType.INT8, feature_names=["f"])]
    for remapping, match in (
        ([0, -1, 1], "3 numbers for 4 rows"),
        ([0, -1, 1, -1], "keeps 4 rows, its index remapping 2"),
    ):
        with pytest.raises(ValueError, match=match):
            QuantEmbeddingBagCollection(
                configs, False, torch.device("cpu"), index_remappings={"a": torch.tensor(remapping)}
            )
    with pytest.raises(ValueError, match=r"remappings for \['z'\]"):
        QuantEmbeddingBagCollection(configs, False, torch.device("cpu"), index_remappings={"z": torch.tensor([0])})


def test_pruning_has_to_name_tables_and_rows_that_there_are() -> None:
    model = Model()
    for rows, match in (
        ({"z": 3}, r"no collection has tables \['z'\]; the model's tables are \['a', 'b', 's', 't'\]"),
        ({"a": 13}, "table 'a' has 12 rows and cannot keep 13"),
        ({"a": 3, "b": -1}, "table 'b' has 12 rows and cannot keep -1"),
    ):
        with pytest.raises(ValueError, match=match):
            set_pruning_data(model, rows)
    for arrays, match in (
        ({"z": torch.arange(12)}, r"no collection has tables \['z'\]"),
        ({"t": torch.arange(5)}, r"table 't' has 12 rows, its index remapping \[5\] numbers"),
    ):
        with pytest.raises(ValueError, match=match):
            set_index_remappings(model, arrays)
    served = quantize_embeddings(model, torch.int8, inplace=False)  # nothing of it has been taken over
    assert [table.weight.shape[0] for table in served.ebc.embedding_bags.values()] == [12, 12]


def test_all_or_no_rows_of_a_table_can_be_dropped() -> None:
    features = KeyedJaggedTensor(["f", "g", "h"], torch.tensor([3, 4]), lengths=torch.tensor([1, 1, 0]))
    gone = quantize_embeddings(set_index_remappings(Model(), {"a": torch.full((12,), -1)}), torch.int8, False)
    assert gone.ebc.embedding_bags["a"].weight.shape[0] == 1 and gone.ebc(features)["f"].eq(0).all()
    empty = quantize_embeddings(set_pruning_data(Model(), {"a": 0}), torch.int8, False)
    with pytest.raises(IndexError, match="table 'a'"):
        empty.ebc(features)
    model = Model()
    kept = quantize_embeddings(set_index_remappings(model, {"a": torch.arange(12)}), torch.int8, False)
    plain = quantize_embeddings(set_index_remappings(model, {}), torch.int8, False)
    assert torch.equal(kept.ebc(features).values(), plain.ebc(features).values())


@pytest.mark.parametrize(
    ("dim", "dtype", "reason"),
    [(7, torch.quint4x2, "INT4 packs 2 numbers"), (6, torch.quint2x4, "INT2 packs 4"), (8, torch.bfloat16, "got BF16")],
)
def test_a_table_that_has_no_such_form_is_named(dim: int, dtype: torch.dtype, reason: str) -> None:
    model = nn.Sequential(EmbeddingBagCollection([EmbeddingBagConfig(5, dim, "odd", feature_names=["f"])]))
    with pytest.raises(ValueError, match=f"table 'odd': .*{reason}"):
        quantize_embeddings(model, dtype, inplace=False)
    served = quantize_embeddings(model, torch.int8, inplace=False)  # 7 columns are no multiple of FBGEMM's 4
    features = KeyedJaggedTensor(["f"], torch.tensor([1]), lengths=torch.tensor([1]))
    torch.testing.assert_close(served[0](features).values(), model[0](features).values(), atol=0.01, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_batches_of_nothing(dtype: torch.dtype) -> None:
    served = quantize_embeddings(Model(), dtype, inplace=False)
    for batch_size in (0, 3):
        lengths = torch.zeros(3 * batch_size, dtype=torch.int64)
        pooled, sequences = served(KeyedJaggedTensor(["f", "g", "h"], lengths.new_zeros(0), lengths=lengths))
        assert pooled.values().shape == (batch_size, 48) and pooled.values().eq(0).all()
        assert [part.values().shape for part in sequences.values()] == [(0, 8)] * 3


def test_from_float_reads_the_qconfig() -> None:
    model = Model()
    with pytest.raises(ValueError, match="has no qconfig"):
        QuantEmbeddingBagCollection.from_float(model.ebc)
    model.ebc.qconfig = QuantConfig(Precision.of(torch.float16), Precision.of(torch.qint8), {"b": torch.quint2x4})
    served = QuantEmbeddingBagCollection.from_float(model.ebc)
    assert served.output_dtype() == torch.float16
    assert [config.data_type for config in served.embedding_bag_configs()] == [DataType.INT8, DataType.INT2]


def test_weights_given_to_the_constructor() -> None:
    model, found = Model(), {}
    kinds = {"a": DataType.INT8, "b": DataType.INT4, "s": DataType.INT8, "t": DataType.FP16}
    assert quantize_state_dict(model.ebc, found, kinds) == torch.device("cpu")
    configs = [
        EmbeddingBagConfig(12, 8, "a", DataType.INT8, ["f"]),
        EmbeddingBagConfig(12, 20, "b", DataType.INT4, ["g", "h"], pooling=PoolingType.MEAN),
    ]
    made = QuantEmbeddingBagCollection(configs, False, torch.device("cpu"), table_name_to_quantized_weights=found)
    wanted = quantize_embeddings(model, torch.int8, False, per_table_weight_dtype={"b": torch.quint4x2})
    assert torch.equal(made(batch()).values(), wanted.ebc(batch()).values())


def test_nothing_to_quantise_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing to quantise: Linear"):
        quantize_embeddings(nn.Linear(2, 2), torch.int8, inplace=False)
    served = quantize_embeddings(Model(), torch.int8, inplace=False)
    with pytest.raises(ValueError, match="nothing to quantise: Model"):
        quantize_embeddings(served, torch.int8, inplace=False)


def test_a_bad_row_is_named_and_the_model_left_alone() -> None:
    model = Model()
    with torch.no_grad():
        model.ec.embeddings["s"].weight[3, 1] = float("nan")
    with pytest.raises(ValueError, match="table 's', row 3, column 1: nan"):
        quantize_embeddings(model, torch.int8, inplace=False)
    assert isinstance(model.ebc, EmbeddingBagCollection) and not hasattr(model.ebc, "qconfig")


def test_meta_tables_get_memory_and_rows_later() -> None:
    served = quantize_embeddings(Model(device="meta"), torch.int8, inplace=True)
    assert served.ebc.device.type == "meta"
    with pytest.raises(RuntimeError, match="meta"):
        served.ebc(batch())
    meta_to_cpu_placement(served)
    full = quantize_embeddings(Model(), torch.int8, inplace=False)
    for name in ("ebc", "ec"):
        getattr(served, name).load_state_dict(getattr(full, name).state_dict())
    assert torch.equal(served(batch())[0].values(), full(batch())[0].values())


def test_copies_do_not_share_rows() -> None:
    served = quantize_embeddings(Model(), torch.int8, inplace=False)
    other = copy.deepcopy(served)
    other.ebc.embedding_bags["a"].fill(torch.zeros(12, 12, dtype=torch.uint8))
    assert other.ebc(batch()).values()[:, :8].eq(0).all()
    assert not served.ebc(batch()).values()[:, :8].eq(0).all()


def test_dense_half_leaves_tables_alone() -> None:
    served = quantize_embeddings(Model(), torch.int8, inplace=False, output_dtype=torch.bfloat16)
    rows = served.ebc.embedding_bags["a"].weight.clone()
    served.to(torch.bfloat16)
    assert served.over.weight.dtype == torch.bfloat16
    assert torch.equal(served.ebc.embedding_bags["a"].weight, rows)
    assert served.over(torch.cat([served.ebc(batch()).values()], 1)).dtype == torch.bfloat16


def test_kernel_can_be_shown_as_a_submodule() -> None:
    model = Model()
    quant_prep_enable_register_tbes(model, [EmbeddingBagCollection])
    served = quantize_embeddings(model, torch.int8, inplace=False)
    assert served.ebc.tbes[0] is served.ebc.kernel and not hasattr(served.ec, "tbes")


def test_export_follows_the_lookup() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ebc = quantize_embeddings(Model(), torch.int8, False, per_table_weight_dtype={"b": torch.quint4x2}).ebc

        def forward(self, values, lengths):
            return self.ebc(KeyedJaggedTensor(["f", "g", "h"], values, lengths=lengths)).values()

    model = Pooled()
    values, lengths = torch.tensor([0, 1, 2, 3, 4, 5, 6]), torch.tensor([2, 1, 0, 1, 2, 1])
    count = torch.export.Dim("count", min=2, max=100)
    program = torch.export.export(model, (values, lengths), dynamic_shapes=({0: count}, None))
    torch.testing.assert_close(program.module()(values, lengths), model(values, lengths))
    more, longer = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8]), torch.tensor([2, 1, 2, 1, 2, 1])
    torch.testing.assert_close(program.module()(more, longer), model(more, longer))


def test_numbers_by_hand() -> None:
    ebc = EmbeddingBagCollection([EmbeddingBagConfig(2, 4, "t", feature_names=["f"])])
    with torch.no_grad():
        ebc.embedding_bags["t"].weight.copy_(torch.tensor([[0.0, 1.0, 2.0, 255.0], [-1.0, -1.0, -1.0, -1.0]]))
    served = quantize_embeddings(nn.Sequential(ebc), torch.int8, inplace=True)[0]
    features = KeyedJaggedTensor(["f"], torch.tensor([0, 1, 1]), lengths=torch.tensor([2, 1, 0]))
    assert served(features).values().tolist() == [[-1.0, 0.0, 1.0, 254.0], [-1.0] * 4, [0.0] * 4]
    assert dequantize_rows(served.embedding_bags["t"].weight, DataType.INT8, 4)[0].tolist() == [0.0, 1.0, 2.0, 255.0]
