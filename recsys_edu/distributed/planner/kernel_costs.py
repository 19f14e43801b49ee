"""What a training step costs besides lookups and bytes on links: dense layers, fixed costs, routing.

    kernels = calibrate().kernels()              # measured on this machine
    kernels = assumed_kernels(topology)          # or assumed, for machines that are not here
    work = dense_work(model)                     # multiplications of the model's dense part per example

A Topology has bandwidths; these are the other numbers that step_simulator.py needs.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from recsys_edu.distributed.planner.topology import Topology
from recsys_edu.models.dlrm import InteractionArch, SparseArch


@dataclass(frozen=True)
class KernelCosts:
    """Speeds and fixed costs of one rank.

    Args:
        matmul_flops: of dense layers, per second, forward and backward alike.
        copy_bw: bytes per ms read and written by elementwise operations.
        op_ms: of launching one operation, however small.
        engine_ms: of a sharded collection's step, however small its batch.
        route_bw: bytes of ids per ms that find their way into lanes.
        exchange_ms: of one exchange, however small.
        message_ms: what each further rank adds to an exchange.
        host_link_bw: bytes per ms from the host to the device; None: no copy is needed.
        delay_ms: what every exchange of a sharded module takes longer (slow_link.py); the all-reduce does not.
    """

    matmul_flops: float
    copy_bw: float
    op_ms: float
    engine_ms: float
    route_bw: float
    exchange_ms: float
    message_ms: float = 0.0
    host_link_bw: float | None = None
    delay_ms: float = 0.0


def assumed_kernels(topology: Topology) -> KernelCosts:
    """Round numbers for machines that are not at hand; their order is an A100's on cuda, a core's on the CPU.

    Dense layers at 60 TFLOP/s (of 156 that TF32 has at best), 10 microseconds per launch, 30 per collective and half
    of one more for every further rank. What decides a prediction should be measured: see `calibrate`.
    """
    if topology.compute_device == "cpu":
        copy_bw = 0.5 * topology.ddr_mem_bw
        return KernelCosts(5e10, copy_bw, op_ms=0.01, engine_ms=1.0, route_bw=0.05 * copy_bw, exchange_ms=0.2)
    return KernelCosts(
        matmul_flops=6e13,
        copy_bw=0.8 * topology.hbm_mem_bw,
        op_ms=0.01,
        engine_ms=0.3,
        route_bw=0.1 * topology.hbm_mem_bw,
        exchange_ms=0.03,
        message_ms=0.0005,
        host_link_bw=topology.hbm_to_ddr_mem_bw,
    )


@dataclass(frozen=True)
class DensePart:
    """Some dense layers: operations on numbers and bytes of activations per example forward, and launches in all."""

    flops: float = 0.0
    activation_bytes: float = 0.0
    num_ops: int = 0

    def __add__(self, other: DensePart) -> DensePart:
        return DensePart(
            self.flops + other.flops, self.activation_bytes + other.activation_bytes, self.num_ops + other.num_ops
        )

    def forward_ms(self, kernels: KernelCosts, batch_size: float) -> float:
        """Multiply, read and write the activations, launch."""
        multiply = self.flops * batch_size / kernels.matmul_flops * 1000
        return multiply + self.activation_bytes * batch_size / kernels.copy_bw + self.num_ops * kernels.op_ms

    def backward_ms(self, kernels: KernelCosts, batch_size: float) -> float:
        """A product for the inputs' gradients, and one for the weights'."""
        return 2 * self.forward_ms(kernels, batch_size)


@dataclass(frozen=True)
class DenseWork:
    """The dense part of a model: what does not need embeddings, and what does.

    `parameter_bytes` are all-reduced and stepped; `input_bytes` of dense features and labels arrive per example.
    """

    before: DensePart
    after: DensePart
    parameter_bytes: int
    num_parameters: int
    input_bytes: int


NO_DENSE = DenseWork(DensePart(), DensePart(), 0, 0, 0)


def dense_work(model: nn.Module, before: str = "dense_arch") -> DenseWork:
    """Count the Linear layers (and DLRM's interaction) of a model, on any device, meta included.

    Layers below a module named `before` count as done while embeddings travel, all others as waiting for them.

    >>> layers = nn.ModuleDict({"dense_arch": nn.Linear(13, 64), "over_arch": nn.Linear(64, 1)})
    >>> dense_work(layers).before.flops                # 2 x 13 x 64
    1664.0
    """
    parts = {True: DensePart(), False: DensePart()}
    first_inputs = 0
    for name, child in model.named_modules():
        is_before = before in name.split(".")
        if isinstance(child, nn.Linear):
            part = DensePart(
                flops=2.0 * child.in_features * child.out_features,
                activation_bytes=16.0 * child.out_features,  # written, read and written by its activation, read again
                num_ops=2,
            )
            first_inputs = child.in_features if is_before and not first_inputs else first_inputs
        elif isinstance(child, InteractionArch):
            part = _interaction(child, model)
        else:
            continue
        parts[is_before] += part
    in_tables = {id(p) for child in model.modules() if _holds_tables(child) for p in child.parameters()}
    own = [p for p in model.parameters() if id(p) not in in_tables]
    return DenseWork(
        before=parts[True],
        after=parts[False],
        parameter_bytes=sum(p.numel() * p.element_size() for p in own),
        num_parameters=len(own),
        input_bytes=4 * (first_inputs + 1),
    )


def _interaction(interaction: InteractionArch, model: nn.Module) -> DensePart:
    """All pairs of F + 1 vectors: one batched product, and the vectors joined, gathered and read again."""
    vectors = interaction.F + 1
    dim = next((child.D for child in model.modules() if isinstance(child, SparseArch)), 0)
    return DensePart(2.0 * vectors * vectors * dim, 4.0 * (3 * vectors * dim + 3 * vectors * vectors), num_ops=5)


def _holds_tables(module: nn.Module) -> bool:
    return hasattr(module, "embedding_bag_configs") or hasattr(module, "embedding_configs")
