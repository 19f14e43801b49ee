"""A tensordict of jagged features as a KeyedJaggedTensor.

Counterpart: torchrec.sparse.tensor_dict.
"""

from __future__ import annotations

import sys
from typing import Any

from recsys_edu.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor


def maybe_td_to_kjt(features: Any, keys: list[str] | None = None) -> Any:
    """A `tensordict.TensorDict` of jagged nested tensors becomes a KeyedJaggedTensor; anything else passes through.

    `keys` picks features and their order (default: the dict's own).

    Raises:
        KeyError: `keys` names a feature that the dict lacks.
    """
    # No import: an object of tensordict's exists only where somebody has imported tensordict already.
    tensordict = sys.modules.get("tensordict")
    if tensordict is None or not isinstance(features, tensordict.TensorDictBase):
        return features
    present = list(features.keys())
    for key in keys or ():
        if key not in present:
            raise KeyError(f"The TensorDict has no feature {key!r}; it has {present}.")
    nested = {key: features[key] for key in (present if keys is None else keys)}
    return KeyedJaggedTensor.from_jt_dict(
        {key: JaggedTensor(tensor.values(), offsets=tensor.offsets()) for key, tensor in nested.items()}
    ).sync()
