"""The same weights in TorchRec and here: the same outputs, gradients, names and training."""

# ruff: noqa: E402 -- what needs torchrec is imported after the skip

import pytest
import torch

torchrec = pytest.importorskip("torchrec")

from torchrec.datasets.utils import Batch as TheirBatch
from torchrec.distributed.test_utils.model_input import ModelInput as TheirInput
from torchrec.models import deepfm as their_deepfm
from torchrec.models import dlrm as their_dlrm
from torchrec.modules import crossnet as their_crossnet
from torchrec.modules.mlp import MLP as TheirMLP
from torchrec.optim.clipping import GradientClipping as TheirClipping
from torchrec.optim.clipping import GradientClippingOptimizer as TheirClippingOptimizer
from torchrec.optim.keyed import CombinedOptimizer as TheirCombined
from torchrec.optim.keyed import KeyedOptimizerWrapper as TheirWrapper
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad as TheirRowWiseAdagrad
from torchrec.optim.warmup import WarmupOptimizer as TheirWarmup
from torchrec.optim.warmup import WarmupPolicy as TheirPolicy
from torchrec.optim.warmup import WarmupStage as TheirStage

import recsys_edu
from recsys_edu.datasets.utils import Batch
from recsys_edu.models import deepfm, dlrm
from recsys_edu.models.model_input import ModelInput
from recsys_edu.modules import crossnet
from recsys_edu.modules.mlp import MLP
from recsys_edu.optim import CombinedOptimizer, KeyedOptimizerWrapper, RowWiseAdagrad
from recsys_edu.optim.clipping import GradientClipping, GradientClippingOptimizer
from recsys_edu.optim.warmup import WarmupOptimizer, WarmupPolicy, WarmupStage

FEATURES = ["f1", "f2", "f3"]


@pytest.fixture(autouse=True)
def _seed_and_one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def tables(package, mean: bool = False, data_type: str = "FP32", shared: bool = True) -> list:
    pooling = package.PoolingType.MEAN if mean else package.PoolingType.SUM
    return [
        package.EmbeddingBagConfig(
            num_embeddings=10 + i,
            embedding_dim=8,
            name=f"t{i}",
            feature_names=names,
            pooling=pooling,
            data_type=package.DataType(data_type),
        )
        for i, names in enumerate([["f1", "f2"], ["f2"], ["f3"]] if shared else [["f1", "f2"], ["f3"]])
    ]


def both_kjts(batch_size: int = 6, weighted: bool = False) -> tuple:
    lengths = torch.randint(0, 4, (len(FEATURES) * batch_size,))
    values = torch.randint(0, 10, (int(lengths.sum()),))
    weights = torch.rand(values.numel()) if weighted else None
    arguments = {"keys": ["f3", "f1", "f2"], "values": values, "lengths": lengths, "weights": weights}
    return recsys_edu.KeyedJaggedTensor(**arguments), torchrec.KeyedJaggedTensor(**arguments)


def with_their_weights(ours: torch.nn.Module, theirs: torch.nn.Module) -> torch.nn.Module:
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    return ours


def assert_same_parameters(ours: torch.nn.Module, theirs: torch.nn.Module, gradients: bool = False) -> None:
    for (name, own), (their_name, their) in zip(ours.named_parameters(), theirs.named_parameters()):
        assert name == their_name
        torch.testing.assert_close(own.grad if gradients else own, their.grad if gradients else their)


@pytest.mark.parametrize(
    "weighted, mean, data_type",
    [(False, False, "FP32"), (False, True, "FP32"), (True, False, "FP32"), (False, False, "FP16")],
)
def test_embedding_bag_collection(weighted: bool, mean: bool, data_type: str) -> None:
    theirs = torchrec.EmbeddingBagCollection(tables(torchrec, mean, data_type), is_weighted=weighted)
    ours = recsys_edu.EmbeddingBagCollection(tables(recsys_edu, mean, data_type), is_weighted=weighted)
    with_their_weights(ours, theirs)
    own_kjt, their_kjt = both_kjts(weighted=weighted)
    out, expected = ours(own_kjt), theirs(their_kjt)
    assert out.keys() == expected.keys() and out.length_per_key() == expected.length_per_key()
    tolerance = {"rtol": 1e-2, "atol": 1e-3} if data_type == "FP16" else {}  # TorchRec rounds sums to the table's type
    torch.testing.assert_close(out.values(), expected.values(), **tolerance)
    if data_type == "FP32":
        upstream = torch.randn_like(out.values())
        (out.values() * upstream).sum().backward(), (expected.values() * upstream).sum().backward()
        assert_same_parameters(ours, theirs, gradients=True)


