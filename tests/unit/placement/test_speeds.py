"""Ranks that are not alike: a slow one gets less, one of speed 0 gets nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from test_movement_aware import NUM_LOGICAL, NUM_RANKS, drifted

from eplb_fsm.errors import ConfigError
from eplb_fsm.offline.comparison import num_duplicates
from eplb_fsm.placement import BankShape, Budget, Placement, Thresholds, Topology, get_policy, make_plan
from eplb_fsm.placement.balancedness import balancedness, balancedness_summary, rank_loads
from eplb_fsm.placement.kernels.vacate import vacate_layers
from eplb_fsm.placement.moves import num_peer_moves
from eplb_fsm.placement.policies import MovementAwarePolicy, RefinedPolicy
from eplb_fsm.placement.split import weighted_rank_loads, weighted_shares
from tests.benchmarks.split import lightest_heaviest_rank

ALIKE = Topology(NUM_RANKS)
ONE_SLOW = Topology(NUM_RANKS, speeds=(1.0, 1.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0))
MIXED = Topology(NUM_RANKS, speeds=(2.0, 1.0, 0.5, 1.0, 3.0, 1.0, 1.0, 0.25))
DEAR = Thresholds(0.5, trigger_balancedness=0.01)
ONE_LEAVES = Topology(NUM_RANKS, speeds=(1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0))


def held_by(placement: Placement, rank: int) -> np.ndarray:
    """What a rank's slots hold in each layer."""
    return placement.physical_to_logical_map.reshape(placement.num_moe_layers, placement.num_ranks, -1)[:, rank]


def test_balancedness_is_told_by_time() -> None:
    """Loads in proportion to the speeds are perfect; equal loads are not; the engines' formulas know no speeds."""
    placement, speeds = Placement.initial(1, 4, 4, 4), np.array([1.0, 2.0, 4.0, 1.0])
    assert balancedness([[5.0, 10.0, 20.0, 5.0]], placement, speeds).tolist() == [1.0]
    assert balancedness([[1.0, 1.0, 1.0, 1.0]], placement, speeds).tolist() == [0.5]
    assert balancedness_summary([[1.0, 1.0, 1.0, 1.0]], placement, "min", speeds) == 0.5
    assert balancedness_summary([[1.0, 1.0, 1.0, 1.0]], placement, "vllm", speeds) == 1.0


@pytest.mark.parametrize("topology", [ONE_SLOW, MIXED], ids=["one slow", "mixed"])
def test_slow_ranks_get_less(topology: Topology) -> None:
    """Every layer reaches the target by time; where all ranks are taken as alike none comes near it."""
    for seed in range(5):
        current, load = drifted(seed)
        planned = MovementAwarePolicy(0.95).plan(load, current, topology)
        unaware = MovementAwarePolicy(0.95).plan(load, current, ALIKE)
        assert balancedness(load, planned, topology.counted_speeds).min() >= 0.95 - 1e-9
        assert balancedness(load, unaware, topology.counted_speeds).max() < 0.65
        assert num_duplicates(planned) <= num_duplicates(current)


def test_only_ratios_of_speeds_count() -> None:
    """Equal ones change nothing, whatever they are; twice as high ones neither."""
    current, load = drifted(0)
    policy = MovementAwarePolicy(0.99)
    alike = policy.plan(load, current, ALIKE)
    for speed in (1.0, 3.0, 0.01):
        assert policy.plan(load, current, Topology(NUM_RANKS, speeds=(speed,) * NUM_RANKS)) == alike
    twice = Topology(NUM_RANKS, speeds=tuple(2.0 * speed for speed in MIXED.speeds))
    assert policy.plan(load, current, twice) == policy.plan(load, current, MIXED)


def test_a_fast_rank_is_no_reason_to_replicate() -> None:
    """It may carry experts that no other could."""
    topology = Topology(4, speeds=(1.0, 1.0, 1.0, 8.0))
    current = Placement([[0, 1, 2, 3, 4, 5, 6, 7]], 8, 4)
    planned = MovementAwarePolicy(0.9).plan(np.array([[1.0, 1, 1, 1, 1, 1, 6, 8]]), current, topology)
    assert planned == current


