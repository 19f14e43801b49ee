"""MLP, activation, cross networks and the builders in utils."""

import pytest
import torch
from torch import nn

from recsys_edu.modules.activation import SwishLayerNorm
from recsys_edu.modules.crossnet import CrossNet, LowRankCrossNet, LowRankMixtureCrossNet, VectorCrossNet
from recsys_edu.modules.mlp import MLP, Perceptron
from recsys_edu.modules.utils import (
    check_module_output_dimension,
    construct_modulelist_from_single_module,
    convert_list_of_modules_to_modulelist,
    extract_module_or_tensor_callable,
    get_module_output_dimension,
)


def test_perceptron_and_mlp_by_hand() -> None:
    mlp = MLP(3, [4, 2], activation=torch.tanh)
    x = torch.randn(5, 3)
    first, second = mlp._mlp[0]._linear, mlp._mlp[1]._linear
    torch.testing.assert_close(mlp(x), torch.tanh(second(torch.tanh(first(x)))))
    assert Perceptron(3, 2, bias=False)._linear.bias is None


@pytest.mark.parametrize(
    "activation, layer",
    [
        ("relu", torch.relu),
        ("sigmoid", torch.sigmoid),
        ("tanh", torch.tanh),
        (nn.ReLU, nn.ReLU),
        (lambda: nn.Tanh(), nn.Tanh),
        ("swish_layernorm", SwishLayerNorm),
    ],
)
def test_activations(activation, layer) -> None:
    mlp = MLP(3, [4, 2], activation=activation)
    functions = [perceptron._activation_fn for perceptron in mlp._mlp]
    if isinstance(layer, type):
        assert all(isinstance(function, layer) for function in functions) and functions[0] is not functions[1]
    else:
        assert functions == [layer, layer]


def test_mlp_edges() -> None:
    linear_end = MLP(3, [4, 2], activation_on_last=False)
    assert list(linear_end.state_dict())[-1] == "_mlp.1._linear.bias"
    assert bool((linear_end(torch.randn(64, 3)) < 0).any())
    assert MLP(3, [])(torch.ones(2, 3)).tolist() == [[1.0] * 3] * 2
    with pytest.raises(ValueError, match=r"unknown activation 'rleu'.*swish_layernorm"):
        MLP(3, [4], activation="rleu")
    double = MLP(3, [4], dtype=torch.float64, device=torch.device("meta"))
    assert {(p.dtype, p.device.type) for p in double.parameters()} == {(torch.float64, "meta")}


def test_swish_layer_norm() -> None:
    x = torch.randn(2, 3, 4)
    norm = SwishLayerNorm([3, 4])
    torch.testing.assert_close(norm(x), x * torch.sigmoid(nn.functional.layer_norm(x, [3, 4])))
    assert list(norm.state_dict()) == ["norm.0.weight", "norm.0.bias"]
    torch.testing.assert_close(torch.jit.script(norm)(x), norm(x))


def test_cross_networks_by_hand() -> None:
    x = torch.randn(3, 5)
    full = CrossNet(5, 2)
    out = x
    for kernel, bias in zip(full.kernels, full.bias):
        bias.data.normal_()
        out = torch.stack([x[b] * (kernel @ out[b] + bias[:, 0]) + out[b] for b in range(3)])
    torch.testing.assert_close(full(x), out)
    low = LowRankCrossNet(5, 2, low_rank=2)
    same = CrossNet(5, 2)
    for kernel, w, v in zip(same.kernels, low.W_kernels, low.V_kernels):
        kernel.data = w.data @ v.data
    torch.testing.assert_close(low(x), same(x))
    vector = VectorCrossNet(5, 1)
    vector.bias[0].data.normal_()
    by_hand = x * (x @ vector.kernels[0]) + vector.bias[0][:, 0] + x
    torch.testing.assert_close(vector(x), by_hand)


def test_mixture_of_one_linear_expert_is_a_low_rank_network() -> None:
    x = torch.randn(3, 5)
    mixture = LowRankMixtureCrossNet(5, 1, num_experts=1, low_rank=2, activation=nn.Identity())
    u, v, c = mixture.U_kernels[0][0], mixture.V_kernels[0][0], mixture.C_kernels[0][0]
    torch.testing.assert_close(mixture(x), x * (x @ (u @ c @ v).t()) + x)
    assert len(mixture.gates) == 0 and len(LowRankMixtureCrossNet(5, 1, num_experts=3).gates) == 3
    assert LowRankMixtureCrossNet(5, 2, num_experts=3, low_rank=2)(x).shape == (3, 5)
    for make in (lambda: LowRankCrossNet(5, 1, 0), lambda: LowRankMixtureCrossNet(5, 1, num_experts=0)):
        with pytest.raises(AssertionError, match="at least 1"):
            make()


def test_builders() -> None:
    assert extract_module_or_tensor_callable(torch.relu) is torch.relu
    with pytest.raises(ValueError, match=r"torch.nn.Module, got <class 'int'>"):
        extract_module_or_tensor_callable(lambda: 3)
    assert get_module_output_dimension(nn.Linear(3, 5), 3) == 5
    assert check_module_output_dimension(nn.ModuleList([nn.Linear(3, 5), nn.Linear(3, 5)]), 3, 5)
    assert not check_module_output_dimension(nn.Linear(3, 4), 3, 5)
    nested = construct_modulelist_from_single_module(nn.Linear(2, 2), (2, 3))
    assert [len(inner) for inner in nested] == [3, 3]
    assert not torch.equal(nested[0][0].weight, nested[1][2].weight) and bool((nested[0][0].bias == 0).all())
    layer = nn.Linear(2, 2)
    assert convert_list_of_modules_to_modulelist([layer], (1,))[0] is layer
    with pytest.raises(AssertionError, match="got 1 modules"):
        convert_list_of_modules_to_modulelist([layer], (2,))