def test_embedding_bag_collection_with_variable_batch() -> None:
    theirs = torchrec.EmbeddingBagCollection(tables(torchrec))
    ours = with_their_weights(recsys_edu.EmbeddingBagCollection(tables(recsys_edu)), theirs)
    arguments = {
        "keys": FEATURES,
        "values": torch.tensor([1, 2, 3, 4, 5, 6]),
        "lengths": torch.tensor([1, 0, 2, 1, 1, 1]),
        "stride_per_key_per_rank": [[2], [1], [3]],
        "inverse_indices": (FEATURES, torch.tensor([[0, 1, 0], [0, 0, 0], [2, 1, 0]])),
    }
    out = ours(recsys_edu.KeyedJaggedTensor(**arguments))
    torch.testing.assert_close(out.values(), theirs(torchrec.KeyedJaggedTensor(**arguments)).values())


def test_embedding_collection() -> None:
    def configs(package) -> list:
        return [
            package.EmbeddingConfig(num_embeddings=10, embedding_dim=8, name=f"t{i}", feature_names=names)
            for i, names in enumerate([["f1", "f2"], ["f2", "f3"]])
        ]

    theirs = torchrec.EmbeddingCollection(configs(torchrec), need_indices=True)
    ours = with_their_weights(recsys_edu.EmbeddingCollection(configs(recsys_edu), need_indices=True), theirs)
    own_kjt, their_kjt = both_kjts()
    out, expected = ours(own_kjt), theirs(their_kjt)
    assert list(out) == list(expected)
    for name, jagged in expected.items():
        torch.testing.assert_close(out[name].values(), jagged.values())
        assert torch.equal(out[name].lengths(), jagged.lengths())
        assert torch.equal(out[name].weights(), jagged.weights())
    sum((jt.values() ** 2).sum() for jt in out.values()).backward()
    sum((jt.values() ** 2).sum() for jt in expected.values()).backward()
    assert_same_parameters(ours, theirs, gradients=True)


def dlrm_pair(kind: str) -> tuple:
    extra = {"DLRM": [], "DLRM_DCN": [2, 3], "DLRM_Projection": [[16], [8]]}[kind]
    sizes = [5, [16, 8], [12, 1]]
    theirs = getattr(their_dlrm, kind)(torchrec.EmbeddingBagCollection(tables(torchrec, shared=False)), *sizes, *extra)
    ours = getattr(dlrm, kind)(recsys_edu.EmbeddingBagCollection(tables(recsys_edu, shared=False)), *sizes, *extra)
    return with_their_weights(dlrm.DLRMTrain(ours), their_dlrm.DLRMTrain(theirs)), their_dlrm.DLRMTrain(theirs)


@pytest.mark.parametrize("kind", ["DLRM", "DLRM_DCN", "DLRM_Projection"])
def test_five_steps_of_dlrm(kind: str) -> None:
    ours, theirs = dlrm_pair(kind)
    steppers = [torch.optim.Adagrad(model.parameters(), lr=0.05) for model in (ours, theirs)]
    for _ in range(5):
        own_kjt, their_kjt = both_kjts(16)
        dense, labels = torch.randn(16, 5), torch.randint(0, 2, (16,))
        loss, (_, logits, _) = ours(Batch(dense, own_kjt, labels))
        their_loss, (_, their_logits, _) = theirs(TheirBatch(dense, their_kjt, labels))
        torch.testing.assert_close(logits, their_logits)
        torch.testing.assert_close(loss, their_loss)
        for stepper, value in zip(steppers, (loss, their_loss)):
            stepper.zero_grad()
            value.backward()
            stepper.step()
    assert_same_parameters(ours, theirs)


