"""Data-parallel tables begin alike on every rank, however each rank drew its own first values."""

import pytest
import torch

from recsys_edu.distributed.model_parallel import DistributedModelParallel
from recsys_edu.distributed.sharding_plan import construct_module_sharding_plan, data_parallel
from recsys_edu.distributed.types import ShardingPlan
from recsys_edu.modules.embedding_configs import EmbeddingBagConfig
from recsys_edu.modules.embedding_modules import EmbeddingBagCollection
from recsys_edu.optim.apply_optimizer_in_backward import apply_optimizer_in_backward


def first_values(rank, world_size, group, device: str, in_backward: bool) -> torch.Tensor:
    torch.manual_seed(rank)
    config = EmbeddingBagConfig(name="t", num_embeddings=6, embedding_dim=4, feature_names=["f"])
    module = EmbeddingBagCollection(tables=[config], device=torch.device(device))
    if in_backward:
        apply_optimizer_in_backward(torch.optim.SGD, module.parameters(), {"lr": 0.1})
    plan = construct_module_sharding_plan(module, {"t": data_parallel()}, world_size=world_size, device_type="cpu")
    model = DistributedModelParallel(module, plan=ShardingPlan({"": plan}))
    return next(iter(dict(model.named_parameters()).values())).detach().clone()


@pytest.mark.ranks
@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("in_backward", [False, True])
def test_copies_begin_alike(ranks, device, in_backward):
    first, second = ranks.run(first_values, 2, device, in_backward)
    assert first.abs().sum() > 0
    assert torch.equal(first, second)
