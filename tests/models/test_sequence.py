"""SASRec and BERT4Rec: what a position may see, tied embeddings, and the same training on sharded tables."""

import pytest
import torch
import torch.nn.functional as F

from recsys_edu.datasets.utils import Batch
from recsys_edu.distributed import sharding_plan as plans
from recsys_edu.distributed.model_parallel import DistributedModelParallel
from recsys_edu.distributed.simulation import forward_all, simulate
from recsys_edu.distributed.tiled_tensor import TiledTensor
from recsys_edu.distributed.types import ShardingPlan
from recsys_edu.models.sequence import SequenceTrainTask, bert4rec, sasrec
from recsys_edu.retrieval.sequences import cloze_batch, next_item_batch
from recsys_edu.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

NUM_ITEMS, DIM = 12, 8
SHARDINGS = {
    "table_wise": lambda: plans.table_wise(rank=1),
    "row_wise": plans.row_wise,
    "column_wise": lambda: plans.column_wise(ranks=[1, 0]),
    "data_parallel": plans.data_parallel,
}


def features_of(rows, candidates=range(NUM_ITEMS)):
    values = [item for row in rows for item in row] + list(candidates)
    lengths = [len(row) for row in rows] + [len(list(candidates))] + [0] * (len(rows) - 1)
    return KeyedJaggedTensor.from_lengths_sync(["history", "candidate"], torch.tensor(values), torch.tensor(lengths))


def model_of(make=sasrec, **changes):
    torch.manual_seed(0)
    return make(**{"num_items": NUM_ITEMS, "dim": DIM, "max_length": 6, "dropout": 0.0} | changes)


def test_a_later_item_changes_only_sasrecs_later_positions():
    for make, sees_later in ((sasrec, False), (bert4rec, True)):
        model = model_of(make)
        before, after = (model(features_of([row, [5]]))[0].values() for row in ([1, 2, 3], [1, 2, 4]))
        assert torch.allclose(before[:2], after[:2]) != sees_later
        assert not torch.allclose(before[2], after[2])
        assert torch.equal(before[3], after[3])  # the other row


def test_order_matters():
    model = model_of()
    first, second = (model(features_of([row]))[0].values()[-1] for row in ([1, 2, 3], [2, 1, 3]))
    assert not torch.allclose(first, second)


def test_equals_padded_transformer_layers():
    """The same numbers from torch.nn's padded layers with the same weights."""
    model = model_of(num_blocks=1)
    block = model.blocks[0]
    rows = [[1, 2, 3, 4], [], [7, 7]]
    hidden = model(features_of(rows))[0].to_dense()
    table = model.embedding_collection.embeddings["item"].weight
    for row, got in zip(rows, hidden):
        if not row:
            assert got.shape == (0, DIM)
            continue
        x = (table[row] + model.position.weight[: len(row)])[None]
        attended, _ = F.multi_head_attention_forward(
            *[block.attention_norm(x).transpose(0, 1)] * 3, DIM, 2, block.attention.in_proj.weight,
            block.attention.in_proj.bias, None, None, False, 0.0, block.attention.out_proj.weight,
            block.attention.out_proj.bias, need_weights=False,
            attn_mask=torch.nn.Transformer.generate_square_subsequent_mask(len(row)),
        )  # fmt: skip
        x = x + attended.transpose(0, 1)
        x = x + block.network(block.network_norm(x))
        torch.testing.assert_close(got, model.norm(x)[0], rtol=1e-4, atol=1e-5)


def test_loss_is_the_mean_over_labels_and_tied_rows_get_both_gradients():
    task = SequenceTrainTask(model_of())
    features = features_of([[1, 2], [3]])
    labels = torch.tensor([2, -100, 4])
    loss, (_, logits_MC, labels_M) = task(Batch(torch.zeros(2, 0), features, labels))
    assert logits_MC.shape == (2, NUM_ITEMS) and labels_M.tolist() == [2, 4]
    torch.testing.assert_close(loss, F.cross_entropy(logits_MC, labels_M))
    loss.backward()
    gradient = task.model.embedding_collection.embeddings["item"].weight.grad
    assert (gradient.abs().sum(1) > 0).all()  # every item is a candidate
    nothing, _ = task(Batch(torch.zeros(2, 0), features, torch.full((3,), -100)))
    assert nothing == 0
    nothing.backward()


