"""Which kernels run here: FBGEMM where it loads, plain PyTorch everywhere else.

FBGEMM has wheels for Linux only, and a wheel built for another torch fails while it is imported.
Neither may stop a reader: `fbgemm_status()` tries once, remembers the outcome and never raises.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import sys
import warnings
from dataclasses import dataclass

import torch

BACKEND_VARIABLE = "RECSYS_EDU_BACKEND"
BACKEND_CHOICES = ("auto", "fbgemm", "pytorch")


@dataclass(frozen=True)
class BackendStatus:
    """Whether FBGEMM's kernels are in use, and why.

    >>> fbgemm_status().available            # doctest: +SKIP
    True
    """

    available: bool
    reason: str
    version: str | None = None


def fbgemm_version() -> str | None:
    """The installed FBGEMM's version (CPU or CUDA build), or None; nothing is imported."""
    for distribution in ("fbgemm-gpu-cpu", "fbgemm-gpu"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


@functools.cache
def fbgemm_status() -> BackendStatus:
    """Import FBGEMM once and say what came of it.

    `RECSYS_EDU_BACKEND=pytorch` keeps FBGEMM out even where it is installed;
    `RECSYS_EDU_BACKEND=fbgemm` makes a missing FBGEMM an error instead of a fallback.

    Raises:
        ValueError: the variable holds anything but auto, fbgemm or pytorch.
        ImportError: the variable demands FBGEMM and it does not load.
    """
    choice = os.environ.get(BACKEND_VARIABLE, "auto").lower()
    if choice not in BACKEND_CHOICES:
        raise ValueError(f"{BACKEND_VARIABLE}={choice!r}: expected one of {', '.join(BACKEND_CHOICES)}")
    version = fbgemm_version()
    if choice == "pytorch":
        return BackendStatus(False, f"{BACKEND_VARIABLE}=pytorch asks for PyTorch's kernels", version)
    try:
        import fbgemm_gpu  # noqa: F401

        torch.ops.fbgemm.asynchronous_complete_cumsum(torch.tensor([1, 2]))
    except Exception as error:  # a wrong build fails with OSError, AttributeError or RuntimeError alike
        missing = version is None and isinstance(error, ImportError)
        reason = "FBGEMM is not installed" if missing else f"FBGEMM {version} does not load: {error}"
        if choice == "fbgemm":
            raise ImportError(f"{BACKEND_VARIABLE}=fbgemm, but {reason}. Run: recsys_edu doctor") from error
        if sys.platform == "linux" or not missing:  # elsewhere there are no wheels, so nothing to be done about it
            text = f"{reason}; using PyTorch's kernels (slower, same results). Run: recsys_edu doctor"
            warnings.warn(text, stacklevel=2)
        return BackendStatus(False, reason, version)
    return BackendStatus(True, "FBGEMM is installed and loads", version)


# Decided once, when this file is imported: a tracer (torch.compile, torch.export) reads a constant, not the probe.
_STATUS = fbgemm_status()


def use_fbgemm(device: torch.device | None = None) -> bool:
    """Whether kernels for `device` (default: cpu) come from FBGEMM."""
    del device  # one build serves the CPU and, where it is the CUDA build, the GPU as well
    return _STATUS.available
