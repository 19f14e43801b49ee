"""Feature processors, towers, lazy modules and pools against TorchRec's, where that is installed."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn

pytest.importorskip("torchrec")

PACKAGES = ("recsys_edu", "torchrec")


def part(package: str, path: str):
    return importlib.import_module(f"{package}.{path}")


def kjt_of(package: str, weights=None):
    kjt = part(package, "sparse.jagged_tensor").KeyedJaggedTensor
    return kjt.from_lengths_sync(["x", "z"], torch.arange(6), torch.tensor([2, 0, 1, 1, 0, 2]), weights=weights)


def filled(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, value in sorted(module.state_dict().items()):
            value.copy_(torch.rand(value.shape, generator=generator))
    return module


@pytest.mark.parametrize("as_dict", [True, False])
def test_feature_processed_collection(as_dict):
    answers = []
    for package in PACKAGES:
        configs = part(package, "modules.embedding_configs")
        ebc = part(package, "modules.embedding_modules").EmbeddingBagCollection(
            [configs.EmbeddingBagConfig(num_embeddings=9, embedding_dim=4, name="t", feature_names=["x", "z"])], True
        )
        fp = part(package, "modules.feature_processor_")
        processors = (
            {name: fp.PositionWeightedModule(4) for name in ("x", "z")}
            if as_dict
            else fp.PositionWeightedModuleCollection({"x": 4, "z": 4})
        )
        module = filled(
            part(package, "modules.fp_embedding_modules").FeatureProcessedEmbeddingBagCollection(ebc, processors)
        )
        out = module(kjt_of(package))
        out.values().square().sum().backward()
        gradients = {name: p.grad for name, p in module.named_parameters()}
        answers.append((out.keys(), out.values(), gradients, set(module.state_dict())))
    assert answers[0][0] == answers[1][0]
    assert answers[0][3] == answers[1][3]
    torch.testing.assert_close(answers[0][1], answers[1][1])
    torch.testing.assert_close(answers[0][2], answers[1][2])


def test_position_weighted_modules():
    results = []
    for package in PACKAGES:
        module = part(package, "modules.feature_processor")
        by_dict = filled(module.PositionWeightedModule({"x": 4, "z": 4}))
        grouped = filled(module.PositionWeightedProcessor({"x": 4, "z": 4}))
        answer = by_dict(kjt_of(package).to_dict())
        results.append(
            (
                {key: jt.weights() for key, jt in answer.items()},
                grouped(kjt_of(package)).weights(),
                [name for name, _ in grouped.named_buffers()],
                list(grouped.state_dict()),
            )
        )
    torch.testing.assert_close(results[0][:2], results[1][:2])
    assert results[0][2:] == results[1][2:]


def test_tower_input_params_and_names():
    for weighted in (False, True):
        found = []
        for package in PACKAGES:
            configs, tower = part(package, "modules.embedding_configs"), part(package, "modules.embedding_tower")
            ebc = part(package, "modules.embedding_modules").EmbeddingBagCollection(
                [configs.EmbeddingBagConfig(num_embeddings=9, embedding_dim=4, name="t", feature_names=["x"])], weighted
            )
            keys = list(tower.EmbeddingTower(ebc, nn.Linear(2, 2)).state_dict())
            found.append((tower.tower_input_params(ebc), keys))
        assert found[0] == found[1]


def test_lazy_apply_acts_after_the_first_forward():
    outputs = []
    for package in PACKAGES:
        lazy = part(package, "modules.lazy_extension")
        model = lazy.lazy_apply(nn.Linear(3, 1, bias=False), lambda m: nn.init.constant_(m.weight, 7.0))
        nn.init.constant_(model.weight, 2.0)
        outputs.append([model(torch.ones(1, 3)).item() for _ in range(2)])
    assert outputs[0] == outputs[1] == [6.0, 21.0]