def test_a_rank_of_speed_0_does_not_count() -> None:
    """Perfect is perfect among the others, also where those are slow."""
    placement = Placement([[0, 1, -1]], 2, 3)
    for speeds in ((1.0, 1.0, 0.0), (0.01, 0.01, 0.0)):
        counted = Topology(3, speeds=speeds).counted_speeds
        assert balancedness([[5.0, 5.0]], placement, counted)[0] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("policy", [MovementAwarePolicy(0.9), RefinedPolicy()], ids=lambda policy: str(policy.name))
def test_a_rank_of_speed_0_holds_nothing(policy: MovementAwarePolicy | RefinedPolicy) -> None:
    """The others hold all experts, also in layers without load, and are balanced among each other."""
    current, load = drifted(1)
    load[3] = 0.0
    planned = policy.plan(load, current, ONE_LEAVES)
    assert (held_by(planned, 2) == -1).all()
    assert balancedness(load, planned, ONE_LEAVES.counted_speeds).min() >= 0.9
    assert num_duplicates(planned) <= num_duplicates(current)


def test_only_what_has_to_moves_away() -> None:
    """Far fewer experts move than in a new plan, and a rank that comes back gets its share again."""
    current, load = drifted(1)
    policy = MovementAwarePolicy(0.9)
    left = policy.plan(load, current, ONE_LEAVES)
    assert num_peer_moves(current, left) < RefinedPolicy().plan(load, current, ONE_LEAVES).num_moe_layers * NUM_LOGICAL
    assert num_peer_moves(current, left) < num_peer_moves(current, RefinedPolicy().plan(load, current, ONE_LEAVES)) / 2
    back = policy.plan(load, left, ALIKE)
    assert balancedness(load, back).min() >= 0.9 - 1e-9
    assert (held_by(back, 2) >= 0).any(axis=1).all()


def test_what_has_to_leave_comes_first_within_a_budget() -> None:
    """Epoch after epoch, whatever it gains; a budget below every layer is said."""
    current, load = drifted(1)
    load[:4] = 0.0
    shapes = [BankShape("experts", (10,) * 6)]
    for _ in range(20):
        plan = make_plan(MovementAwarePolicy(), [load], [current], ONE_LEAVES, shapes, Budget(1000, 2, 150), DEAR)
        if not ONE_LEAVES.held_in_vain(current).any():
            break
        assert not plan.skip_reason
        current = plan.banks[0]
    assert (held_by(current, 2) == -1).all()
    full = drifted(1)[0]
    plan = make_plan(MovementAwarePolicy(), [load], [full], ONE_LEAVES, shapes, Budget(1000, 2, 10), DEAR)
    assert "max_epoch_bytes=10 allows less" in plan.skip_reason


def test_a_layer_without_load_is_not_touched_again() -> None:
    """Once the rank is empty."""
    current, load = drifted(1)
    left = RefinedPolicy().plan(load, current, ONE_LEAVES)
    load[3] = 0.0
    rows = RefinedPolicy().plan(load, left, ONE_LEAVES).physical_to_logical_map
    assert rows[3].tolist() == left.physical_to_logical_map[3].tolist()


def test_all_kernels_are_warm() -> None:
    """Also the one that only a rank of speed 0 needs."""
    pytest.importorskip("numba")
    MovementAwarePolicy().warm_up()
    kernel: Any = vacate_layers
    assert kernel.signatures


def test_nodes_are_not_kept_where_one_has_fewer_slots() -> None:
    """Expert groups leave their nodes rather than having no place."""
    topology = Topology(NUM_RANKS, 2, 8, speeds=ONE_LEAVES.speeds)
    current, load = drifted(2)
    planned = MovementAwarePolicy(0.9).plan(load, current, topology)
    assert (held_by(planned, 2) == -1).all()
    assert balancedness(load, planned, topology.counted_speeds).min() >= 0.9 - 1e-9


