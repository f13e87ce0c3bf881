"""A rank that gives its experts away, and takes some back: through agreed epochs, on all ranks alike."""

from __future__ import annotations

import pytest
import torch
from clusters import Recorded, config, shape

from eplb_fsm.core.reasons import AbortReason
from eplb_fsm.errors import ConfigError

LOAD = torch.tensor([[0]] * 40 + [[1]] * 30 + [[2]] * 20 + [[3]] * 20 + [[4]] * 20 + [[5]] * 20)


def run_with(policy: str = "movement_aware", **changes: float | str) -> Recorded:
    """Three ranks with six experts in twelve slots."""
    options = config(policy=policy, num_redundant_experts=6, step_interval=20, target_balancedness=0.9, **changes)
    return Recorded(3, options=options, shape=shape(3, num_physical_experts=12))


def run_epochs(run: Recorded, count: int, layers: tuple[int, ...] = (0, 1)) -> None:
    """Go on until every rank has seen so many more epochs, with tokens in some layers."""
    wanted = len(run.ranks[0].fsm.outcomes) + count
    while any(len(rank.fsm.outcomes) < wanted for rank in run.ranks):
        run.cluster.act()
        for rank in run.ranks:
            for layer in layers:
                rank.fsm.record(layer, LOAD)


def held_by(run: Recorded, rank: int) -> list[list[int]]:
    """What the live maps, the same on all ranks, have on a rank's slots."""
    maps = [seen.maps.physical_to_logical_map.reshape(2, 3, -1).tolist() for seen in run.ranks]
    assert maps[0] == maps[1] == maps[2]
    return [sorted(layer[rank]) for layer in maps[0]]


@pytest.mark.parametrize(
    "options",
    [
        {"plan_source": "lowest_rank"},
        {"plan_source": "every_rank"},
        {"replica_split": "weighted"},
        {"replica_split": "weighted", "min_gain": 0.5, "trigger_balancedness": 0.1, "horizon_steps": 3000},
    ],
    ids=str,
)
def test_a_rank_of_speed_0_is_emptied_and_filled_again(options: dict[str, float | str]) -> None:
    """Only the rank itself says so, and no threshold is in the way; no table names a slot of its afterwards."""
    run = run_with(**options)
    run.ranks[1].fsm.set_speed(0.0)
    run_epochs(run, 2)
    assert held_by(run, 1) == [[-1] * 4] * 2
    run.ranks[1].fsm.set_speed(1.0)
    if "min_gain" not in options:
        run_epochs(run, 2)
        assert all(max(layer) >= 0 for layer in held_by(run, 1))
    run.check()
    assert "COMMITTED" in {outcome for outcome, _ in run.outcomes()}


def test_a_layer_without_load_leaves_too() -> None:
    """Although there is nothing to gain; and without any load at all."""
    for layers in ((0,), ()):
        run = run_with(horizon_steps=3000)
        run.ranks[1].fsm.set_speed(0.0)
        run_epochs(run, 3, layers)
        assert held_by(run, 1) == [[-1] * 4] * 2
        run.check()


def test_a_slow_rank_gets_less_of_the_tokens_too() -> None:
    """With weighted shares its slots are named by fewer entries of the tables."""
    run = run_with(replica_split="weighted", min_gain=0.9)  # nothing moves, the shares follow
    run.ranks[2].fsm.set_speed(0.1)
    run_epochs(run, 1)
    tables = run.ranks[0].maps.logical_to_physical_map
    slots = tables[tables >= 0]
    assert {outcome for outcome, _ in run.outcomes()} == {"SKIPPED"}
    assert 0 < (slots >= 8).sum() < 0.2 * len(slots)
    run.check()


def test_if_no_rank_is_to_hold_experts_the_epoch_fails_with_the_reason() -> None:
    """And serving goes on with the maps that there are."""
    run = run_with()
    for rank in run.ranks:
        rank.fsm.set_speed(0.0)
    before = held_by(run, 0)
    run_epochs(run, 1)
    assert {outcome.reason for outcome in run.ranks[0].fsm.outcomes} == {AbortReason.POLICY_ERROR}
    assert held_by(run, 0) == before


def test_speeds_that_would_change_nothing_are_refused() -> None:
    """By the call itself: a policy that treats all ranks alike, a speed out of range."""
    with pytest.raises(ConfigError, match="choose policy 'movement_aware'"):
        run_with("deepseek").ranks[0].fsm.set_speed(0.5)
    with pytest.raises(ConfigError, match="speed of a rank is 1000"):
        run_with().ranks[0].fsm.set_speed(1000.0)
