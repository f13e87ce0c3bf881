"""The figures of a run, of timelines made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from eplb_fsm.engines.reference.figures import active_steps, latency_ms, percentile, steps_to_balance
from eplb_fsm.engines.reference.timeline import Timeline


def timeline(steps: int = 0, states: tuple[str, ...] = ()) -> Timeline:
    """A timeline of one layer on two ranks with so many steps, or with these states."""
    line = Timeline.empty(steps or len(states), 1, 2, 1)
    line.steps = steps or len(states)
    line.states = list(states)
    return line


def test_percentile_is_a_value_that_occurred() -> None:
    """The p99 of 1 to 200 is 198, and of nothing it is 0."""
    assert percentile(np.arange(1, 201), 99) == 198
    assert percentile(np.arange(1, 201), 50) == 100
    assert percentile(np.array([]), 99) == 0


def test_a_step_is_active_from_the_pass_after_the_start_to_the_commit() -> None:
    """A step whose epoch ends in its step() counts, the one after it does not; without a rebalancer none does."""
    line = timeline(states=("IDLE", "COLLECTING", "TRANSFERRING", "IDLE", "IDLE", "STOPPED"))
    assert active_steps(line).tolist() == [False, True, True, True, False, False]
    assert active_steps(timeline(steps=3)).tolist() == [False] * 3


def test_latency_leaves_the_first_step_out_and_takes_all_ranks() -> None:
    """The maximum may come from any rank, the first step's time means nothing."""
    one, other = timeline(steps=3), timeline(steps=3)
    one.itl_ns[:] = [9_000_000, 1_000_000, 2_000_000]
    other.itl_ns[:] = [9_000_000, 3_000_000, 4_000_000]
    assert latency_ms([one, other]) == {"p50": 2.0, "p99": 4.0, "max": 4.0}


@pytest.mark.parametrize(("balanced_from", "expected"), [(30, 80), (0, 50), (500, None)])
def test_steps_to_balance(balanced_from: int, expected: int | None) -> None:
    """Counted is up to the end of the first window behind the change whose load is even."""
    line = timeline(steps=300)
    line.rank_rows[:] = [3, 1]
    line.rank_rows[100 + balanced_from :] = [2, 2]
    assert steps_to_balance(line, 100, 1.0) == expected


def test_a_run_shorter_than_a_window_is_never_balanced_again() -> None:
    """Twenty steps are too few to judge."""
    assert steps_to_balance(timeline(steps=20), 10, 0.5) is None
