"""Weighted shares: a table never names a slot that holds another expert, at whatever moment it is written."""

from __future__ import annotations

import pytest
import torch
from clusters import Recorded, config, shape

from eplb_fsm.runtime.maps import BankMaps
from eplb_fsm.simulate.cluster import SimulatedRank

SKEWED = torch.tensor([[0]] * 40 + [[1]] * 20 + [[2]] * 6 + [[3], [4], [5]])


def weighted(seed: int = 0, **how: bool | int) -> Recorded:
    """Three ranks with six experts in twelve slots."""
    options = config(policy="shuffle", replica_split="weighted", num_redundant_experts=6, step_interval=20)
    return Recorded(3, seed=seed, options=options, shape=shape(3, num_physical_experts=12), **how)


def entries(maps: BankMaps) -> list[tuple[int, int, list[int]]]:
    """Layer, expert and table of each expert, which must all hold it."""
    found = []
    for layer, counts in enumerate(maps.logical_replica_count.tolist()):
        for expert, count in enumerate(counts):
            slots = maps.logical_to_physical_map[layer, expert].tolist()
            assert count >= 1
            assert set(slots[count:]) <= {-1}
            assert {maps.physical_to_logical_map[layer, slot].item() for slot in slots[:count]} == {expert}
            found.append((layer, expert, slots[:count]))
    return found


def count_tokens(rank: SimulatedRank) -> None:
    """Let both layers see the same skew."""
    for layer in range(2):
        rank.fsm.record(layer, SKEWED)


@pytest.mark.parametrize("max_passes_ahead", [0, 2])
@pytest.mark.parametrize("seed", range(3))
def test_tables_fit_the_map_at_every_moment(seed: int, max_passes_ahead: int) -> None:
    """Through several epochs whose plans cut layers into chunks, and with unequal shares on the way."""
    run = weighted(seed, max_passes_ahead=max_passes_ahead)
    unequal = set()
    while len(run.ranks[0].fsm.outcomes) < 4:
        run.cluster.act()
        for rank in run.ranks:
            count_tokens(rank)
            for layer, expert, slots in entries(rank.maps):
                if len({slots.count(slot) for slot in slots}) > 1:
                    unequal.add((rank.rank, layer, expert))
    run.check()
    assert "COMMITTED" in {outcome for outcome, _ in run.outcomes()}
    assert len(unequal) > 3


def test_an_epoch_that_moves_nothing_still_brings_shares() -> None:
    """The shares follow the load although every expert stays where it is."""
    run = Recorded(
        3,
        options=config(policy="movement_aware", replica_split="weighted", num_redundant_experts=6, min_gain=0.5),
        shape=shape(3, num_physical_experts=12),
    )
    before = [entries(rank.maps) for rank in run.ranks]
    while not all(rank.fsm.outcomes for rank in run.ranks):
        run.cluster.act()
        for rank in run.ranks:
            count_tokens(rank)
    assert {outcome for outcome, _ in run.outcomes()} == {"SKIPPED"}
    after = [entries(rank.maps) for rank in run.ranks]
    assert all(old != new for old, new in zip(before, after, strict=True))
    assert after[0] == after[1] == after[2]


def test_ranks_of_two_nodes_take_replicas_of_their_own() -> None:
    """Each expert has a slot on both nodes, and both ask for it: no table names a slot of the other node."""
    options = config(
        policy="movement_aware", replica_split="weighted", num_redundant_experts=4, num_nodes=2, min_gain=0.9
    )
    run = Recorded(4, options=options, shape=shape(4, num_logical_experts=4, num_physical_experts=8))
    while not all(rank.fsm.outcomes for rank in run.ranks):
        run.cluster.act()
        for rank in run.ranks:
            for layer in range(2):
                rank.fsm.record(layer, torch.tensor([[0], [1], [2], [3]]))
    for rank in run.ranks:
        own_half = range(4) if rank.rank < 2 else range(4, 8)
        assert {slot for _, _, slots in entries(rank.maps) for slot in slots} == set(own_half)
    run.check()
