"""The models that take a ModelInput, against the models they wrap."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from recsys_edu.models.deepfm import SimpleDeepFMNN, SimpleDeepFMNNWrapper
from recsys_edu.models.dlrm import DLRM, DLRMWrapper
from recsys_edu.models.model_input import ModelInput
from recsys_edu.modules.embedding_configs import EmbeddingBagConfig
from recsys_edu.modules.embedding_modules import EmbeddingBagCollection
from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor, kjt_is_equal


def tables() -> EmbeddingBagCollection:
    return EmbeddingBagCollection([EmbeddingBagConfig(9, 4, "film", feature_names=["film"])])


def example() -> ModelInput:
    ids = KeyedJaggedTensor(["film"], torch.tensor([7, 2, 3]), lengths=torch.tensor([2, 0, 1]))
    scored = KeyedJaggedTensor(["tag"], torch.tensor([1]), torch.tensor([0.5]), lengths=torch.tensor([0, 0, 1]))
    return ModelInput(torch.randn(3, 5), ids, scored, torch.tensor([1, 0, 1]))


@pytest.mark.parametrize("wrapper, plain, arguments, loss_fn", [
    (DLRMWrapper, DLRM, (5, [8, 4], [8, 1]), F.binary_cross_entropy_with_logits),
    (SimpleDeepFMNNWrapper, SimpleDeepFMNN, None, F.binary_cross_entropy),
])  # fmt: skip
def test_wrappers_give_loss_and_prediction(wrapper, plain, arguments, loss_fn) -> None:
    def build(kind):
        return kind(tables(), *arguments) if arguments else kind(5, tables(), 8, 6)

    model, reference, batch = build(wrapper), build(plain), example()
    assert list(model.state_dict()) == list(reference.state_dict())
    reference.load_state_dict(model.state_dict())
    expected = reference(batch.float_features, batch.idlist_features)
    loss, prediction = model(batch)
    assert torch.equal(prediction, expected)
    torch.testing.assert_close(loss, loss_fn(expected[:, 0], batch.label.float()))
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert torch.equal(model.eval()(batch), expected)
    with pytest.raises(ValueError, match="idlist_features, which is None"):
        model(dataclasses.replace(batch, idlist_features=None))


def test_moving_and_measuring_an_input() -> None:
    batch = example()
    without = dataclasses.replace(batch, idscore_features=None)
    assert without.size_in_bytes() == 3 * 5 * 4 + 3 * 8 + (3 + 3) * 8
    assert batch.size_in_bytes() - without.size_in_bytes() == 8 + 4 + 3 * 8
    moved = batch.to(torch.device("cpu"), non_blocking=True)
    assert kjt_is_equal(moved.idscore_features, batch.idscore_features)
    assert torch.equal(moved.label, batch.label) and torch.equal(moved.float_features, batch.float_features)
    assert without.to(torch.device("meta")).label.is_meta and without.to(torch.device("meta")).idscore_features is None