def test_refinement_beats_deepseek_by_time_on_every_layer() -> None:
    """And a second plan for the same load moves nothing."""
    current, load = drifted(3)
    planned = RefinedPolicy().plan(load, current, MIXED)
    anew = get_policy("deepseek_global").plan(load, current, MIXED)
    speeds = MIXED.counted_speeds
    assert (balancedness(load, planned, speeds) > balancedness(load, anew, speeds)).all()
    assert balancedness(load, planned, speeds).min() > 0.97
    assert num_peer_moves(planned, RefinedPolicy().plan(load, planned, MIXED)) == 0


def test_weighted_shares_are_the_best_for_the_speeds() -> None:
    """The slowest rank is as quick as a linear program can make it, within 1 %."""
    for seed in range(5):
        current, load = drifted(seed)
        speeds = MIXED.counted_speeds
        slowest = (weighted_rank_loads(load, current, speeds) / speeds).max(axis=1)
        for layer, row in enumerate(current.physical_to_logical_map):
            optimum = lightest_heaviest_rank(load[layer], row, NUM_RANKS, speeds)
            assert optimum * (1 - 1e-9) <= slowest[layer] <= optimum * 1.01
        shares = weighted_shares(load, current, speeds=speeds)
        assert (rank_loads(load, current, shares) / speeds).max(axis=1) == pytest.approx(slowest)


def test_weighted_shares_save_moves_for_a_slow_rank() -> None:
    """Where another replica can take the tokens, no expert has to move for it."""
    moves = []
    for split in ("equal", "weighted"):
        policy = MovementAwarePolicy(0.85, split)
        plans = [(current, policy.plan(load, current, ONE_SLOW)) for current, load in map(drifted, range(3))]
        moves.append(sum(num_peer_moves(current, planned) for current, planned in plans))
    assert 0 < moves[1] < moves[0]


def test_a_plan_is_weighed_by_time() -> None:
    """A rank of half the speed is a reason to move; a policy that gives it no less gains nothing."""
    current, load = drifted(4, 0.0)
    how = ([BankShape("experts", (10,) * 6)], Budget(1000), Thresholds(0.01))
    plan = make_plan(MovementAwarePolicy(), [load], [current], ONE_SLOW, *how)
    assert plan.balancedness_before < 0.65
    assert plan.balancedness_after > 0.94
    assert make_plan(get_policy("deepseek_global"), [load], [current], ONE_SLOW, *how).skip_reason.startswith("no gain")


@pytest.mark.parametrize(
    ("speeds", "message"),
    [
        ((1.0, 1.0), "2 speeds for 4 ranks"),
        ((1.0, -1.0, 1.0, 1.0), "speed of a rank is -1.0"),
        ((1.0, float("nan"), 1.0, 1.0), "speed of a rank is nan"),
        ((1.0, 0.001, 1.0, 1.0), "from 0.01 to 100"),
        ((0.0, 0.0, 0.0, 0.0), "all speeds are 0"),
    ],
)
def test_speeds_that_cannot_be_are_refused(speeds: tuple[float, ...], message: str) -> None:
    """With one clear error."""
    with pytest.raises(ConfigError, match=message):
        Topology(4, speeds=speeds)


@pytest.mark.parametrize("policy", [MovementAwarePolicy(), RefinedPolicy()], ids=lambda policy: str(policy.name))
def test_too_few_slots_are_refused(policy: MovementAwarePolicy | RefinedPolicy) -> None:
    """Where the ranks that are left have no slot for each expert."""
    with pytest.raises(ConfigError, match="6 slots, too few for 8 experts"):
        policy.plan(np.ones((1, 8)), Placement.initial(1, 8, 8, 4), Topology(4, speeds=(1.0, 0.0, 1.0, 1.0)))
