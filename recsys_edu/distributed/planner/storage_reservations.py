"""Memory that is not for tables: a margin, the dense part of the model, the batch's ids.

Counterpart: torchrec.distributed.planner.storage_reservations
"""

from __future__ import annotations

from typing import Any

from torch import nn

from recsys_edu.distributed.planner.constants import BIGINT_DTYPE
from recsys_edu.distributed.planner.types import (
    ParameterConstraints,
    PlannerError,
    PlannerErrorType,
    StorageReservation,
    Topology,
)
from recsys_edu.distributed.planner.utils import gb_to_bytes, show_bytes
from recsys_edu.distributed.planner.workload import ids_per_batch
from recsys_edu.distributed.types import ModuleSharder

_COPIES_OF_INPUT = 20  # batches of ids that a training loop is assumed to hold, while pipelining


class FixedPercentageStorageReservation(StorageReservation):
    """Keeps back a share of the device memory: `percentage=0.2` leaves 80%."""

    def __init__(self, percentage: float) -> None:
        _check_percentage(percentage)
        self._percentage = percentage
        self._last: Topology | None = None

    @property
    def last_reserved_topology(self) -> Topology | None:
        return self._last

    def reserve(
        self,
        topology: Topology,
        batch_size: int,
        module: nn.Module,
        sharders: list[ModuleSharder[Any]],
        constraints: dict[str, ParameterConstraints] | None = None,
    ) -> Topology:
        self._last = _without(topology, self._percentage, 0)
        return self._last


class FixedAbsoluteStorageReservation(StorageReservation):
    """Keeps back so many bytes of every rank's device memory.

    Raises:
        ValueError: fewer than none. When it reserves, PlannerError: a rank has less than that.
    """

    def __init__(self, hbm_reserved_bytes: int) -> None:
        if hbm_reserved_bytes < 0:
            raise ValueError(f"hbm_reserved_bytes {hbm_reserved_bytes}: expected at least 0")
        self._bytes = hbm_reserved_bytes
        self._last: Topology | None = None

    @classmethod
    def from_gb(cls, hbm_reserved_gb: float) -> FixedAbsoluteStorageReservation:
        """So many GiB.

        >>> reservation = FixedAbsoluteStorageReservation.from_gb(1.5)
        >>> reservation.reserve(Topology(1, "cuda"), 1, nn.ReLU(), []).devices[0].storage.hbm
        32749125632
        """
        return cls(gb_to_bytes(hbm_reserved_gb))

    @property
    def last_reserved_topology(self) -> Topology | None:
        return self._last

    def reserve(
        self,
        topology: Topology,
        batch_size: int,
        module: nn.Module,
        sharders: list[ModuleSharder[Any]],
        constraints: dict[str, ParameterConstraints] | None = None,
    ) -> Topology:
        self._last = _without(topology, 0.0, self._bytes if topology.compute_device == "cuda" else 0)
        return self._last


class HeuristicalStorageReservation(StorageReservation):
    """Keeps back a share of the device memory, the dense parameters times `parameter_multiplier`, and the batch's ids.

    The multiplier covers gradients, optimizer state and DDP's buckets; `dense_tensor_estimate` gives the bytes
    instead. `copies_of_input` (ours) is how many batches a loop holds. On the CPU it comes off the host memory.

    Raises (when it reserves):
        PlannerError: a rank has less than that.
    """

    def __init__(
        self,
        percentage: float,
        parameter_multiplier: float = 6.0,
        dense_tensor_estimate: int | None = None,
        copies_of_input: int = _COPIES_OF_INPUT,
    ) -> None:
        _check_percentage(percentage)
        self._percentage = percentage
        self._parameter_multiplier = parameter_multiplier
        self._dense_tensor_estimate = dense_tensor_estimate
        self._copies_of_input = copies_of_input
        self._last: Topology | None = None

    @property
    def last_reserved_topology(self) -> Topology | None:
        return self._last

    def reserve(
        self,
        topology: Topology,
        batch_size: int,
        module: nn.Module,
        sharders: list[ModuleSharder[Any]],
        constraints: dict[str, ParameterConstraints] | None = None,
    ) -> Topology:
        dense = self._dense_tensor_estimate
        dense = int(dense_bytes(module, sharders) * self._parameter_multiplier) if dense is None else dense
        inputs = self._copies_of_input * input_bytes(module, sharders, topology, batch_size, constraints)
        self._last = _without(topology, self._percentage, dense + inputs)
        return self._last


class InferenceStorageReservation(StorageReservation):
    """Keeps back a share of the device memory, the dense parameters once, and one batch's ids."""

    def __init__(self, percentage: float, dense_tensor_estimate: int | None = None) -> None:
        self._as_in_training = HeuristicalStorageReservation(percentage, 1.0, dense_tensor_estimate, copies_of_input=1)

    @property
    def last_reserved_topology(self) -> Topology | None:
        return self._as_in_training.last_reserved_topology

    def reserve(
        self,
        topology: Topology,
        batch_size: int,
        module: nn.Module,
        sharders: list[ModuleSharder[Any]],
        constraints: dict[str, ParameterConstraints] | None = None,
    ) -> Topology:
        return self._as_in_training.reserve(topology, batch_size, module, sharders, constraints)


def dense_bytes(module: nn.Module, sharders: list[ModuleSharder[Any]]) -> int:
    """Bytes of parameters and buffers outside the modules that a sharder knows."""
    known = {sharder.module_type for sharder in sharders}
    total, pending, seen = 0, [module], set()
    while pending:
        child = pending.pop()
        if type(child) in known:
            continue
        for tensor in [*child.parameters(recurse=False), *child.buffers(recurse=False)]:
            if id(tensor) not in seen:
                seen.add(id(tensor))
                total += tensor.numel() * tensor.element_size()
        pending += child.children()
    return total


def input_bytes(
    module: nn.Module,
    sharders: list[ModuleSharder[Any]],
    topology: Topology,
    batch_size: int,
    constraints: dict[str, ParameterConstraints] | None,
) -> int:
    """Bytes of one rank's batch of ids."""
    try:
        return int(ids_per_batch(module, sharders, topology, batch_size, constraints) * BIGINT_DTYPE)
    except PlannerError:
        return 0  # whoever plans reports it


def _check_percentage(percentage: float) -> None:
    if not 0 <= percentage <= 1:
        raise ValueError(f"percentage {percentage}: expected a share from 0 to 1")


def _without(topology: Topology, share: float, num_bytes: int) -> Topology:
    """The topology with less memory on every rank."""
    left = topology.copy()
    kind = "ddr" if topology.compute_device == "cpu" else "hbm"
    for device, before in zip(left.devices, topology.devices):
        device.storage.hbm = int((1 - share) * device.storage.hbm)
        setattr(device.storage, kind, getattr(device.storage, kind) - num_bytes)
        if getattr(device.storage, kind) < 0:
            raise PlannerError(
                f"rank {device.rank} has {show_bytes(getattr(before.storage, kind))} of memory ({kind}), and "
                f"{share:.0%} of it plus {show_bytes(num_bytes)} for the dense part and the batch are to be kept back",
                PlannerErrorType.INSUFFICIENT_STORAGE,
            )
    return left
