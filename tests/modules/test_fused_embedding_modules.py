"""Fused collections against the plain ones trained by torch's optimizers."""

import copy

import pytest
import torch
from torch import nn

from recsys_edu.kernels.backend import use_fbgemm
from recsys_edu.modules.embedding_configs import DataType, EmbeddingBagConfig, EmbeddingConfig, PoolingType
from recsys_edu.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from recsys_edu.modules.fused_embedding_modules import (
    FusedEmbeddingBagCollection,
    FusedEmbeddingCollection,
    convert_optimizer_type_and_kwargs,
    fuse_embedding_optimizer,
)
from recsys_edu.optim import LAMB, RowWiseAdagrad, in_backward_optimizer_filter
from recsys_edu.optim.fused_spec import optimizer_spec
from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor

OPTIMIZERS = [
    (torch.optim.SGD, {"lr": 0.3}),
    (torch.optim.Adagrad, {"lr": 0.3}),
    (RowWiseAdagrad, {"lr": 0.3}),
    (torch.optim.Adam, {"lr": 0.1, "betas": (0.8, 0.95)}),
]


def bag_configs() -> list[EmbeddingBagConfig]:
    return [
        EmbeddingBagConfig(5, 4, "t1", feature_names=["f1", "f2"]),
        EmbeddingBagConfig(6, 8, "t2", feature_names=["f2"], pooling=PoolingType.MEAN),
    ]


def sequence_configs() -> list[EmbeddingConfig]:
    return [EmbeddingConfig(5, 4, "t1", feature_names=["f1", "f2"]), EmbeddingConfig(6, 4, "t2", feature_names=["f2"])]


def every_row(weighted: bool = False) -> KeyedJaggedTensor:
    """Touches every row of both tables: then Adam's decay of absent rows makes no difference."""
    return KeyedJaggedTensor(
        keys=["f2", "f1"],
        values=torch.tensor([0, 1, 2, 3, 4, 4, 4, 0]),
        lengths=torch.tensor([3, 3, 0, 2]),
        weights=torch.linspace(0.5, 2, 8) if weighted else None,
    )


@pytest.mark.parametrize("optimizer, arguments", OPTIMIZERS, ids=lambda value: getattr(value, "__name__", ""))
@pytest.mark.parametrize("weighted", [False, True])
def test_three_fused_steps_equal_the_plain_collection(optimizer, arguments, weighted: bool) -> None:
    fused = FusedEmbeddingBagCollection(bag_configs(), optimizer, arguments, is_weighted=weighted)
    plain = EmbeddingBagCollection(bag_configs(), is_weighted=weighted)
    plain.load_state_dict(fused.state_dict())
    stepper = optimizer(plain.parameters(), **arguments)
    features = every_row(weighted)
    for _ in range(3):
        out, expected = fused(features).values(), plain(features).values()
        torch.testing.assert_close(out, expected)
        (out**2).sum().backward()
        stepper.zero_grad()
        (expected**2).sum().backward()
        if optimizer is torch.optim.Adam:  # row 5 of t2 is absent: dense Adam would see a gradient of zero, too
            plain.embedding_bags["t2"].weight.grad[5] = 0
        stepper.step()
    assert list(fused.state_dict()) == list(plain.state_dict())
    for name, weight in fused.state_dict().items():
        torch.testing.assert_close(weight, plain.state_dict()[name], rtol=1e-4, atol=1e-5)
    assert all(parameter.grad is None for parameter in fused.parameters())


@pytest.mark.parametrize("optimizer, arguments", OPTIMIZERS[:3], ids=lambda value: getattr(value, "__name__", ""))
def test_fused_sequences_equal_the_plain_collection(optimizer, arguments) -> None:
    fused = FusedEmbeddingCollection(sequence_configs(), optimizer, arguments, need_indices=True)
    plain = EmbeddingCollection(sequence_configs())
    plain.load_state_dict(fused.state_dict())
    stepper = optimizer(plain.parameters(), **arguments)
    for _ in range(2):
        out, expected = fused(every_row()), plain(every_row())
        assert list(out) == list(expected) and out["f1"].weights().tolist() == [4, 0]
        sum((jagged.values() ** 2).sum() for jagged in out.values()).backward()
        stepper.zero_grad()
        sum((jagged.values() ** 2).sum() for jagged in expected.values()).backward()
        stepper.step()
    for name, weight in fused.state_dict().items():
        torch.testing.assert_close(weight, plain.state_dict()[name], rtol=1e-4, atol=1e-5)
    assert fused.embedding_names_by_table() == [["f1", "f2@t1"], ["f2@t2"]] and fused.embedding_dim() == 4


