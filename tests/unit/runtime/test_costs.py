"""What the ranks measure of steps and transfers, and what the planner is told of it."""

from __future__ import annotations

import pytest

from eplb_fsm import RebalanceConfig
from eplb_fsm.runtime.costs import Measured, costs_of
from eplb_fsm.runtime.gauge import StepGauge
from eplb_fsm.runtime.worker import Pace

CONFIG = RebalanceConfig(max_slowdown=0.0)


def _gauge(max_slowdown: float = 0.0) -> StepGauge:
    """One that has seen steps of 10 ms."""
    gauge = StepGauge(Pace(0.0), max_slowdown)
    for step_idx in range(0, 40, 4):
        gauge.note(step_idx, step_idx * 0.01, is_transferring=False)
    return gauge


@pytest.mark.parametrize("max_slowdown", [0.0, 0.03])
def test_steps_that_are_longer_while_bytes_move_are_lost_time(max_slowdown: float) -> None:
    """Ten steps take 0.13 s where they take 0.1 s otherwise; a second transfer is added."""
    gauge = _gauge(max_slowdown)
    gauge.begin(40, 1.0)
    gauge.note(45, 5.0, is_transferring=True)
    gauge.end(50, 1.13, 1000)
    assert gauge.measured == Measured(10_000_000, 1000, 130_000_000, 30_000_000)
    gauge.begin(60, 2.0)
    gauge.end(70, 2.1, 500)
    assert gauge.measured == Measured(10_000_000, 1500, 230_000_000, 30_000_000)


def test_a_sync_epoch_loses_all_its_time_and_is_no_step_like_others() -> None:
    """It lies within one step, and the time up to the next vote says nothing about steps."""
    gauge = _gauge()
    gauge.begin(40, 1.0)
    gauge.end(40, 1.5, 1000)
    gauge.note(44, 1.54, is_transferring=False)
    gauge.note(48, 1.58, is_transferring=False)
    assert gauge.measured == Measured(10_000_000, 1000, 500_000_000, 500_000_000)


def test_costs_are_means_over_the_ranks() -> None:
    """Two ranks, one of which lost more."""
    ranks = [Measured(10_000_000, 1000, 200_000_000, 30_000_000), Measured(30_000_000, 1000, 300_000_000, 10_000_000)]
    costs = costs_of(Measured(*(sum(words) for words in zip(*ranks, strict=True))), 2, CONFIG, 0.75)
    assert costs is not None
    assert costs.step_s == pytest.approx(0.02)
    assert costs.bytes_per_s == pytest.approx(1000 / 0.25)
    assert costs.lost_s_per_byte == pytest.approx(0.02 / 1000)
    assert costs.trust == 0.75


def test_time_that_was_won_is_no_cost() -> None:
    """Steps that happen to be shorter while bytes move do not make moving worth something."""
    costs = costs_of(Measured(10, 1000, 200, -30), 1, CONFIG, 1.0)
    assert costs is not None
    assert costs.lost_s_per_byte == 0.0


@pytest.mark.parametrize(
    ("options", "bytes_per_s", "slowdown"),
    [
        ({"mode": "sync"}, 2e9, 1.0),
        ({"max_slowdown": 0.03}, 2e9, 0.03),
        ({"max_slowdown": 0.0}, 2e9, 0.01),
        ({"max_slowdown": 0.0, "max_transfer_mb_s": 50.0}, 1e8, 0.01),
    ],
)
def test_before_anything_moved_costs_are_assumed(
    options: dict[str, object], bytes_per_s: float, slowdown: float
) -> None:
    """Ten-gigabit Ethernet or the limit that was set; a blocking rebalance loses all of the time."""
    costs = costs_of(Measured(step_ns=20), 2, RebalanceConfig.from_mapping(options), 1.0)
    assert costs is not None
    assert costs.bytes_per_s == bytes_per_s
    assert costs.lost_s_per_byte == pytest.approx(slowdown / bytes_per_s)


def test_nothing_has_to_pay_where_there_is_nothing_to_weigh() -> None:
    """Without a horizon, and before any step was measured."""
    assert costs_of(Measured(20, 1, 1, 1), 2, RebalanceConfig(horizon_steps=0), 1.0) is None
    assert costs_of(Measured(), 2, CONFIG, 1.0) is None
