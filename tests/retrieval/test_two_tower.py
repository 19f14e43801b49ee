from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from recsys_edu.datasets.utils import Batch
from recsys_edu.distributed.model_parallel import DistributedModelParallel
from recsys_edu.distributed.sharding_plan import construct_module_sharding_plan, row_wise, table_wise
from recsys_edu.distributed.types import ShardingPlan
from recsys_edu.models.two_tower import TwoTower, TwoTowerTrainTask
from recsys_edu.modules.embedding_configs import EmbeddingBagConfig
from recsys_edu.modules.embedding_modules import EmbeddingBagCollection
from recsys_edu.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from recsys_edu.retrieval.train_task import RetrievalTrainTask, popularity_of
from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor

ROWS = {"user": 9, "age": 4, "item": 12, "words": 7}


def collection(names=("user", "item"), dims=None) -> EmbeddingBagCollection:
    configs = [
        EmbeddingBagConfig(
            name=f"t_{name}", num_embeddings=ROWS[name], embedding_dim=(dims or {}).get(name, 8), feature_names=[name]
        )
        for name in names
    ]
    return EmbeddingBagCollection(tables=configs)


def pair_batch(users, items, num_more=0) -> Batch:
    lengths = [1] * (len(items) - num_more) + [0] * num_more + [1] * len(items)
    kjt = KeyedJaggedTensor(["user", "item"], torch.tensor([*users, *items]), lengths=torch.tensor(lengths))
    num_pairs = len(items) - num_more
    return Batch(torch.zeros(num_pairs, 0), kjt, torch.tensor([1.0, 0.0] * num_pairs)[:num_pairs])


def test_the_towers_are_bags_then_mlps():
    torch.manual_seed(0)
    tower = TwoTower(collection(), [6, 4])
    query_BD, candidate_BD = tower(pair_batch([3, 5], [1, 11]).sparse_features)
    weights = tower.ebc.embedding_bags
    assert torch.allclose(query_BD, tower.query_proj(weights["t_user"].weight[[3, 5]]))
    assert torch.allclose(candidate_BD, tower.candidate_proj(weights["t_item"].weight[[1, 11]]))
    assert (query_BD >= 0).all() and query_BD.shape == (2, 4)  # ReLU on the last layer too, as in TorchRec's example


def test_train_task_is_binary_cross_entropy_of_the_dot_product():
    tower = TwoTower(collection(), [4])
    batch = pair_batch([3, 5], [1, 11])
    loss, (detached, logits_B, labels_B) = TwoTowerTrainTask(tower)(batch)
    query_BD, candidate_BD = tower(batch.sparse_features)
    expected = F.binary_cross_entropy_with_logits((query_BD * candidate_BD).sum(1), batch.labels)
    assert torch.allclose(loss, expected)
    assert not detached.requires_grad and not logits_B.requires_grad
    assert torch.equal(labels_B, batch.labels)


def test_several_features_per_tower():
    ebc = collection(("user", "age", "item", "words"))
    lengths = torch.tensor([1, 1, 0, 1, 1, 1, 2, 0])
    kjt = KeyedJaggedTensor(["user", "age", "item", "words"], torch.tensor([1, 2, 3, 4, 5, 6, 1]), lengths=lengths)
    summed = TwoTower(ebc, [], query_features=["user", "age"], combine="sum")
    query_BD, candidate_BD = summed(kjt)
    bags = ebc.embedding_bags
    assert torch.allclose(query_BD[0], bags["t_user"].weight[1])  # its age bag is empty
    assert torch.allclose(candidate_BD[0], bags["t_item"].weight[4] + bags["t_words"].weight[[6, 1]].sum(0))
    side_by_side = TwoTower(ebc, [3], query_features=["user", "age"])
    assert side_by_side.query_proj(torch.zeros(1, 16)).shape == (1, 3)
    assert side_by_side.candidate_features == ["item", "words"]


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (("user", "age", "item"), {}, "expected two tables"),
        (("user", "item"), {"query_features": ["zip"]}, r"\['zip'\] are not in the collection"),
        (("user", "item"), {"query_features": ["user", "item"]}, "each tower needs a feature"),
        (("user", "item"), {"combine": "mean"}, "combine='mean'"),
    ],
)
def test_bad_towers_are_named(names, options, message):
    with pytest.raises(ValueError, match=message):
        TwoTower(collection(names), [4], **options)