def test_optimizer_names_state_and_shapes() -> None:
    fused = FusedEmbeddingBagCollection(bag_configs(), torch.optim.Adagrad, {"lr": 0.3})
    state = fused.fused_optimizer().state_dict()["state"]
    assert {name: {key: tuple(t.shape) for key, t in entry.items()} for name, entry in state.items()} == {
        "embedding_bags.t1.weight": {"t1.momentum1": (5, 4)},
        "embedding_bags.t2.weight": {"t2.momentum1": (6, 8)},
    }
    rowwise = FusedEmbeddingCollection(sequence_configs(), RowWiseAdagrad, {"lr": 0.3}).fused_optimizer()
    assert rowwise.state_dict()["state"]["embeddings.t2.weight"]["t2.momentum1"].shape == (6,)
    assert FusedEmbeddingBagCollection(bag_configs(), torch.optim.SGD, {"lr": 1}).fused_optimizer().state_dict() == {
        "state": {}
    }


def test_state_is_live_and_loads_in_place() -> None:
    fused = FusedEmbeddingBagCollection(bag_configs(), torch.optim.Adagrad, {"lr": 0.3})
    fused(every_row()).values().sum().backward()
    saved = copy.deepcopy(fused.fused_optimizer().state_dict())
    assert saved["state"]["embedding_bags.t1.weight"]["t1.momentum1"].sum() > 0
    weights = {name: weight.clone() for name, weight in fused.state_dict().items()}
    fused(every_row()).values().sum().backward()
    after_two = {name: weight.clone() for name, weight in fused.state_dict().items()}
    fused.load_state_dict(weights)
    fused.fused_optimizer().load_state_dict(saved)
    fused(every_row()).values().sum().backward()
    for name, weight in fused.state_dict().items():
        torch.testing.assert_close(weight, after_two[name])


def test_learning_rate_of_the_group_takes_effect() -> None:
    fused = FusedEmbeddingBagCollection(bag_configs(), torch.optim.SGD, {"lr": 0.5})
    before = {name: weight.clone() for name, weight in fused.state_dict().items()}
    group = fused.fused_optimizer().param_groups[0]
    assert group["lr"] == pytest.approx(0.5)
    group["lr"] = 0.0
    fused(every_row()).values().sum().backward()
    assert all(torch.equal(weight, before[name]) for name, weight in fused.state_dict().items())
    group["lr"] = 1.0
    fused(every_row()).values().sum().backward()
    moved = before["embedding_bags.t1.weight"] - fused.state_dict()["embedding_bags.t1.weight"]
    torch.testing.assert_close(moved[:, 0], torch.tensor([2.0, 1.0, 1.0, 1.0, 3.0]))  # how often each id occurs
    scheduler = torch.optim.lr_scheduler.StepLR(fused.fused_optimizer(), step_size=1, gamma=0.1)
    fused.fused_optimizer().step()
    scheduler.step()
    assert group["lr"] == pytest.approx(0.1)


def test_bad_ids_change_nothing() -> None:
    fused = FusedEmbeddingBagCollection(bag_configs(), torch.optim.Adagrad, {"lr": 0.5})
    before = {name: weight.clone() for name, weight in fused.state_dict().items()}
    bad = KeyedJaggedTensor(["f1", "f2"], torch.tensor([1, 7]), lengths=torch.tensor([1, 1]))
    with pytest.raises(IndexError, match=r"'f2'.*7.*'t1'"):
        fused(bad)
    assert all(torch.equal(weight, before[name]) for name, weight in fused.state_dict().items())


