"""What a server calls: predict modules and factories, and the dense part in fewer bits."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from torch import nn

from recsys_edu.datasets.utils import Batch
from recsys_edu.inference.dlrm_predict import DLRMModelConfig, DLRMPredictFactory, DLRMPredictModule
from recsys_edu.inference.modules import (
    PredictFactory,
    PredictModule,
    quantize_dense,
    quantize_embeddings,
    quantize_feature,
    quantize_inference_model,
    shard_quant_model,
    trim_torch_package_prefix_from_typename,
)
from recsys_edu.models.dlrm import DLRM
from recsys_edu.modules.embedding_configs import EmbeddingBagConfig
from recsys_edu.modules.embedding_modules import EmbeddingBagCollection
from recsys_edu.quant import EmbeddingBagCollection as QuantEmbeddingBagCollection
from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor

KEYS, ROWS, DENSE_IN = ["user", "film"], [20, 30], 5


def tables() -> list[EmbeddingBagConfig]:
    return [EmbeddingBagConfig(rows, 8, f"t_{key}", feature_names=[key]) for key, rows in zip(KEYS, ROWS)]


def predictor() -> DLRMPredictModule:
    torch.manual_seed(0)
    return DLRMPredictModule(EmbeddingBagCollection(tables()), DENSE_IN, [16, 8], [16, 1], KEYS)


def request(batch_size: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 3, (2 * batch_size,), generator=generator)
    values = torch.randint(0, 20, (int(lengths.sum()),), generator=generator)
    dense = torch.rand(batch_size, DENSE_IN, generator=generator)
    return {"float_features": dense, "id_list_features.lengths": lengths, "id_list_features.values": values}


def test_quantised_and_sharded_predictions_stay_close() -> None:
    module = predictor()
    exact = module(request())["default"]
    assert exact.shape == (3,) and not exact.requires_grad and bool(((exact > 0) & (exact < 1)).all())
    served = quantize_inference_model(module)
    int8 = served(request())["default"]
    torch.testing.assert_close(int8, exact, atol=2e-3, rtol=0)
    assert not torch.equal(int8, exact)
    sharded, _ = shard_quant_model(served, 2, "cpu")
    torch.testing.assert_close(sharded(request())["default"], int8, atol=1e-6, rtol=0)
    assert not any(key.startswith("_module") for key in served.state_dict())


def test_a_model_can_train_after_it_has_served() -> None:
    module = predictor()
    module(request())
    module.predict_module.train()
    features = KeyedJaggedTensor(KEYS, torch.tensor([1, 2]), lengths=torch.tensor([1, 1]))
    module.predict_module(torch.rand(1, DENSE_IN), features).sum().backward()
    assert all(parameter.grad is not None for parameter in module.predict_module.parameters())


def test_a_request_that_lacks_something_is_told_what() -> None:
    with pytest.raises(KeyError, match=r"no \['float_features'\]"):
        predictor()({key: value for key, value in request().items() if key != "float_features"})
    with pytest.raises(NotImplementedError, match="PredictModule does not say how to predict"):
        PredictModule(nn.Linear(1, 1))({})


def test_factory_makes_what_weights_are_loaded_into() -> None:
    sample = Batch(
        torch.zeros(1, DENSE_IN),
        KeyedJaggedTensor(KEYS, torch.tensor([0]), lengths=torch.tensor([1, 0])),
        torch.zeros(1),
    )
    factory = DLRMPredictFactory(DLRMModelConfig([16, 8], DENSE_IN, 8, KEYS, ROWS, 0, [16, 1], sample))
    assert factory.result_metadata() == "dict_of_tensor"
    batching = json.loads(factory.batching_metadata_json())
    assert {name: facts["type"] for name, facts in batching.items()} == {
        "float_features": "dense",
        "id_list_features": "sparse",
    }
    trained = quantize_inference_model(predictor())
    made = factory.create_predict_module(world_size=2, device="cpu")
    made.predict_module.load_state_dict(trained.state_dict())
    torch.testing.assert_close(made(request())["default"], trained(request())["default"], atol=1e-6, rtol=0)
    with pytest.raises(TypeError, match="abstract"):
        PredictFactory()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dense_part_in_half_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = DLRM(EmbeddingBagCollection(tables()), DENSE_IN, [16, 8], [16, 1]).eval()
    features = KeyedJaggedTensor(KEYS, torch.tensor([1, 2, 3]), lengths=torch.tensor([1, 0, 1, 1]))
    dense = torch.rand(2, DENSE_IN)
    exact = model(dense, features)
    served = quantize_dense(quantize_embeddings(model, torch.int8, inplace=True, output_dtype=dtype), dtype)
    assert {p.dtype for p in served.parameters()} == {dtype}
    with torch.inference_mode():
        answer = served(dense.to(dtype), features)
    assert answer.dtype == dtype
    torch.testing.assert_close(answer.float(), exact, atol=0.02, rtol=0)


def test_dense_part_in_int8() -> None:
    model = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 1)).eval()
    with pytest.raises(ValueError, match=r"bfloat16, float16 or int8, got torch\.int32"):
        quantize_dense(model, torch.int32)
    if importlib.util.find_spec("torchao") is None:
        with pytest.raises(ImportError, match=r"pip install 'recsys_edu\[quant\]'"):
            quantize_dense(model, torch.int8)
        return
    inputs = torch.rand(4, 32)
    exact = model(inputs)
    with torch.inference_mode():
        answer = quantize_dense(model, torch.int8)(inputs)
    torch.testing.assert_close(answer, exact, atol=0.02, rtol=0)
    assert not torch.equal(answer, exact)


def test_a_pre_hook_halves_inputs() -> None:
    linear = nn.Linear(2, 1).half()
    linear.register_forward_pre_hook(quantize_feature)
    assert linear(torch.rand(3, 2)).dtype == torch.float16
    assert quantize_feature(linear, (torch.tensor([1]),))[0].dtype == torch.int64


def test_mapping_by_full_type_name() -> None:
    class Special(EmbeddingBagCollection):
        pass

    model = nn.Sequential(Special(tables()))
    name = f"{Special.__module__}.{Special.__qualname__}"
    with pytest.raises(ValueError, match="nothing to quantise"):
        quantize_inference_model(model)
    quantize_inference_model(model, quantization_mapping={name: QuantEmbeddingBagCollection})
    assert isinstance(model[0], QuantEmbeddingBagCollection)
    assert trim_torch_package_prefix_from_typename("<torch_package_12>.a.B") == "a.B"
