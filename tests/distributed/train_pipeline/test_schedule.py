"""Simulated schedules: times that can be added up by hand, and orders that would be wrong."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys_edu.distributed.train_pipeline.schedule import (
    OVERLAPPED,
    PLAIN,
    SPARSE_DIST,
    TRANSFERS,
    WORK,
    simulate_schedule,
)

times = st.fixed_dictionaries({name: st.integers(0, 50).map(float) for name in (*WORK, *TRANSFERS)})


def excess(transfer: float, cover: float) -> float:
    return max(0.0, transfer - cover)


@given(times)
def test_time_per_step_adds_up(d: dict[str, float]) -> None:
    d["update"] += 1.0  # an update of no time leaves no span to measure by
    work = sum(d[name] for name in WORK)
    assert simulate_schedule(PLAIN, d).step_ms() == pytest.approx(work + sum(d[name] for name in TRANSFERS))
    rest = excess(d["rows"], d["bottom"]) + excess(d["gradients"], d["backward bottom"])
    assert simulate_schedule(OVERLAPPED, d).step_ms() == pytest.approx(work + d["sizes"] + d["ids"] + rest)
    pipelined = simulate_schedule(SPARSE_DIST, d, num_steps=20)
    ends = [span.end_ms for span in pipelined.spans if span.name.startswith("optimizer")]
    assert work + rest - 1e-9 <= ends[-1] - ends[-2] <= work + rest + d["sizes"] + d["ids"] + 1e-9


def test_what_is_hidden_counts_as_hidden() -> None:
    durations = {"load": 1.0, "bottom": 10.0, "top": 10.0, "backward top": 30.0, "backward bottom": 10.0, "update": 1.0}
    durations |= dict.fromkeys(TRANSFERS, 8.0)
    assert simulate_schedule(PLAIN, durations).overlap().hidden_percent == 0
    assert simulate_schedule(OVERLAPPED, durations).overlap().hidden_percent == 50
    assert simulate_schedule(SPARSE_DIST, durations, 50).overlap().hidden_percent > 95  # all but the first batch's


@pytest.mark.parametrize(
    ("schedule", "error"),
    [
        (("loaf", *PLAIN[1:]), "no call 'loaf'"),
        (("load +x", *PLAIN[1:]), r"no call 'load \+x'"),
        (PLAIN[:-1], "it lacks update"),
        ((*PLAIN, "load"), "it has load more than once"),
        ((*PLAIN[:2], "start ids", "wait sizes", *PLAIN[4:]), "'start ids' of batch 0 comes before its 'wait sizes'"),
        (("lookup +1" if call == "lookup" else call for call in SPARSE_DIST), "comes before its 'wait ids'"),
        (tuple(f"{call} +1" for call in PLAIN[:6]) + PLAIN[6:], "before the 'update' of batch 0: it would use old"),
    ],
)
def test_wrong_schedules_are_refused_in_words(schedule, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        simulate_schedule(list(schedule), {"load": 1.0})


def test_unknown_durations_are_refused() -> None:
    with pytest.raises(ValueError, match=r"durations of \['coffee'\]"):
        simulate_schedule(PLAIN, {"coffee": 5.0})