def test_mixed_types_use_a_kernel_each() -> None:
    configs = bag_configs()
    configs[0].data_type = DataType.FP16
    fused = FusedEmbeddingBagCollection(configs, torch.optim.SGD, {"lr": 0.5}, is_weighted=True)
    plain = EmbeddingBagCollection(configs, is_weighted=True)
    plain.load_state_dict(fused.state_dict())
    out = fused(every_row(weighted=True))
    assert out.keys() == ["f1", "f2@t1", "f2@t2"]
    torch.testing.assert_close(out.values(), plain(every_row(weighted=True)).values())
    out.values().sum().backward()
    changed = [not torch.equal(w, plain.state_dict()[name]) for name, w in fused.state_dict().items()]
    assert changed == [True, True]
    sequences = sequence_configs()
    sequences[0].data_type = DataType.BF16
    ec = FusedEmbeddingCollection(sequences, torch.optim.SGD, {"lr": 0.5})
    torch.testing.assert_close(
        ec(every_row())["f2@t2"].values(), ec.embeddings["t2"].weight[torch.tensor([0, 1, 2, 3, 4, 4])].detach()
    )


def test_variable_batch() -> None:
    fused = FusedEmbeddingBagCollection(bag_configs(), torch.optim.SGD, {"lr": 0.5})
    vbe = KeyedJaggedTensor(
        keys=["f1", "f2"],
        values=torch.tensor([1, 2, 3]),
        lengths=torch.tensor([1, 1, 1]),
        stride_per_key_per_rank=[[1], [2]],
        inverse_indices=(["f1", "f2"], torch.tensor([[0, 0], [1, 0]])),
    )
    full = KeyedJaggedTensor(["f1", "f2"], torch.tensor([1, 1, 3, 2]), lengths=torch.ones(4, dtype=torch.int64))
    torch.testing.assert_close(fused(vbe).values(), fused(full).values())


def test_meta_then_memory() -> None:
    fused = FusedEmbeddingBagCollection(bag_configs(), torch.optim.SGD, {"lr": 0.5}, device=torch.device("meta"))
    assert list(fused.state_dict()) == ["embedding_bags.t1.weight", "embedding_bags.t2.weight"]
    with pytest.raises(RuntimeError, match=r"meta device.*to_empty"):
        fused(every_row())
    fused.to_empty(device=torch.device("cpu"))
    source = EmbeddingBagCollection(bag_configs())
    fused.load_state_dict(source.state_dict())
    torch.testing.assert_close(fused(every_row()).values(), source(every_row()).values())


def test_copies_train_apart_and_assignment_is_seen() -> None:
    fused = FusedEmbeddingBagCollection(bag_configs(), torch.optim.Adagrad, {"lr": 0.5})
    twin = copy.deepcopy(fused)
    before = fused.state_dict()["embedding_bags.t1.weight"].clone()
    twin(every_row()).values().sum().backward()
    assert torch.equal(fused.state_dict()["embedding_bags.t1.weight"], before)
    assert not torch.equal(twin.state_dict()["embedding_bags.t1.weight"], before)
    assert twin.fused_optimizer().state_dict()["state"]["embedding_bags.t1.weight"]["t1.momentum1"].sum() > 0
    plain = EmbeddingBagCollection(bag_configs())
    fused.load_state_dict(plain.state_dict(), assign=True)
    torch.testing.assert_close(fused(every_row()).values(), plain(every_row()).values())
    group = fused.fused_optimizer().param_groups[0]
    assert group["lr"] == pytest.approx(0.5)
    fused(every_row()).values().sum().backward()  # trains what state_dict shows
    assert not torch.equal(fused.state_dict()["embedding_bags.t1.weight"], plain.embedding_bags["t1"].weight)


