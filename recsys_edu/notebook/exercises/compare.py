"""What checks have in common: saying which input, what was expected and what was got."""

from __future__ import annotations

import torch
from torch import Tensor

from recsys_edu.notebook.exercise import CheckFailed


def expect_equal(what: str, got: object, expected: Tensor, given: str) -> None:
    """Raise CheckFailed unless `got` is a tensor that holds the same numbers as `expected`."""
    _expect_tensor(what, got, expected, given)
    if not torch.equal(got.to(expected.dtype), expected):
        raise CheckFailed(f"{what} differs\nfor      {given}\nexpected {expected.tolist()}\ngot      {got.tolist()}")


def expect_close(what: str, got: object, expected: Tensor, given: str, tolerance: float = 1e-4) -> None:
    """Raise CheckFailed unless `got` is a tensor that differs from `expected` by rounding only."""
    _expect_tensor(what, got, expected, given)
    if torch.allclose(got.detach().to(expected.dtype), expected, rtol=tolerance, atol=tolerance):
        return
    worst = int((got.detach() - expected).abs().argmax())
    raise CheckFailed(
        f"{what} differs\nfor {given}\nlargest difference at flat position {worst}: "
        f"expected {expected.flatten()[worst].item():.6g}, got {got.flatten()[worst].item():.6g}"
    )


def expect_number(what: str, got: object, expected: float, given: str, tolerance: float = 1e-4) -> None:
    """Raise CheckFailed unless `got` is a number within a relative `tolerance` of `expected`."""
    try:
        number = float(got)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise CheckFailed(f"{what}: expected a number, got {type(got).__name__}\nfor {given}") from None
    if not abs(number - expected) <= tolerance * max(1.0, abs(expected)):
        raise CheckFailed(f"{what} differs\nfor {given}\nexpected {expected:.6g}\ngot      {number:.6g}")


def _expect_tensor(what: str, got: object, expected: Tensor, given: str) -> None:
    if got is None or got is ...:
        raise NotImplementedError  # the stub's body is still empty
    if not isinstance(got, Tensor):
        raise CheckFailed(f"{what}: expected a tensor, got {type(got).__name__}\nfor {given}")
    if got.shape != expected.shape:
        raise CheckFailed(
            f"{what}: wrong shape\nfor      {given}\nexpected {tuple(expected.shape)}\ngot      {tuple(got.shape)}"
        )
