"""When to move: a layer moves where it gives back more time than it takes; the figures are worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from eplb_fsm.placement import BankShape, Budget, Costs, Placement, Thresholds, Topology, make_plan
from eplb_fsm.placement.moves import peer_moves_of_layers
from eplb_fsm.placement.plan import Plan
from eplb_fsm.placement.worth import worth_of_layers
from tests.unit.placement.fixed_policy import Fixed

CURRENT = Placement([[0, 1, 2, 3]] * 3, 4, 2)
TARGET = Placement([[0, 2, 1, 3]] * 3, 4, 2)
LOAD = np.array([[4.0, 4, 1, 1], [9, 9, 1, 1], [1, 4, 4, 1]])
"""Load of the heaviest rank: 8 -> 5, 18 -> 10, 5 -> 5. So of 31 a swap gives back 3, 8 and nothing."""
SHAPES = [BankShape("experts", (10, 10, 10))]
"""Each swap is 20 bytes."""
THRESHOLDS = Thresholds(0.0, horizon_steps=1000, moe_time_share=0.5)


def _costs(lost_s_per_byte: float, *, trust: float = 1.0, bytes_per_s: float = 1e12, step_s: float = 0.031) -> Costs:
    return Costs(step_s, bytes_per_s, lost_s_per_byte, trust)


def _plan(thresholds: Thresholds, costs: Costs | None, max_bytes: int = 0) -> Plan:
    return make_plan(
        Fixed(TARGET), [LOAD], [CURRENT], Topology(2), SHAPES, Budget(100, 2, max_bytes), thresholds, costs
    )


def _moved(plan: Plan) -> list[int]:
    return np.flatnonzero(peer_moves_of_layers(CURRENT, plan.banks[0])).tolist()


def test_saved_and_taken_by_hand() -> None:
    """1000 steps of 31 ms, half of it for experts: 1 of the load is worth 0.5 s, less what passes until it is there."""
    worth = worth_of_layers([LOAD], [CURRENT], [TARGET], SHAPES, THRESHOLDS, _costs(0.01), Topology(2))
    assert worth.num_bytes.tolist() == [20, 20, 20]
    assert worth.saved_share == pytest.approx(np.array([3, 8, 0]) / 31)
    assert worth.saved_s == pytest.approx([1.5, 4.0, 0.0])
    assert worth.cost_s == pytest.approx([0.2, 0.2, 0.2])
    slow = worth_of_layers(
        [LOAD], [CURRENT], [TARGET], SHAPES, THRESHOLDS, _costs(0.01, bytes_per_s=60 / 15.5), Topology(2)
    )
    assert slow.saved_s == pytest.approx([0.75, 2.0, 0.0])  # 60 bytes take 15.5 s, half of the horizon
    doubted = worth_of_layers([LOAD], [CURRENT], [TARGET], SHAPES, THRESHOLDS, _costs(0.01, trust=0.25), Topology(2))
    assert doubted.saved_s == pytest.approx([0.375, 1.0, 0.0])


def test_each_layer_has_to_pay() -> None:
    """The dearer a byte, the fewer layers move; without costs, or without a horizon's costs, all of them do."""
    assert _moved(_plan(THRESHOLDS, None)) == [0, 1, 2]
    assert _moved(_plan(THRESHOLDS, _costs(0.07))) == [0, 1]
    assert _moved(_plan(THRESHOLDS, _costs(0.08))) == [1]
    assert _moved(_plan(THRESHOLDS, _costs(0.08, trust=0.3))) == []


def test_what_pays_keeps_to_the_budget_too() -> None:
    """Of two layers that pay, the one that gives most for each byte."""
    assert _moved(_plan(THRESHOLDS, _costs(0.07), max_bytes=39)) == [1]


