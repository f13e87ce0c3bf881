"""Promised and measured gain: in health, and in the log when it stays away."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from eplb_fsm.observe.gains import Gain, GainWatch, Seen
from eplb_fsm.placement import BankShape, Budget, Placement, Thresholds, Topology, get_policy, make_plan
from eplb_fsm.placement.balancedness import balancedness
from eplb_fsm.placement.plan import Plan

START = Placement.initial(2, 8, 8, 4)


def _plan(load: np.ndarray, current: Placement = START) -> Plan:
    shapes = [BankShape("experts", (10, 10))]
    return make_plan(get_policy("deepseek"), [load], [current], Topology(4), shapes, Budget(100), Thresholds(0.01))


def _seen(load: np.ndarray, plan: Plan) -> Seen:
    """What a window shows of a plan that is live."""
    return Seen(*(float(balancedness(load, placement).mean()) for placement in (plan.banks[0], plan.base[0])))


@pytest.mark.parametrize(("is_same", "level"), [(True, logging.INFO), (False, logging.WARNING)])
def test_the_next_window_measures_the_gain(is_same: bool, level: int, caplog: pytest.LogCaptureFixture) -> None:
    """With the same load the gain is what was predicted; with another one it has stayed away, and the log says so."""
    caplog.set_level(logging.INFO)
    load = np.array([[8.0, 7, 1, 1, 1, 1, 1, 1]] * 2)
    watch = GainWatch(is_telling=True)
    first = _plan(load)
    watch.planned(first, None)
    assert watch.last is None
    assert watch.unmoved is None
    watch.committed(3, first)
    assert watch.last == Gain(3, first.balancedness_before, first.balancedness_after)
    assert not watch.last.stayed_away
    assert watch.unmoved == first.base
    # The two hottest experts stand alone on their ranks' side now; the other load makes two neighbours hot.
    other = np.ones((2, 8))
    for layer, row in enumerate(first.banks[0].physical_to_logical_map):
        other[layer, row[:2]] = 8.0
    window = load if is_same else other
    watch.planned(_plan(window, first.banks[0]), _seen(window, first))
    assert watch.last.stayed_away is not is_same
    if is_same:
        assert watch.last.measured == pytest.approx(watch.last.predicted)
        assert watch.last.unmoved == pytest.approx(watch.last.before)
    (record,) = caplog.records
    assert record.levelno == level
    assert "epoch 3: balancedness" in record.getMessage()
    assert ("see step_interval" in record.getMessage()) is not is_same
    known = watch.last
    assert watch.unmoved is None
    watch.planned(_plan(load), _seen(load, first))
    assert watch.last == known


def test_a_load_that_gets_harder_is_not_held_against_an_epoch() -> None:
    """What counts is how much worse the next window would have been without it."""
    watch = GainWatch(is_telling=False)
    plan = _plan(np.array([[8.0, 7, 1, 1, 1, 1, 1, 1]] * 2))
    watch.committed(1, plan)
    gain = plan.balancedness_after - plan.balancedness_before
    watch.planned(plan, Seen(0.4, 0.4 - gain))
    assert watch.last is not None
    assert watch.last.share == pytest.approx(1.0)
    assert watch.trust == pytest.approx(1.0)


def test_an_epoch_waits_for_a_window_with_load() -> None:
    """Without one nothing is known, and nothing is forgotten."""
    watch = GainWatch(is_telling=False)
    plan = _plan(np.array([[8.0, 7, 1, 1, 1, 1, 1, 1]] * 2))
    watch.committed(1, plan)
    watch.planned(plan, None)
    assert watch.last is not None
    assert watch.last.measured is None
    assert watch.unmoved == plan.base


def test_only_one_rank_tells(caplog: pytest.LogCaptureFixture) -> None:
    """All ranks know the same."""
    caplog.set_level(logging.INFO)
    watch = GainWatch(is_telling=False)
    plan = _plan(np.array([[8.0, 7, 1, 1, 1, 1, 1, 1]] * 2))
    watch.committed(1, plan)
    watch.planned(plan, Seen(0.7, 0.5))
    assert watch.last is not None
    assert (watch.last.measured, watch.last.unmoved) == (0.7, 0.5)
    assert caplog.records == []


def test_trust_follows_what_came_true_and_comes_back() -> None:
    """Half of it is the last epoch's; with each epoch that moves nothing an eighth of what is missing returns."""
    load = np.array([[8.0, 7, 1, 1, 1, 1, 1, 1]] * 2)
    watch = GainWatch(is_telling=False)
    plan = _plan(load)
    for trust in (0.5, 0.25, 0.125, 0.1, 0.1):
        watch.committed(1, plan)
        watch.planned(plan, Seen(0.6, 0.6))  # no better than without it
        assert watch.trust == trust
    skipped = _plan(load, plan.banks[0])
    assert skipped.skip_reason
    watch.planned(skipped, None)
    assert watch.trust == 0.1 + 0.9 / 8
    watch.committed(2, plan)
    watch.planned(skipped, _seen(load, plan))  # as balanced as was predicted
    assert watch.trust > 0.6
