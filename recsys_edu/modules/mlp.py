"""The dense half of a recommender: Linear layers with an activation between them."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import nn

from recsys_edu.modules.activation import SwishLayerNorm
from recsys_edu.modules.utils import extract_module_or_tensor_callable

ActivationLike = str | Callable[[], nn.Module] | nn.Module | Callable[[torch.Tensor], torch.Tensor]


class Perceptron(nn.Module):
    """One Linear layer and its activation.

    >>> Perceptron(3, 2, activation=torch.tanh)(torch.zeros(5, 3)).shape
    torch.Size([5, 2])

    `activation` is a module or a function of one tensor. Shapes: `[B, in_size]` to `[B, out_size]`.
    The layer is the child `_linear`.

    Counterpart: torchrec.modules.mlp.Perceptron.
    """

    def __init__(
        self,
        in_size: int,
        out_size: int,
        bias: bool = True,
        activation: nn.Module | Callable[[torch.Tensor], torch.Tensor] = torch.relu,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self._out_size = out_size
        self._in_size = in_size
        self._linear = nn.Linear(in_size, out_size, bias=bias, device=device, dtype=dtype)
        self._activation_fn = activation

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        output = self._linear(input)
        if self._activation_fn is torch.relu:  # in the layer's own memory, which nobody else reads: 2% of a DLRM step
            return torch.relu_(output)
        return self._activation_fn(output)


class MLP(nn.Module):
    """A stack of Perceptrons, `in_size -> layer_sizes[0] -> layer_sizes[1] -> ...`.

    >>> MLP(13, [512, 256, 64])(torch.zeros(2, 13)).shape
    torch.Size([2, 64])

    `activation` is a function of one tensor, a module, a class or factory of modules (called once per
    layer), or one of the names relu, sigmoid, tanh, swish_layernorm (of each layer's size).
    `activation_on_last=False` leaves the last layer linear. No layers: the input comes back unchanged.
    state_dict keys are `_mlp.<layer>._linear.weight` and `.bias`.

    Raises:
        ValueError: an unknown activation name.

    Counterpart: torchrec.modules.mlp.MLP.
    """

    def __init__(
        self,
        in_size: int,
        layer_sizes: list[int],
        bias: bool = True,
        activation: ActivationLike = torch.relu,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        activation_on_last: bool = True,
    ) -> None:
        super().__init__()
        sizes = [in_size, *layer_sizes]
        layers: list[nn.Module] = []
        for index, (layer_in, layer_out) in enumerate(itertools.pairwise(sizes)):
            is_linear = index == len(layer_sizes) - 1 and not activation_on_last
            layer_activation = nn.Identity() if is_linear else _make_activation(activation, layer_out, device)
            layers.append(Perceptron(layer_in, layer_out, bias, layer_activation, device, dtype))
        self._mlp = nn.Sequential(*layers)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._mlp(input)


def _make_activation(
    activation: ActivationLike, size: int, device: torch.device | None
) -> nn.Module | Callable[[torch.Tensor], torch.Tensor]:
    """The activation of one layer of `size` outputs."""
    if not isinstance(activation, str):
        return extract_module_or_tensor_callable(activation)
    functions = {"relu": torch.relu, "sigmoid": torch.sigmoid, "tanh": torch.tanh}
    if activation == "swish_layernorm":
        return SwishLayerNorm(size, device=device)
    if activation not in functions:
        raise ValueError(
            f"unknown activation {activation!r}; expected one of {', '.join([*functions, 'swish_layernorm'])}, "
            "a module or a function"
        )
    return functions[activation]
