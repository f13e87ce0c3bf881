"""Generated histories with one thing wrong: the invariant that is named sees it, however the ranks are interleaved."""

from __future__ import annotations

import random

import pytest
from damage import DAMAGES, Damage, History, good_histories
from group import Setup
from hypothesis import given, settings
from hypothesis import strategies as st

from eplb_fsm.core import invariants
from eplb_fsm.core.deadlines import epoch_bound_steps
from eplb_fsm.core.invariants import EVENT_INVARIANTS, Forward, find_violations

SLOTS = st.lists(st.integers(-1, 4), min_size=1, max_size=8)


def broken_in(history: History, setup: Setup) -> set[str]:
    """The names of the invariants that a history breaks."""
    texts = find_violations(history, lambda deadline: epoch_bound_steps(setup.config, setup.lag, deadline))
    return {text.partition(":")[0] for text in texts}


def interleaved(history: History, seed: int) -> History:
    """The same, each rank's own in their order, but otherwise in any other."""
    chosen = random.Random(seed)
    own = {rank: [event for event in history if event.rank == rank] for rank in {event.rank for event in history}}
    order = [event.rank for event in history]
    chosen.shuffle(order)
    return [own[rank].pop(0) for rank in order]


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@settings(max_examples=max(settings().max_examples // 10, 5))
@given(good=good_histories(), nth=st.integers(0, 50), seed=st.integers(0, 2**32))
def test_what_is_wrong_is_seen(damage: Damage, good: tuple[Setup, History], nth: int, seed: int) -> None:
    """A history that breaks nothing breaks the invariant that is named, wherever the thing that is wrong stands."""
    setup, history = good
    assert broken_in(history, setup) == set()
    wrong = damage.done_to(history, nth)
    names = broken_in(wrong, setup)
    assert damage.breaks in names
    assert broken_in(interleaved(wrong, seed), setup) == names


def test_every_invariant_over_events_is_damaged() -> None:
    """There is a damage for every invariant over events."""
    names = {invariant.__name__ for invariant in EVENT_INVARIANTS}
    assert {damage.breaks for damage in DAMAGES.values()} == names | {"epoch_bounded"}


@given(maps=st.lists(st.integers(0, 3), min_size=1, max_size=6), num_ranks=st.integers(2, 4), data=st.data())
def test_a_torn_pass_is_seen(maps: list[int], num_ranks: int, data: st.DataObject) -> None:
    """Passes in which all ranks use one map are not torn; the pass in which one rank uses another is named, alone."""
    order = data.draw(st.permutations([(idx, rank) for idx in range(len(maps)) for rank in range(num_ranks)]))
    forwards = [Forward(rank, idx, maps[idx]) for idx, rank in order]
    assert invariants.no_torn_forward(forwards) == []
    at = data.draw(st.integers(0, len(forwards) - 1))
    forwards[at] = forwards[at]._replace(used_map=-1)
    torn = invariants.no_torn_forward(forwards)
    assert torn
    assert all(text.startswith(f"pass {forwards[at].pass_idx}: ") for text in torn)


@given(mapped=SLOTS, at=st.integers(0, 7))
def test_a_slot_that_differs_is_seen(mapped: list[int], at: int) -> None:
    """Slots that hold what the map says are no violation; the one that holds something else is named, alone."""
    assert invariants.live_equals_map(mapped, mapped) == []
    at %= len(mapped)
    held = [*mapped[:at], 9, *mapped[at + 1 :]]
    assert invariants.live_equals_map(held, mapped) == [f"slot {at} holds 9, the map says {mapped[at]}"]


@given(mapped=SLOTS, at=st.integers(0, 7))
def test_a_replica_that_differs_is_seen(mapped: list[int], at: int) -> None:
    """Replicas that hold the same are no violation; one with other contents is, unless it is alone or empty."""
    held = [f"row {expert}" for expert in mapped]
    assert invariants.replicas_equal(mapped, held) == []
    at %= len(mapped)
    held[at] = "another row"
    has_replica = mapped[at] >= 0 and mapped.count(mapped[at]) > 1
    assert bool(invariants.replicas_equal(mapped, held)) == has_replica


@given(mapped=SLOTS, num_experts=st.integers(1, 6))
def test_an_expert_without_a_slot_is_seen(mapped: list[int], num_experts: int) -> None:
    """The experts that are named are those that no slot has."""
    lost = [f"expert {expert} has no slot" for expert in sorted({*range(num_experts)} - {*mapped})]
    assert invariants.every_expert_reachable(mapped, num_experts) == lost