def test_wrapped_models() -> None:
    own_kjt, their_kjt = both_kjts(16)
    dense, labels = torch.randn(16, 5), torch.randint(0, 2, (16,)).float()
    for kind, mine, their, arguments in (
        ("DLRMWrapper", dlrm, their_dlrm, lambda ebc: (ebc, 5, [16, 8], [12, 1])),
        ("SimpleDeepFMNNWrapper", deepfm, their_deepfm, lambda ebc: (5, ebc, 8, 6)),
    ):
        theirs = getattr(their, kind)(*arguments(torchrec.EmbeddingBagCollection(tables(torchrec, shared=False))))
        ours = getattr(mine, kind)(*arguments(recsys_edu.EmbeddingBagCollection(tables(recsys_edu, shared=False))))
        with_their_weights(ours, theirs)
        own_input, their_input = ModelInput(dense, own_kjt, None, labels), TheirInput(dense, their_kjt, None, labels)
        (loss, prediction), (their_loss, their_prediction) = ours(own_input), theirs(their_input)
        torch.testing.assert_close(prediction, their_prediction)
        if kind == "DLRMWrapper":  # TorchRec's DeepFM takes its probabilities for logits
            torch.testing.assert_close(loss, their_loss)
        torch.testing.assert_close(ours.eval()(own_input), theirs.eval()(their_input))


@pytest.mark.parametrize(
    "arguments",
    [{}, {"bias": False}, {"activation": "sigmoid"}, {"activation": "swish_layernorm"}, {"activation_on_last": False}],
)
def test_mlp(arguments: dict) -> None:
    theirs = TheirMLP(3, [4, 2], **arguments)
    ours = with_their_weights(MLP(3, [4, 2], **arguments), theirs)
    x = torch.randn(5, 3)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("CrossNet", {}),
        ("LowRankCrossNet", {"low_rank": 2}),
        ("VectorCrossNet", {}),
        ("LowRankMixtureCrossNet", {"num_experts": 3, "low_rank": 2}),
        ("LowRankMixtureCrossNet", {"num_experts": 1, "low_rank": 2, "activation": torch.sigmoid}),
    ],
)
def test_crossnets(name: str, arguments: dict) -> None:
    theirs = getattr(their_crossnet, name)(5, 3, **arguments)
    for parameter in theirs.parameters():
        parameter.data.normal_(std=0.3)
    ours = with_their_weights(getattr(crossnet, name)(5, 3, **arguments), theirs)
    x = torch.randn(4, 5)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("arguments", [{}, {"lr_decay": 0.1, "weight_decay": 0.01, "initial_accumulator_value": 0.5}])
def test_rowwise_adagrad(arguments: dict) -> None:
    weights = [torch.nn.Parameter(torch.arange(1.0, 7.0).view(3, 2)) for _ in range(2)]
    optimizers = [
        cls([weight], lr=0.1, **arguments) for cls, weight in zip((RowWiseAdagrad, TheirRowWiseAdagrad), weights)
    ]
    for _ in range(3):
        for optimizer, weight in zip(optimizers, weights):
            optimizer.zero_grad()
            (weight**2).sum().backward()
            optimizer.step()
    torch.testing.assert_close(*weights)
    own, their = (optimizer.state_dict()["state"][0] for optimizer in optimizers)
    assert own.keys() == their.keys()
    torch.testing.assert_close(own["sum"], their["sum"])


