"""Table configs: bounds, validation, initial values, type conversions."""

import math

import pytest
import torch

from recsys_edu.kernels.backend import use_fbgemm
from recsys_edu.modules.embedding_configs import (
    BaseEmbeddingConfig,
    DataType,
    EmbeddingBagConfig,
    EmbeddingConfig,
    EmbeddingTableConfig,
    PoolingType,
    QuantConfig,
    data_type_to_dtype,
    data_type_to_sparse_type,
    dtype_to_data_type,
    init_table,
    pooling_type_to_pooling_mode,
    pooling_type_to_str,
)


def test_default_bounds_are_one_over_root_of_rows() -> None:
    config = EmbeddingBagConfig(num_embeddings=25, embedding_dim=4, name="t")
    assert config.get_weight_init_max() == pytest.approx(0.2)
    assert config.get_weight_init_min() == pytest.approx(-math.sqrt(1 / 25))
    given = EmbeddingBagConfig(num_embeddings=25, embedding_dim=4, weight_init_max=0.0, weight_init_min=-3.0)
    assert (given.get_weight_init_min(), given.get_weight_init_max()) == (-3.0, 0.0)


def test_equal_configs_are_equal_and_lists_are_not_shared() -> None:
    first, second = EmbeddingConfig(5, 4, "t"), EmbeddingConfig(5, 4, "t")
    assert first == second
    first.feature_names.append("f")
    assert second.feature_names == [] and first.num_features() == 1
    assert EmbeddingTableConfig(5, 4).embedding_names == []
    assert isinstance(EmbeddingBagConfig(5, 4), BaseEmbeddingConfig)


@pytest.mark.parametrize("sizes", [(0, 4), (5, 0), (-1, 4)])
def test_impossible_sizes_name_the_table(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"table 'film': .*expected at least 1"):
        EmbeddingBagConfig(*sizes, name="film")


def test_init_table_uses_bounds_init_fn_and_leaves_meta_alone() -> None:
    weight = torch.full((50, 4), 9.0)
    init_table(EmbeddingBagConfig(50, 4, weight_init_min=0.5, weight_init_max=0.75), weight)
    assert 0.5 <= weight.min() < weight.max() <= 0.75
    init_table(EmbeddingBagConfig(50, 4, init_fn=lambda w: w.fill_(2.0)), weight)
    assert bool((weight == 2).all())
    init_table(EmbeddingBagConfig(50, 4, init_fn=lambda w: torch.full_like(w, 3.0)), weight)
    assert bool((weight == 3).all())
    meta = torch.empty(50, 4, device="meta")
    init_table(EmbeddingBagConfig(50, 4, init_fn=lambda w: pytest.fail("called on meta")), meta)


def test_types_convert_both_ways() -> None:
    for data_type in DataType:
        if data_type is not DataType.UINT8:
            assert dtype_to_data_type(data_type_to_dtype(data_type)) in (data_type, DataType.INT8)
    assert dtype_to_data_type(torch.quint8) is DataType.INT8
    with pytest.raises(ValueError, match="float64"):
        dtype_to_data_type(torch.float64)
    with pytest.raises(ValueError, match="unknown DataType"):
        data_type_to_dtype("FP32")


def test_pooling_names() -> None:
    assert pooling_type_to_str(PoolingType.SUM) == "sum"
    assert pooling_type_to_str(PoolingType.MEAN) == "mean"
    with pytest.raises(ValueError, match="NONE"):
        pooling_type_to_str(PoolingType.NONE)
    assert QuantConfig(1, 2).per_table_weight_dtype is None


@pytest.mark.fbgemm
@pytest.mark.skipif(not use_fbgemm(), reason="FBGEMM's enums need FBGEMM")
def test_fbgemms_names() -> None:
    assert pooling_type_to_pooling_mode(PoolingType.MEAN).name == "MEAN"
    assert pooling_type_to_pooling_mode(PoolingType.MEAN, "row_wise").name == "SUM"
    assert data_type_to_sparse_type(DataType.FP16).value == "fp16"
    with pytest.raises(ValueError, match="INT64"):
        data_type_to_sparse_type(DataType.INT64)