def test_an_epoch_that_does_not_pay_says_what_it_weighed() -> None:
    """The reason has both sides, the horizon and what was measured."""
    plan = _plan(THRESHOLDS, _costs(0.3, trust=0.5))
    assert plan.chunks == ()
    assert plan.banks == (CURRENT,)
    assert plan.skip_reason == (
        "does not pay: over horizon_steps=1000 its layers would give back 2.75 s and take 18 s, for 60 bytes "
        "(a step takes 0.031 s, 50% of the predicted gains came true)"
    )


def test_nothing_moves_while_the_layers_are_balanced_enough() -> None:
    """The mean balancedness of 0.73 is compared before the policy is asked; 1 is no bound."""
    assert _moved(_plan(Thresholds(0.0, trigger_balancedness=0.73), None)) == [0, 1, 2]
    plan = _plan(Thresholds(0.0, trigger_balancedness=0.72), None)
    assert plan.skip_reason == "balanced: mean balancedness 0.7269, trigger_balancedness=0.72"
    assert plan.chunks == ()
    even = make_plan(
        Fixed(CURRENT), [np.ones((3, 4))], [CURRENT], Topology(2), SHAPES, Budget(100), Thresholds(0.0), None
    )
    assert even.skip_reason.startswith("no gain")


def test_a_bank_of_larger_experts_weighs_more() -> None:
    """Time of a rank is its load times the bytes of an expert: the draft model saves a tenth of the target."""
    one = [np.array([[4.0, 4, 1, 1]])] * 2
    before, after = Placement([[0, 1, 2, 3]], 4, 2), Placement([[0, 2, 1, 3]], 4, 2)
    shapes = [BankShape("target", (100,)), BankShape("draft", (10,))]
    worth = worth_of_layers(one, [before] * 2, [after] * 2, shapes, THRESHOLDS, _costs(0.0), Topology(2))
    assert worth.saved_share == pytest.approx([300 / 880, 30 / 880])


def test_without_any_load_nothing_is_saved() -> None:
    """No division by nothing."""
    worth = worth_of_layers([np.zeros((3, 4))], [CURRENT], [TARGET], SHAPES, THRESHOLDS, _costs(0.01), Topology(2))
    assert not worth.saved_s.any()
    assert not worth.pays.any()


def test_layers_share_what_bytes_take_by_where_they_come_from() -> None:
    """Layer 0 swaps within a node, layer 1 between two; a byte from another node counts three times as much."""
    current = Placement([[0, 1, 2, 3]] * 2, 4, 4)
    target = Placement([[1, 0, 2, 3], [2, 1, 0, 3]], 4, 4)
    load, shapes = np.array([[4.0, 3, 2, 1]] * 2), [BankShape("experts", (10, 10))]
    nodes = Topology(4, 2, cross_node_price=3.0)
    worth = worth_of_layers([load], [current], [target], shapes, THRESHOLDS, _costs(0.01), nodes)
    assert worth.num_bytes.tolist() == [20, 20]
    assert worth.price.tolist() == [20, 60]
    assert worth.cost_s == pytest.approx([0.1, 0.3])  # 40 bytes take 0.4 s, as measured
    assert worth_of_layers(
        [load], [current], [target], shapes, THRESHOLDS, _costs(0.01), Topology(4)
    ).cost_s == pytest.approx([0.2, 0.2])


def test_of_two_layers_that_save_the_same_the_one_without_other_nodes_goes_first() -> None:
    """Within a budget for one of them."""
    current = Placement([[0, 1, 2, 3, 4, 5, 6, 7]] * 2, 8, 4)
    target = Placement([[0, 5, 2, 3, 4, 1, 6, 7], [0, 3, 2, 1, 4, 5, 6, 7]], 8, 4)
    load = np.array([[9.0, 9, 1, 1, 1, 1, 1, 1]] * 2)
    plan = make_plan(
        Fixed(target),
        [load],
        [current],
        Topology(4, 2, cross_node_price=2.0),
        [BankShape("experts", (10, 10))],
        Budget(100, 2, 20),
        Thresholds(0.0),
    )
    assert np.flatnonzero(peer_moves_of_layers(current, plan.banks[0])).tolist() == [1]
