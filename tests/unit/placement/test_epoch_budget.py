"""The budget of an epoch: the layers that gain most for each byte go first, and the next epoch finds the others."""

from __future__ import annotations

import numpy as np
import pytest

from eplb_fsm.errors import ConfigError
from eplb_fsm.placement import BankShape, Budget, Placement, Thresholds, Topology, get_policy, make_plan
from eplb_fsm.placement.balancedness import rank_loads
from eplb_fsm.placement.epoch_budget import within_budget
from eplb_fsm.placement.moves import num_peer_moves, peer_moves_of_layers
from eplb_fsm.placement.worth import worth_of_layers

CURRENT = Placement([[0, 1, 2, 3]] * 4, 4, 2)
TARGET = Placement([[0, 2, 1, 3]] * 3 + [[0, 1, 2, 3]], 4, 2)
LOAD = np.array([[4.0, 4, 1, 1], [9, 9, 1, 1], [1, 4, 4, 1], [5, 5, 1, 1]])
"""The swap saves 3 in layer 0, 8 in layer 1 and nothing in layer 2; layer 3 stays."""


def _moved(max_bytes: int, row_bytes: tuple[int, ...] = (10, 10, 10, 10)) -> list[int]:
    shapes, targets = [BankShape("experts", row_bytes)], [TARGET]
    worth = worth_of_layers([LOAD], [CURRENT], targets, shapes, Thresholds(0.0), None, Topology(2))
    assert worth.num_bytes.sum() == 2 * sum(row_bytes[:3])
    (placed,) = within_budget(worth, [CURRENT], targets, max_bytes, must_pay=False)
    return np.flatnonzero(peer_moves_of_layers(CURRENT, placed)).tolist()


def test_what_fits_is_not_touched() -> None:
    """Without a limit, and up to it, the placement is the policy's, also where it gains nothing."""
    assert _moved(0) == _moved(60) == [0, 1, 2]


def test_what_saves_most_for_each_byte_goes_first() -> None:
    """A layer of two experts that come from other ranks is whole or left; one that saves nothing waits."""
    assert _moved(59) == [0, 1]
    assert _moved(39) == [1]
    assert _moved(19) == []
    assert _moved(79, (10, 30, 10, 10)) == [1]  # where an expert is three times as large, so is the time that it takes
    assert _moved(59, (10, 30, 10, 10)) == [0]
    assert _moved(20, (30, 30, 10, 10)) == []


def test_banks_share_the_budget() -> None:
    """The better layer of either bank is chosen."""
    one, other = LOAD[:1], LOAD[1:2]
    first, second = Placement([[0, 1, 2, 3]], 4, 2), Placement([[0, 2, 1, 3]], 4, 2)
    shapes = [BankShape("target", (10,)), BankShape("draft", (10,))]
    worth = worth_of_layers([one, other], [first] * 2, [second] * 2, shapes, Thresholds(0.0), None, Topology(2))
    assert within_budget(worth, [first] * 2, [second] * 2, 20, must_pay=False) == [first, second]


def test_the_next_epochs_bring_the_rest() -> None:
    """Plan after plan keeps to the budget, until the placement is as balanced as without one."""
    rng = np.random.default_rng(5)
    load = rng.lognormal(0.0, 1.2, (6, 16))
    current, topology, shapes = Placement.initial(6, 16, 20, 4), Topology(4), [BankShape("experts", (10,) * 6)]
    policy = get_policy("movement_aware")
    goal = rank_loads(load, policy.plan(load, current, topology)).max(axis=1)
    num_epochs = 0
    while True:
        plan = make_plan(policy, [load], [current], topology, shapes, Budget(100, 2, 100), Thresholds(0.001))
        if plan.skip_reason:
            break
        assert 0 < num_peer_moves(current, plan.banks[0]) * 10 <= 100
        current = plan.banks[0]
        num_epochs += 1
    assert num_epochs > 1
    assert np.allclose(rank_loads(load, current).max(axis=1), goal)


def test_a_budget_below_every_layer_says_so() -> None:
    """The plan is skipped with the bytes that were wanted."""
    plan = make_plan(
        get_policy("movement_aware"),
        [LOAD],
        [CURRENT],
        Topology(2),
        [BankShape("e", (10,) * 4)],
        Budget(100, 2, 9),
        Thresholds(0.01),
    )
    assert "bytes, max_epoch_bytes=9 allows less" in plan.skip_reason
    assert plan.banks == (CURRENT,)


def test_a_negative_budget_is_refused() -> None:
    """One clear error."""
    with pytest.raises(ConfigError, match="epoch_bytes is -1"):
        Budget(10, 2, -1)