def test_widths_that_cannot_meet_are_named():
    with pytest.raises(ValueError, match="equally wide, got 8 and 4"):
        TwoTower(collection(dims={"item": 4}), [])


def test_retrieval_task_by_hand_with_mixed_negatives():
    torch.manual_seed(1)
    tower = TwoTower(collection(), [])
    items = [4, 7, 4, 9, 7]  # 3 pairs, 2 further negatives: 7 counts twice
    popularity_I = popularity_of(torch.tensor([4, 4, 7, 9, 1]), 12)
    task = RetrievalTrainTask(tower, popularity_I=popularity_I, temperature=0.5, l2=0.1)
    loss, (_, own_B, _) = task(pair_batch([0, 1, 2], items, num_more=2))
    user_BD, item_ID = tower.ebc.embedding_bags["t_user"].weight[:3], tower.ebc.embedding_bags["t_item"].weight
    expected_I = (popularity_I * 3 + 2 / 12).log()
    logits_BN = user_BD @ item_ID[items].T / 0.5 - expected_I[items]
    same_BN = torch.tensor(items[:3])[:, None] == torch.tensor(items)
    by_hand = -logits_BN.log_softmax(1).masked_fill(~same_BN, float("-inf")).logsumexp(1).mean()
    by_hand = by_hand + 0.1 * (user_BD.square() + item_ID[items[:3]].square()).sum(1).mean()
    assert torch.allclose(loss, by_hand, atol=1e-5)
    assert torch.allclose(own_B, (user_BD * item_ID[items[:3]]).sum(1).detach())


def test_rows_without_exactly_one_item_are_named():
    kjt = KeyedJaggedTensor(["user", "item"], torch.tensor([1, 2, 3]), lengths=torch.tensor([1, 1, 1, 0]))
    with pytest.raises(ValueError, match="'item', row 1: expected exactly one id, got 0"):
        RetrievalTrainTask(TwoTower(collection(), []))(Batch(torch.zeros(2, 0), kjt, torch.ones(2)))


def sharded_losses(rank, world_size, group, plan_name):
    torch.manual_seed(3)
    tower = TwoTower(collection(), [8, 4], activation_on_last=False)
    whole = RetrievalTrainTask(copy.deepcopy(tower), popularity_I=torch.full((12,), 1 / 12))
    task = RetrievalTrainTask(tower, popularity_I=torch.full((12,), 1 / 12))
    apply_optimizer_in_backward(torch.optim.SGD, tower.ebc.parameters(), {"lr": 0.5})
    generator = {"t_user": row_wise(), "t_item": row_wise() if plan_name == "row" else table_wise(1)}
    plan = construct_module_sharding_plan(
        tower.ebc, generator, local_size=world_size, world_size=world_size, device_type="cpu"
    )
    sharded = DistributedModelParallel(task, plan=ShardingPlan({"two_tower.ebc": plan}))
    dense = [parameter for name, parameter in sharded.named_parameters() if "proj" in name]
    optimizer, whole_optimizer = torch.optim.SGD(dense, lr=0.5), torch.optim.SGD(whole.parameters(), lr=0.5)
    result = []
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        batches = [
            pair_batch(
                torch.randint(9, (5,), generator=generator).tolist(),
                torch.randint(12, (7,), generator=generator).tolist(),
                num_more=2,
            )
            for _ in range(world_size)
        ]
        loss, _ = sharded(batches[rank])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        alone = [whole(batch)[0] for batch in batches]
        whole_optimizer.zero_grad()
        (sum(alone) / world_size).backward()
        whole_optimizer.step()
        result.append((loss.item(), alone[rank].item()))
    return result


@pytest.mark.ranks
@pytest.mark.parametrize("plan_name", ["row", "mixed"])
def test_sharded_towers_learn_what_one_process_learns(ranks, plan_name):
    for losses in ranks.run(sharded_losses, 2, plan_name):
        for sharded, alone in losses:
            assert sharded == pytest.approx(alone, abs=1e-5)
        assert losses[0][0] != losses[-1][0]