def test_keyed_state_dicts_load_into_each_other() -> None:
    def make(wrapper, combined):
        params = {name: torch.nn.Parameter(torch.ones(2)) for name in ("a", "b")}
        parts = [("k", wrapper({"a": params["a"]}, lambda p: torch.optim.Adam(p, lr=0.1)))]
        parts.append(wrapper({"b": params["b"]}, lambda p: torch.optim.Adagrad(p, lr=0.1)))
        optimizer = combined(parts)
        optimizer.save_param_groups(True)
        optimizer.init_state()
        sum((p * torch.tensor([1.0, 2.0])).sum() for p in params.values()).backward()
        optimizer.step()
        return optimizer

    ours, theirs = make(KeyedOptimizerWrapper, CombinedOptimizer), make(TheirWrapper, TheirCombined)
    own, their = ours.state_dict(), theirs.state_dict()
    assert own["param_groups"] == their["param_groups"]
    assert {name: sorted(entry) for name, entry in own["state"].items()} == {
        name: sorted(entry) for name, entry in their["state"].items()
    }
    for name, entry in their["state"].items():
        for key, value in entry.items():
            torch.testing.assert_close(own["state"][name][key], value)
    ours.load_state_dict(their)
    theirs.load_state_dict(own)


STAGES = [
    [("LINEAR", 4, 0.1, {}), ("POLY", 8, 2.0, {"decay_iters": 20, "lr_scale": 0.5})],
    [("STEP", 5, 0.5, {"decay_iters": 2}), ("INVSQRT", 8, 1.0, {})],
    [("COSINE_ANNEALING_WARM_RESTARTS", 5, 0.2, {"sgdr_period": 3})],
    [("CONSTANT", 2, 0.3, {}), ("INTERPOLATE", 6, 0.2, {"start_interpolating_iters": 3, "end_value": 0.8})],
    [("NONE", 3, 1.0, {"lr_scale": 3.0}), ("POLY", 8, 2.0, {})],
    [("STEP", 5, 0.5, {})],
]


@pytest.mark.parametrize("stages", STAGES)
def test_warmup_rates(stages: list) -> None:
    def rates(optimizer_class, wrapper, stage_class, policy) -> list[float]:
        made = [stage_class(policy[name], max_iters=end, value=value, **rest) for name, end, value, rest in stages]
        inner = wrapper({"w": torch.nn.Parameter(torch.ones(1))}, lambda p: torch.optim.SGD(p, lr=0.1))
        optimizer = optimizer_class(inner, made, lr=2.0)
        seen = [optimizer.param_groups[0]["lr"]]
        for _ in range(11):
            optimizer.step()
            seen.append(optimizer.param_groups[0]["lr"])
        assert optimizer.state_dict()["state"]["__warmup"]["warmup"][0] == 11
        return seen

    ours = rates(WarmupOptimizer, KeyedOptimizerWrapper, WarmupStage, WarmupPolicy)
    assert ours == pytest.approx(rates(TheirWarmup, TheirWrapper, TheirStage, TheirPolicy))


@pytest.mark.parametrize("kind", ["NORM", "VALUE", "NONE"])
def test_clipping(kind: str) -> None:
    def moved(optimizer_class, wrapper, clipping) -> torch.Tensor:
        weight = torch.nn.Parameter(torch.zeros(3))
        inner = wrapper({"w": weight}, lambda p: torch.optim.SGD(p, lr=1.0))
        weight.grad = torch.tensor([3.0, -4.0, 0.1])
        optimizer_class(inner, clipping[kind], max_gradient=0.5).step()
        return weight.detach()

    ours = moved(GradientClippingOptimizer, KeyedOptimizerWrapper, GradientClipping)
    torch.testing.assert_close(ours, moved(TheirClippingOptimizer, TheirWrapper, TheirClipping))


def test_deepfm() -> None:
    from torchrec.models.deepfm import SimpleDeepFMNN as TheirDeepFM

    from recsys_edu.models.deepfm import SimpleDeepFMNN

    theirs = TheirDeepFM(5, torchrec.EmbeddingBagCollection(tables(torchrec, shared=False)), 6, 7)
    ours = SimpleDeepFMNN(5, recsys_edu.EmbeddingBagCollection(tables(recsys_edu, shared=False)), 6, 7)
    with_their_weights(ours, theirs)
    own_kjt, their_kjt = both_kjts()
    dense = torch.randn(6, 5)
    out, expected = ours(dense, own_kjt), theirs(dense, their_kjt)
    torch.testing.assert_close(out, expected)
    out.sum().backward(), expected.sum().backward()
    assert_same_parameters(ours, theirs, gradients=True)