def test_rows_that_are_too_long_are_refused():
    with pytest.raises(ValueError, match="7 items, the model was made for at most 6"):
        model_of()(features_of([[1] * 7]))


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("make", [sasrec, bert4rec])
def test_simulated_ranks_answer_as_one(make, sharding):
    model = model_of(make)
    collection = model.embedding_collection
    plan = plans.construct_module_sharding_plan(
        collection, {"item": SHARDINGS[sharding]()}, local_size=2, world_size=2, device_type="cpu"
    )
    batches = [features_of([[1, 2, 3], []]), features_of([[4], [5, 6]])]
    for answer, batch in zip(forward_all(simulate(collection, plan, world_size=2), batches), batches):
        hidden, candidates = model(batch)
        torch.testing.assert_close(model.encode(answer["history"]).values(), hidden.values())
        assert torch.equal(answer["candidate"].values(), candidates)


def batch_of(kind: str, rank: int) -> Batch:
    """Two users on each of two ranks; every rank has equally many labels, so that means of means are means."""
    rows = [[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 0]][2 * rank : 2 * rank + 2]
    sequences = JaggedTensor.from_dense([torch.tensor(row) for row in rows])
    generator = torch.Generator().manual_seed(0)
    if kind == "sasrec":
        return next_item_batch(sequences, torch.arange(2), NUM_ITEMS, 6, generator)
    return cloze_batch(sequences, torch.arange(2), NUM_ITEMS, 6, 0.5, generator)


def train_on_ranks(rank: int, world_size: int, group, kind: str, sharding: str) -> dict:
    task = SequenceTrainTask(model_of({"sasrec": sasrec, "bert4rec": bert4rec}[kind]))
    path = "model.embedding_collection"
    plan = plans.construct_module_sharding_plan(
        task.get_submodule(path), {"item": SHARDINGS[sharding]()}, local_size=2, world_size=2, device_type="cpu"
    )
    dmp = DistributedModelParallel(task, plan=ShardingPlan({path: plan}))
    losses = steps(dmp, lambda: dmp(batch_of(kind, rank)))
    state = dmp.state_dict()
    table = state[f"{path}.embeddings.item.weight"]
    tiles = [(t.offsets, t.tensor.clone()) for t in table.tiles] if isinstance(table, TiledTensor) else [
        ((0, 0), table.detach().clone())
    ]  # fmt: skip
    return {"losses": losses, "tiles": tiles, "dense": state["model.position.weight"].detach().clone()}


def steps(model, forward) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss, _ = forward()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.ranks
@pytest.mark.parametrize(("kind", "sharding"), [("sasrec", "row_wise"), ("sasrec", "column_wise"),
                                                ("bert4rec", "table_wise"), ("sasrec", "data_parallel")])  # fmt: skip
def test_two_ranks_train_as_one_process(ranks, kind, sharding):
    results = ranks.run(train_on_ranks, 2, kind, sharding)
    single = SequenceTrainTask(model_of({"sasrec": sasrec, "bert4rec": bert4rec}[kind]))
    batches = [batch_of(kind, rank) for rank in range(2)]

    def both():
        parts = [single(batch) for batch in batches]
        assert len({len(labels) for _, (_, _, labels) in parts}) == 1
        return sum(loss for loss, _ in parts) / 2, None

    losses = steps(single, both)
    mean = torch.tensor([result["losses"] for result in results]).mean(0)
    torch.testing.assert_close(mean, torch.tensor(losses), rtol=1e-4, atol=1e-5)
    assert losses[-1] < losses[0]
    table = single.model.embedding_collection.embeddings["item"].weight.detach()
    for result in results:
        torch.testing.assert_close(result["dense"], single.model.position.weight.detach(), rtol=1e-4, atol=1e-5)
        for (row, column), tile in result["tiles"]:
            whole = table[row : row + tile.size(0), column : column + tile.size(1)]
            torch.testing.assert_close(tile, whole, rtol=1e-4, atol=1e-5)
