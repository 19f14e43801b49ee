"""Small helpers: units, names, and two searches that are driven from outside.

Counterpart: torchrec.distributed.planner.utils
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from recsys_edu.distributed.planner.constants import NUM_POOLINGS
from recsys_edu.distributed.sharding_plan import placement

if TYPE_CHECKING:
    from recsys_edu.distributed.planner.types import ParameterConstraints, ShardingOption

__all__ = [
    "BinarySearchPredicate",
    "LuusJaakolaSearch",
    "bytes_to_gb",
    "bytes_to_mb",
    "gb_to_bytes",
    "get_num_poolings",
    "mb_to_bytes",
    "placement",
    "prod",
    "reset_shard_rank",
    "sharder_name",
    "show_bytes",
    "show_ms",
    "to_frame",
]


def sharder_name(t: type[Any]) -> str:
    """Module and class, `"recsys_edu.modules.embedding_modules.EmbeddingBagCollection"`."""
    return f"{t.__module__}.{t.__name__}"


def bytes_to_gb(num_bytes: int) -> float:
    """GiB."""
    return num_bytes / 1024**3


def bytes_to_mb(num_bytes: float) -> float:
    """MiB."""
    return num_bytes / 1024**2


def mb_to_bytes(mb: float) -> int:
    """Bytes of so many MiB, rounded down."""
    return int(mb * 1024**2)


def get_num_poolings(constraints: dict[str, ParameterConstraints] | None, so: ShardingOption) -> list[float]:
    """Pooled lookups per example of each of the option's features: the constraint's, else one each."""
    given = constraints[so.name].num_poolings if constraints and so.name in constraints else None
    return [NUM_POOLINGS] * so.num_inputs if given is None else given


def gb_to_bytes(gb: float) -> int:
    """Bytes of so many GiB, rounded down."""
    return int(gb * 1024**3)


def counted(number: int, noun: str) -> str:
    """A number and what it counts.

    >>> counted(1, "rank"), counted(1024, "rank")
    ('1 rank', '1,024 ranks')
    """
    return f"{number:,} {noun}{'s' * (number != 1)}"


def show_bytes(num_bytes: float) -> str:
    """Bytes for people.

    >>> show_bytes(128 * 1024**3), show_bytes(1536), show_bytes(12)
    ('128 GiB', '1.5 KiB', '12 bytes')
    """
    for unit, size in (("TiB", 1024**4), ("GiB", 1024**3), ("MiB", 1024**2), ("KiB", 1024)):
        if abs(num_bytes) >= size:
            return (
                f"{num_bytes / size:.3g} {unit}" if abs(num_bytes) < 1000 * size else f"{num_bytes / size:,.0f} {unit}"
            )
    return f"{num_bytes:.0f} bytes"


def show_ms(ms: float) -> str:
    """Milliseconds for people: three digits, and no exponent where there is something to see.

    >>> show_ms(14968.2), show_ms(139.04), show_ms(0.93222), show_ms(0.0000512)
    ('14,968', '139', '0.932', '0.000051')
    """
    if 1e-6 <= abs(ms) < 1e-3:
        return f"{ms:.6f}"
    return f"{ms:,.0f}" if abs(ms) >= 1000 else f"{ms:.3g}"


def to_frame(rows: list[dict[str, Any]]) -> Any:
    """Rows as a polars DataFrame, or pandas where polars is missing."""
    try:
        import polars
    except ModuleNotFoundError:
        import pandas

        return pandas.DataFrame(rows)
    return polars.DataFrame(rows)


def prod(iterable: Iterable[int]) -> int:
    """Product."""
    return math.prod(iterable)


def reset_shard_rank(proposal: list[ShardingOption]) -> None:
    """Forget where the shards were placed."""
    for option in proposal:
        for shard in option.shards:
            shard.rank = None


class BinarySearchPredicate:
    """The largest x in [A, B] for which something holds, asked for from outside; ends when `tolerance` is reached.

    >>> search, answer = BinarySearchPredicate(0, 100, 0), True
    >>> probes = []
    >>> while (x := search.next(answer)) is not None:
    ...     probes.append(x)
    ...     answer = x <= 40
    >>> max(x for x in probes if x <= 40)
    40

    The argument of the first `next` does not matter.
    """

    def __init__(self, A: int, B: int, tolerance: int) -> None:
        self.left, self.right = A, B
        self.tolerance = tolerance
        self.last: int | None = None

    def next(self, prior_result: bool) -> int | None:
        """The next x to try, given whether it held for the last one; None when done."""
        if self.last is not None:
            if prior_result:
                self.left = self.last + 1
            else:
                self.right = self.last - 1
        if self.right < self.left or (self.last is not None and self.right - self.left < self.tolerance):
            return None
        self.last = (self.left + self.right) // 2
        return self.last


class LuusJaakolaSearch:
    """Random search for the minimum of f over [A, B], f being evaluated outside; the window shrinks on failures.

    Source: Luus and Jaakola, "Optimization by direct search and systematic reduction of the size of search region",
    AIChE Journal 19 (1973).
    """

    def __init__(self, A: float, B: float, max_iterations: int, seed: int = 42, left_cost: float | None = None) -> None:
        self.left, self.right = A, B
        self.iterations_left = max_iterations
        self.window = B - A
        # The window reaches 1 percent of the interval in the end.
        self.shrink = 0.01 ** (1 / max(max_iterations, 1))
        self._random = random.Random(seed)
        self._x: float | None = None
        self._best: tuple[float, float] | None = None if left_cost is None else (A, left_cost)

    def shrink_right(self, B: float) -> None:
        """Look only left of B from now on."""
        self.right = max(B, self.left)
        self.window = min(self.window, self.right - self.left)

    def clamp(self, x: float) -> float:
        """x, or the nearer end of the interval."""
        return min(max(x, self.left), self.right)

    def uniform(self, A: float, B: float) -> float:
        return A + (B - A) * self._random.random()

    def next(self, fy: float) -> float | None:
        """The next x, given f of the last one (the first call's value is ignored); None when done."""
        if self._x is not None:
            if self._best is None or fy < self._best[1]:
                self._best = (self._x, fy)
            else:
                self.window *= self.shrink
        if self.iterations_left <= 0:
            return None
        self.iterations_left -= 1
        if self._best is None:
            self._x = self.uniform(self.left, self.right)
        else:
            self._x = self.clamp(self._best[0] + self.uniform(-self.window, self.window))
        return self._x

    def best(self) -> tuple[float, float]:
        """(x, f(x)) of the smallest f seen."""
        if self._best is None:
            raise ValueError("nothing has been evaluated yet")
        return self._best
