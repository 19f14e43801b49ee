"""Exercises of notebook 17, the pipelined trainer."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from recsys_edu.distributed.timeline import HOST, NETWORK, Span, Timeline
from recsys_edu.distributed.train_pipeline.schedule import SPARSE_DIST, TRANSFERS, WORK, simulate_schedule
from recsys_edu.notebook.exercise import CheckFailed, Exercise
from recsys_edu.notebook.exercises.compare import expect_number

NUM_STEPS = 8  # enough for the first, unhurried steps not to matter


def check_hidden(answer: Callable[[list[tuple[float, float]], list[tuple[float, float]]], float]) -> None:
    """`answer(transfers, waits)` is how long at least one transfer was under way while the host did not wait."""
    for _ in range(20):
        transfers = [(start, start + random.randint(1, 20)) for start in random.sample(range(60), 4)]
        waits = sorted(random.sample(range(80), 6))
        waits = list(zip(waits[::2], waits[1::2]))
        spans = [Span(0, NETWORK, "ids", start, end - start) for start, end in transfers]
        spans += [Span(0, HOST, "wait ids", start, end - start) for start, end in waits]
        got = answer(list(transfers), list(waits))
        if got is None or got is ...:
            raise NotImplementedError
        given = f"transfers {transfers}, waits {waits}"
        expect_number("the hidden milliseconds", got, Timeline(tuple(spans)).overlap().hidden_ms, given, 1e-6)


def check_schedule(schedule: Sequence[str] | None) -> None:
    """`schedule` is valid, and on any network as fast as the library's sparse-dist or faster."""
    if schedule is None or schedule is ... or not len(schedule) or any(call is ... for call in schedule):
        raise NotImplementedError
    if isinstance(schedule, str) or not all(isinstance(call, str) for call in schedule):
        raise CheckFailed(f'expected a list of calls such as ["load", "start sizes +1"], got {schedule!r}')
    for slow in ("nothing", *TRANSFERS, "everything"):
        durations = _random_durations(slow)
        try:
            mine = simulate_schedule(schedule, durations, NUM_STEPS)
        except ValueError as error:
            raise CheckFailed(str(error)) from None
        best = simulate_schedule(SPARSE_DIST, durations, NUM_STEPS).step_ms()
        if mine.step_ms() > best + 1e-6:
            raise CheckFailed(
                f"with a slow network for {slow} a step takes {mine.step_ms():.1f} ms, and {best:.1f} ms would do\n"
                f"for durations {durations}\nyour host waits: {_waits(mine)}"
            )


def check_step_time(answer: Callable[[dict[str, float]], float]) -> None:
    """`answer(durations)` is the milliseconds per step of SPARSE_DIST, in the long run."""
    for slow in ("nothing", *TRANSFERS, "everything", "everything"):
        durations = _random_durations(slow)
        got = answer(dict(durations))
        if got is None or got is ...:
            raise NotImplementedError
        expected = simulate_schedule(SPARSE_DIST, durations, 60)
        ends = [span.end_ms for span in expected.spans if span.name.startswith("optimizer")]
        expect_number("the milliseconds per step", got, ends[-1] - ends[-2], f"durations {durations}", 1e-6)


def _random_durations(slow: str) -> dict[str, float]:
    durations = {work: float(random.randint(1, 6)) for work in WORK}
    for transfer in TRANSFERS:
        is_slow = slow in (transfer, "everything")
        durations[transfer] = float(random.randint(15, 40) if is_slow else random.randint(1, 4))
    return durations


def _waits(timeline: Timeline) -> str:
    """How long the host waits for what, per step.

    >>> _waits(Timeline((Span(0, HOST, "wait sizes #3", 0, 16.0),)))
    'sizes 2.0 ms'
    """
    total: dict[str, float] = {}
    for span in timeline.spans:
        if span.name.startswith("wait "):
            label = span.name.removeprefix("wait ").partition(" #")[0]
            total[label] = total.get(label, 0.0) + span.duration_ms / NUM_STEPS
    return ", ".join(f"{label} {duration:.1f} ms" for label, duration in total.items()) or "for nothing"


EXERCISES = (
    Exercise(
        "17.1",
        "Place the calls",
        "Write `schedule`: the calls of one step, as in `PLAIN`, so that on every network a step is as short as with "
        "TrainPipelineSparseDist or shorter. Calls for the next batch end in `+1`, for the one after that in `+2`. "
        "Weights must be fresh: no batch is looked up before the last one's update.",
        difficulty=3,
        importance=5,
        minutes=15,
        hints=(
            "Begin with `OVERLAPPED`. Which transfers does the host still wait for at once? Draw it: "
            "`timeline_figure(simulate_schedule(OVERLAPPED, durations))`.",
            "Sizes and ids do not depend on weights, so they can be those of the next batch. Then `wait ids`, without "
            "`+1`, is the first thing a lookup needs.",
            "Sizes +1 can travel during the forward, ids +1 during the backward. Who loads batch +1 early enough? "
            "Every call appears once, and needs the calls before it for the same batch.",
            "`start sizes +1` first, `load +2` behind it; `wait sizes +1` and `start ids +1` between `top` and "
            "`backward top`.",
        ),
        check=check_schedule,
    ),
    Exercise(
        "17.2",
        "How much was hidden?",
        "Write `hidden_ms(transfers, waits)`: for how many milliseconds was at least one transfer under way while the "
        "host did not wait? Both are lists of `(start, end)`; transfers may overlap, waits do not. All times are whole "
        "milliseconds.",
        difficulty=2,
        importance=3,
        minutes=10,
        hints=(
            "Two transfers at the same time count once.",
            "Times are whole: make a set of all milliseconds in which a transfer is under way.",
            "Take away those in which the host waits, and count what is left.",
        ),
        check=check_hidden,
    ),
    Exercise(
        "17.3",
        "Predict a step",
        "Write `step_ms(durations)`: how long a step of `SPARSE_DIST` takes in the long run, without simulating it. "
        "`durations` has the milliseconds of `load`, `lookup`, `bottom`, `top`, `backward top`, `backward bottom`, "
        "`update`, and of the transfers `sizes`, `ids`, `rows`, `gradients`.",
        difficulty=4,
        importance=4,
        minutes=20,
        hints=(
            "Add up all the work; then add, for every transfer, what its cover does not hide: "
            "`max(0, transfer - cover)`.",
            "Rows are covered by `bottom`, gradients by `backward bottom`.",
            "Sizes are started first and awaited after `top`: their cover is everything in between, the wait for rows "
            "included. And a wait for ids.",
            "Ids are covered by the rest of the step and by what the next one does before its `wait ids`: the "
            "backward, the update, the load. If the host still waits for ids, the sizes get that time as well.",
        ),
        check=check_step_time,
    ),
)