def test_weights_assigned_to_the_meta_device_make_the_kernels() -> None:
    plain = EmbeddingBagCollection(bag_configs())
    meta = FusedEmbeddingBagCollection(bag_configs(), torch.optim.SGD, {"lr": 0.5}, device=torch.device("meta"))
    inside = nn.ModuleDict({"tables": meta})
    state = {f"tables.{name}": weight.clone() for name, weight in plain.state_dict().items()}
    inside.load_state_dict(state, assign=True)
    assert meta.device.type == "cpu"
    torch.testing.assert_close(meta(every_row()).values(), plain(every_row()).values())


@pytest.mark.parametrize("name", ["lookup", "optimizer", "device", "lanes", "keys", "type"])
def test_a_table_may_be_called_like_a_method(name: str) -> None:
    config = EmbeddingConfig(5, 4, name, feature_names=["f1"])
    fused = FusedEmbeddingCollection([config], torch.optim.SGD, {"lr": 0.5})
    assert list(fused.state_dict()) == [f"embeddings.{name}.weight"]
    expected = fused.embeddings[name].weight.detach().clone()
    ids = KeyedJaggedTensor(["f1"], torch.arange(5), lengths=torch.tensor([5]))
    torch.testing.assert_close(copy.deepcopy(fused)(ids)["f1"].values(), expected)


def test_parameters_are_marked_as_trained_in_backward() -> None:
    fused = FusedEmbeddingBagCollection(bag_configs(), torch.optim.SGD, {"lr": 0.5})
    model = nn.ModuleDict({"tables": fused, "dense": nn.Linear(2, 1)})
    rest = dict(in_backward_optimizer_filter(model.named_parameters()))
    assert list(rest) == ["dense.weight", "dense.bias"]


def test_fuse_embedding_optimizer_replaces_collections_inside_a_model() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pooled = EmbeddingBagCollection(bag_configs())
            self.inner = nn.ModuleDict({"sequence": EmbeddingCollection(sequence_configs(), need_indices=True)})
            self.dense = nn.Linear(2, 1)

    model = Model()
    names, expected = list(model.state_dict()), model.pooled(every_row()).values()
    fused = fuse_embedding_optimizer(model, torch.optim.SGD, {"lr": 0.5}, torch.device("cpu"))
    assert fused is model and isinstance(model.pooled, FusedEmbeddingBagCollection)
    assert isinstance(model.inner["sequence"], FusedEmbeddingCollection) and model.inner["sequence"].need_indices()
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model.pooled(every_row()).values(), expected)


@pytest.mark.parametrize(
    "optimizer, arguments, message",
    [
        (torch.optim.RMSprop, {"lr": 0.1}, r"no kernel fuses RMSprop.*expected one of"),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, r"SGD cannot do SGD\(momentum=0.9\)"),
        (torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.1}, r"lr_decay=0.1"),
        (torch.optim.Adam, {"amsgrad": True}, r"amsgrad=True"),
        (torch.optim.Adam, {"weight_decay": 0.1}, r"Use torch.optim.AdamW"),
    ],
)
def test_what_cannot_be_fused_is_refused(optimizer, arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FusedEmbeddingBagCollection(bag_configs(), optimizer, arguments)


def test_specs_take_the_classes_own_defaults() -> None:
    assert optimizer_spec(torch.optim.SGD, {}).learning_rate == pytest.approx(1e-3)
    assert optimizer_spec(RowWiseAdagrad, {}).eps == pytest.approx(1e-10)
    adamw = optimizer_spec(torch.optim.AdamW, {"betas": (0.5, 0.6)})
    assert (adamw.kind, adamw.weight_decay, adamw.beta1, adamw.beta2) == ("ADAM", 1e-2, 0.5, 0.6)
    assert optimizer_spec(LAMB, {"learning_rate": 2.0}).learning_rate == 2.0


def test_convert_names_and_arguments() -> None:
    kind, arguments = convert_optimizer_type_and_kwargs(torch.optim.Adam, {"lr": 0.1, "betas": (0.8, 0.9)})
    assert getattr(kind, "name", kind) == "ADAM" and isinstance(kind, str) is (not use_fbgemm())
    assert arguments == {"learning_rate": 0.1, "beta1": 0.8, "beta2": 0.9}
    assert convert_optimizer_type_and_kwargs(LAMB, {}) is None
