"""Cross networks: layers that multiply features with each other instead of only adding them up.

Each layer computes x_{l+1} = x_0 * (something linear in x_l) + x_l, so L layers reach products of L + 1
inputs. The classes differ in how much the linear part costs for N inputs: N^2, 2 N r, N parameters.

Shapes: B batch, N inputs, r rank, E experts. All take and return `[B, N]`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


class CrossNet(nn.Module):
    """x_{l+1} = x_0 * (W_l x_l + b_l) + x_l, with a full N x N matrix per layer (DCN v2, arXiv:2008.13535).

    Parameters: `kernels.<l>` [N, N], Xavier-normal; `bias.<l>` [N, 1], zero.

    Counterpart: torchrec.modules.crossnet.CrossNet.
    """

    def __init__(self, in_features: int, num_layers: int) -> None:
        super().__init__()
        self._num_layers = num_layers
        self.kernels = nn.ParameterList(_xavier(in_features, in_features) for _ in range(num_layers))
        self.bias = nn.ParameterList(nn.Parameter(torch.zeros(in_features, 1)) for _ in range(num_layers))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        x = input
        for kernel_NN, bias_N1 in zip(self.kernels, self.bias):
            x = input * (x @ kernel_NN.t() + bias_N1.squeeze(1)) + x
        return x


class LowRankCrossNet(nn.Module):
    """x_{l+1} = x_0 * (W_l (V_l x_l) + b_l) + x_l: the N x N matrix as a product of two thin ones.

    Parameters: `W_kernels.<l>` [N, r], `V_kernels.<l>` [r, N], Xavier-normal; `bias.<l>` [N], zero.

    Raises:
        AssertionError: `low_rank` below 1.

    Counterpart: torchrec.modules.crossnet.LowRankCrossNet.
    """

    def __init__(self, in_features: int, num_layers: int, low_rank: int = 1) -> None:
        super().__init__()
        assert low_rank >= 1, f"low_rank must be at least 1, got {low_rank}"
        self._num_layers = num_layers
        self._low_rank = low_rank
        self.W_kernels = nn.ParameterList(_xavier(in_features, low_rank) for _ in range(num_layers))
        self.V_kernels = nn.ParameterList(_xavier(low_rank, in_features) for _ in range(num_layers))
        self.bias = nn.ParameterList(nn.Parameter(torch.zeros(in_features)) for _ in range(num_layers))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        x = input
        for w_Nr, v_rN, bias_N in zip(self.W_kernels, self.V_kernels, self.bias):
            x = input * (x @ v_rN.t() @ w_Nr.t() + bias_N) + x
        return x


class VectorCrossNet(nn.Module):
    """x_{l+1} = x_0 * (w_l . x_l) + b_l + x_l: one number per layer and example scales x_0 (DCN, arXiv:1708.05123).

    Parameters: `kernels.<l>` [N, 1], Xavier-normal; `bias.<l>` [N, 1], zero.

    Counterpart: torchrec.modules.crossnet.VectorCrossNet.
    """

    def __init__(self, in_features: int, num_layers: int) -> None:
        super().__init__()
        self._num_layers = num_layers
        self.kernels = nn.ParameterList(_xavier(in_features, 1) for _ in range(num_layers))
        self.bias = nn.ParameterList(nn.Parameter(torch.zeros(in_features, 1)) for _ in range(num_layers))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        x = input
        for kernel_N1, bias_N1 in zip(self.kernels, self.bias):
            x = input * (x @ kernel_N1) + bias_N1.squeeze(1) + x
        return x


class LowRankMixtureCrossNet(nn.Module):
    """A softmax-gated mixture of low-rank experts, each with a nonlinearity in its low-rank space.

        expert e:   x_0 * (U_e g(C_e g(V_e x_l)) + b_l)           g: `activation`
        x_{l+1}  =  sum over e of gate_e(x_l) * expert_e + x_l    one expert: no gate

    Parameters: `U_kernels.<l>` [E, N, r], `V_kernels.<l>` [E, r, N], `C_kernels.<l>` [E, r, r],
    Xavier-normal; `bias.<l>` [N, 1], zero; `gates.<e>`, a Linear(N, 1) without bias per expert.

    Raises:
        AssertionError: `num_experts` or `low_rank` below 1.

    Counterpart: torchrec.modules.crossnet.LowRankMixtureCrossNet. DCN-Mix, arXiv:2008.13535.
    """

    def __init__(
        self,
        in_features: int,
        num_layers: int,
        num_experts: int = 1,
        low_rank: int = 1,
        activation: nn.Module | Callable[[torch.Tensor], torch.Tensor] = torch.relu,
    ) -> None:
        super().__init__()
        assert num_experts >= 1, f"num_experts must be at least 1, got {num_experts}"
        assert low_rank >= 1, f"low_rank must be at least 1, got {low_rank}"
        self._num_layers = num_layers
        self._num_experts = num_experts
        self._low_rank = low_rank
        self._activation = activation
        layers = range(num_layers)
        self.U_kernels = nn.ParameterList(_xavier(num_experts, in_features, low_rank) for _ in layers)
        self.V_kernels = nn.ParameterList(_xavier(num_experts, low_rank, in_features) for _ in layers)
        self.bias = nn.ParameterList(nn.Parameter(torch.zeros(in_features, 1)) for _ in layers)
        gates = num_experts if num_experts > 1 else 0
        self.gates = nn.ModuleList(nn.Linear(in_features, 1, bias=False) for _ in range(gates))
        self.C_kernels = nn.ParameterList(_xavier(num_experts, low_rank, low_rank) for _ in layers)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        x = input
        for u_ENr, v_ErN, c_Err, bias_N1 in zip(self.U_kernels, self.V_kernels, self.C_kernels, self.bias):
            low_EBr = self._activation(x @ v_ErN.transpose(1, 2))
            low_EBr = self._activation(low_EBr @ c_Err.transpose(1, 2))
            experts_EBN = input * (low_EBr @ u_ENr.transpose(1, 2) + bias_N1.squeeze(1))
            if self._num_experts == 1:
                x = experts_EBN[0] + x
            else:
                gates_BE = torch.cat([gate(x) for gate in self.gates], dim=1).softmax(dim=1)
                x = torch.einsum("ebn,be->bn", experts_EBN, gates_BE) + x
        return x


def _xavier(*shape: int) -> nn.Parameter:
    return nn.Parameter(nn.init.xavier_normal_(torch.empty(*shape)))
