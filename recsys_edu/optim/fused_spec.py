"""From an optimizer class and its arguments to the update that a fused kernel applies in backward.

The kernel knows a few formulas by name (`recsys_edu.kernels.optimizers`). An argument that the formula has
no place for is refused: leaving out momentum or a decay silently would train another model.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from recsys_edu.kernels.spec import OptimizerSpec
from recsys_edu.optim import optimizers as markers
from recsys_edu.optim.rowwise_adagrad import RowWiseAdagrad

KIND_BY_CLASS: Mapping[type, str] = {
    torch.optim.SGD: "SGD",
    torch.optim.Adagrad: "ADAGRAD",
    torch.optim.Adam: "ADAM",
    torch.optim.AdamW: "ADAM",
    RowWiseAdagrad: "ROWWISE_ADAGRAD",
    markers.SGD: "SGD",
    markers.Adagrad: "ADAGRAD",
    markers.Adam: "ADAM",
    markers.PartialRowWiseAdam: "PARTIAL_ROWWISE_ADAM",
    markers.LAMB: "LAMB",
    markers.LarsSGD: "LARS_SGD",
}
_SPEC_FIELDS = tuple(name for name in inspect.signature(OptimizerSpec).parameters if name != "kind")
# Arguments of torch's classes that change how an update is computed, never which numbers come out.
_WITHOUT_EFFECT = ("foreach", "fused", "capturable", "differentiable")


def optimizer_spec(optimizer_type: type[torch.optim.Optimizer], optimizer_kwargs: Mapping[str, Any]) -> OptimizerSpec:
    """The fused update that equals `optimizer_type(params, **optimizer_kwargs)` on the rows a batch touches.

    >>> spec = optimizer_spec(torch.optim.Adagrad, {"lr": 0.1})
    >>> spec.kind, spec.learning_rate, spec.eps                    # eps is torch's default, not the kernel's
    ('ADAGRAD', 0.1, 1e-10)

    Arguments left out have the class's own defaults; the marker classes take the kernel's. `lr` and
    `learning_rate`, `betas` and `beta1`, `beta2` are both understood.

    Raises:
        ValueError: no kernel fuses the class, or the fused formula lacks an argument that was set.
    """
    if optimizer_type not in KIND_BY_CLASS:
        known = sorted({f"{cls.__module__}.{cls.__name__}" for cls in KIND_BY_CLASS})
        raise ValueError(f"no kernel fuses {optimizer_type.__name__}; expected one of {', '.join(known)}")
    kind = KIND_BY_CLASS[optimizer_type]
    defaults = _class_defaults(optimizer_type)
    settings = _renamed({**defaults, **optimizer_kwargs})
    neutral = _renamed(defaults)
    for name, value in settings.items():
        is_ours = name in _SPEC_FIELDS and not (name == "momentum" and kind != "LARS_SGD")
        if is_ours or name in _WITHOUT_EFFECT or value == neutral.get(name) or not value:
            continue
        raise ValueError(f"the fused {kind} cannot do {optimizer_type.__name__}({name}={value!r})")
    if optimizer_type is torch.optim.Adam and settings["weight_decay"] and not settings["decoupled_weight_decay"]:
        raise ValueError(
            "the fused ADAM decays weights directly, as torch.optim.AdamW; torch.optim.Adam's weight_decay goes "
            "through the gradient. Use torch.optim.AdamW"
        )
    numbers = {name: float(value) for name, value in settings.items() if name in _SPEC_FIELDS}
    return OptimizerSpec(kind, **numbers)


def _class_defaults(optimizer_type: type) -> dict[str, Any]:
    """The constructor's defaults; a marker has none of its own."""
    parameters = inspect.signature(optimizer_type.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def _renamed(settings: Mapping[str, Any]) -> dict[str, Any]:
    renamed = dict(settings)
    if "lr" in renamed:
        renamed["learning_rate"] = renamed.pop("lr")
    if "betas" in renamed:
        renamed["beta1"], renamed["beta2"] = renamed.pop("betas")
    return renamed
