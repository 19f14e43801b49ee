"""Named spans for torch.profiler that cost a tenth of a `record_function` while nobody profiles.

    with span("lookup"):
        ...
    with span("start", label, "|", num_bytes, "bytes"):       # words are joined only while a profiler runs
        ...

Spans of the engine: "lookup", "output_dist", and around every exchange "start <label> | <n> bytes" and "wait <label>".
Those of the pipelines: "load batch", "copy batch", "start input", "exchange input", "forward", "backward", "optimizer".
timeline.py reads them back.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch.autograd import profiler

_NOTHING = nullcontext()


def span(*words: object) -> AbstractContextManager[Any]:
    """`with span("forward"):` shows as "forward" in a profile; without a profiler nothing happens."""
    # torch keeps this flag to skip its own spans; record_function itself asks only after a call into C++ (10 us).
    if getattr(profiler, "_is_profiler_enabled", True):
        return profiler.record_function(" ".join(map(str, words)))
    return _NOTHING
