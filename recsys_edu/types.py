"""Storage types of tables, and three small interfaces that modules may implement.

Counterpart: torchrec.types.
"""

from __future__ import annotations

import copy as copy_module
from abc import ABC, abstractmethod
from enum import Enum, unique

import torch
from torch import nn


@unique
class DataType(Enum):
    """How a table stores its numbers; `DataType.FP16.value == "FP16"`.

    FP32, FP16 and BF16 train; INT8, INT4 and INT2 (rows of codes, each row with a scale and a bias) serve.
    """

    FP32 = "FP32"
    FP16 = "FP16"
    BF16 = "BF16"
    INT64 = "INT64"
    INT32 = "INT32"
    INT8 = "INT8"
    UINT8 = "UINT8"
    INT4 = "INT4"
    INT2 = "INT2"
    NFP8 = "NFP8"

    def __str__(self) -> str:
        return self.value


class CopyMixIn(ABC):
    """A module that knows how to copy itself to a device."""

    @abstractmethod
    def copy(self, device: torch.device) -> nn.Module: ...


class ModuleCopyMixin(CopyMixIn):
    """`copy(device)` is a deep copy whose parameters and buffers live on `device`; the original stays."""

    def copy(self, device: torch.device) -> nn.Module:
        return copy_module.deepcopy(self).to(device)


class ModuleNoCopyMixin(CopyMixIn):
    """`copy(device)` is the module itself: for modules that must not be moved or duplicated."""

    def copy(self, device: torch.device) -> nn.Module:
        del device
        return self


class CacheMixin(ABC):
    """An object that caches something it can compute again."""

    @abstractmethod
    def clear_cache(self) -> None:
        """Forget what was cached."""
