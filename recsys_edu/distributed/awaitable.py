"""Results to come: handles that are waited for, or that wait by themselves when somebody uses them.

    NoWait(x)           the result is there            .wait() gives it
    LazyNoWait(x)       the same, and usable as x      lazy + 1, lazy.shape, torch.sum(lazy)
    a subclass          `_wait_impl` finishes the communication that was started earlier

Whatever runs between the start of a communication and the first use of its result overlaps with it.

Counterpart: torchrec.distributed.types, where these names can be imported from here too.
"""

from __future__ import annotations

import operator
from abc import ABC, ABCMeta, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from torch.fx import ProxyableClassMeta
from torch.utils import _pytree as pytree

W = TypeVar("W")


class Awaitable(ABC, Generic[W]):
    """A result that may still be under way: `wait()` returns it, computing it at most once.

    A subclass gives `_wait_impl()`. Functions in `callbacks` are applied to the result, in order.

    Counterpart: torchrec.distributed.types.Awaitable
    """

    def __init__(self) -> None:
        super().__init__()
        self._callbacks: list[Callable[[W], W]] = []
        self._is_done = False
        self._result: W | None = None

    @abstractmethod
    def _wait_impl(self) -> W:
        """Block until the result is there and return it."""

    def wait(self) -> W:
        if not self._is_done:
            result = self._wait_impl()
            for callback in self._callbacks:
                result = callback(result)
            self._result, self._is_done = result, True
        return self._result  # type: ignore[return-value]

    @property
    def callbacks(self) -> list[Callable[[W], W]]:
        return self._callbacks


class NoWait(Awaitable[W]):
    """An `Awaitable` whose result is already there.

    >>> NoWait(3).wait()
    3
    """

    def __init__(self, obj: W) -> None:
        super().__init__()
        self._obj = obj

    def _wait_impl(self) -> W:
        return self._obj


class _LazyMeta(ABCMeta, ProxyableClassMeta):
    """Lets a LazyAwaitable be built inside a torch.fx trace, where it becomes one node of the graph."""


class LazyAwaitable(Awaitable[W], metaclass=_LazyMeta):
    """An `Awaitable` that waits by itself when used: attributes, torch functions and arithmetic act on its result.

    >>> import torch
    >>> lazy = LazyNoWait(torch.ones(2))
    >>> (lazy + 1).tolist(), lazy.shape, torch.sum(lazy).item()
    ([2.0, 2.0], torch.Size([2]), 2.0)

    Counterpart: torchrec.distributed.types.LazyAwaitable
    """

    def __getattr__(self, name: str) -> Any:
        # Reached only for names the handle itself lacks. Private and special names are never forwarded: pickle,
        # copy and fx look them up on half-built objects, and must not set off communication.
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.wait(), name)

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        args, kwargs = pytree.tree_map(_settle, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __getitem__(self, *args: Any) -> Any:
        return operator.getitem(self.wait(), *args)

    def __len__(self) -> int:
        return len(self.wait())  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.wait())  # type: ignore[call-overload]

    def __bool__(self) -> bool:
        return bool(self.wait())


def _settle(value: Any) -> Any:
    return value.wait() if isinstance(value, LazyAwaitable) else value


def _forward_operators(cls: type) -> None:
    """Give `cls` Python's arithmetic and order comparisons; equality stays identity, so handles can be dict keys."""
    for name in ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "and_", "or_", "xor"):
        function = getattr(operator, name)
        special = name.rstrip("_")
        setattr(cls, f"__{special}__", lambda self, other, f=function: f(self.wait(), _settle(other)))
        setattr(cls, f"__r{special}__", lambda self, other, f=function: f(_settle(other), self.wait()))
    for name in ("lt", "le", "gt", "ge"):
        function = getattr(operator, name)
        setattr(cls, f"__{name}__", lambda self, other, f=function: f(self.wait(), _settle(other)))
    for name in ("neg", "pos", "abs", "invert"):
        function = getattr(operator, name)
        setattr(cls, f"__{name}__", lambda self, f=function: f(self.wait()))


_forward_operators(LazyAwaitable)


class LazyNoWait(LazyAwaitable[W]):
    """A `LazyAwaitable` with the result at hand."""

    def __init__(self, obj: W) -> None:
        super().__init__()
        self._obj = obj

    def _wait_impl(self) -> W:
        return self._obj


class GetItemLazyAwaitable(LazyAwaitable[W]):
    """One entry of a dict-like result that is still under way: waits for `parent`, then takes `key`."""

    def __init__(self, parent: LazyAwaitable[Any], key: Any) -> None:
        super().__init__()
        self._parent = parent
        self._key = key

    def _wait_impl(self) -> W:
        return self._parent.wait()[self._key]


class LazyGetItemMixin:
    """Put before LazyAwaitable in a class's bases, it makes subscripting lazy instead of waiting.

    Once the result is there, subscripting simply takes the entry.
    """

    def __getitem__(self, key: Any) -> Any:
        if self._is_done:  # type: ignore[attr-defined]
            return self.wait()[key]  # type: ignore[attr-defined]
        return GetItemLazyAwaitable(self, key)  # type: ignore[arg-type]
