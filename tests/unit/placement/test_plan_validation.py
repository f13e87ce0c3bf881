"""Decoding refuses, by name, each way in which a plan can be wrong."""

from __future__ import annotations

import numpy as np
import pytest

from eplb_fsm.errors import PlanError
from eplb_fsm.placement import BankShape, Budget, Placement, Plan, live_digest
from eplb_fsm.placement.digest import words_digest
from eplb_fsm.placement.plan import encoded

# Four ranks of two slots; expert 0 has three copies, the others one or two.
CURRENT = Placement([[0, 1, 0, 2, 0, 3, 1, 2]], 4, 4)
SHAPES = [BankShape("experts", (10,))]
BUDGET = Budget(20)
Moves = list[list[int]]


def sealed(*chunks: Moves, base: Placement = CURRENT, reason: str = "", bank: int = 0) -> np.ndarray:
    """The words of a plan with these chunks, whatever they say."""
    arrays = [(bank, np.array(moves, dtype=np.int64).reshape(-1, 4)) for moves in chunks]
    return encoded(live_digest([base]), 1, arrays, reason, (0.5, 0.75))


def decode(words: np.ndarray) -> Plan:
    """Decode as a rank would."""
    return Plan.decode(words, [CURRENT], SHAPES, BUDGET)


def test_a_good_plan_is_accepted() -> None:
    """The plan that the wrong ones are made from is right."""
    plan = decode(sealed([[0, 2, 5, 3]], [[0, 7, 5, 3]]))
    assert plan.banks[0].physical_to_logical_map.tolist() == [[0, 1, 3, 2, 0, 3, 1, 3]]
    assert (plan.balancedness_before, plan.balancedness_after) == (0.5, 0.75)


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ([[[1, 2, 5, 3]]], "every layer, slot and expert must exist"),
        ([[[-1, 2, 5, 3]]], "every layer, slot and expert must exist"),
        ([[[0, 8, 5, 3]]], "every layer, slot and expert must exist"),
        ([[[0, -1, 5, 3]]], "every layer, slot and expert must exist"),
        ([[[0, 2, 8, 3]]], "every layer, slot and expert must exist"),
        ([[[0, 2, -2, 3]]], "every layer, slot and expert must exist"),
        ([[[0, 2, 5, 4]]], "every layer, slot and expert must exist"),
        ([[[0, 2, 5, -2]]], "every layer, slot and expert must exist"),
        ([[[0, 2, -1, 3]]], "a source exactly if it brings an expert"),
        ([[[0, 2, 5, -1]]], "a source exactly if it brings an expert"),
        ([[[0, 7, 5, 3], [0, 2, 5, 3]]], "must ascend by layer and destination"),
        ([[[0, 2, 5, 3], [0, 2, 5, 3]]], "must ascend by layer and destination"),
        ([[[0, 2, 5, 3]], [[0, 2, 3, 2]]], "a slot may be written once"),
        ([[[0, 2, 0, 0]]], "a move must change the slot"),
        ([[[0, 2, 4, 3]]], "the source must hold the expert before the chunk"),
        ([[[0, 2, 5, 3], [0, 3, 2, 3]]], "the source must hold the expert before the chunk"),
        ([[[0, 4, 6, 1]], [[0, 6, 4, 0]]], "the source must hold the expert before the chunk"),
        ([[[0, 2, 7, 2]]], "a rank that holds the expert must copy it locally"),
        ([[[0, 2, 5, 3]], [[0, 3, 5, 3]]], "a rank that holds the expert must copy it locally"),
        ([[[0, 4, 1, 1], [0, 5, 6, 1]]], "must share one source"),
        ([[[0, 1, 3, 2], [0, 6, 5, 3]]], "every expert must keep at least one copy"),
        ([[[0, 5, 6, 1]], [[0, 2, 5, 1]]], "every expert must keep at least one copy"),
        ([[[0, 0, -1, -1], [0, 2, -1, -1], [0, 4, -1, -1]]], "every expert must keep at least one copy"),
    ],
)
def test_each_broken_rule_is_named(chunks: list[Moves], message: str) -> None:
    """A plan that breaks one rule is refused with that rule and the first move that breaks it."""
    with pytest.raises(PlanError, match=message) as caught:
        decode(sealed(*chunks))
    assert "drop this plan and make another" in str(caught.value)


@pytest.mark.parametrize(
    ("moves", "allowed"),
    [
        # Rank 1 writes both its slots; rank 2 sends twice; both slots of rank 3 get one transfer.
        ([[0, 2, 5, 3], [0, 3, 1, 1]], 20),
        ([[0, 2, 5, 3], [0, 7, 5, 3]], 20),
        ([[0, 6, 5, 3], [0, 7, 5, 3]], 20),
    ],
)
def test_the_budget_bounds_writes_and_sends(moves: Moves, allowed: int) -> None:
    """A byte less than a rank writes or sends, and the plan is refused."""
    Plan.decode(sealed(moves), [CURRENT], SHAPES, Budget(allowed))
    with pytest.raises(PlanError, match=f"more than commit_bytes={allowed - 1}"):
        Plan.decode(sealed(moves), [CURRENT], SHAPES, Budget(allowed - 1))


def test_a_plan_for_other_placements_is_refused() -> None:
    """A plan names the placements that it starts from; others are not moved by it."""
    words = sealed([[0, 2, 5, 3]], base=CURRENT.with_layer(0, [0, 1, 0, 2, 0, 3, 1, 1]))
    with pytest.raises(PlanError, match="starts from placements of digest"):
        decode(words)


@pytest.mark.parametrize("bank", [-1, 1])
def test_an_unknown_bank_is_refused(bank: int) -> None:
    """A chunk of a bank that is not there is refused."""
    with pytest.raises(PlanError, match="a known bank"):
        decode(sealed([[0, 2, 5, 3]], bank=bank))


def test_an_empty_chunk_is_refused() -> None:
    """A chunk without moves would be a round for nothing."""
    with pytest.raises(PlanError, match="every chunk needs moves"):
        decode(sealed([[0, 2, 5, 3]], []))


def test_chunks_and_a_reason_to_skip_exclude_each_other() -> None:
    """A plan does something or says why not."""
    for words in (sealed(), sealed([[0, 2, 5, 3]], reason="no gain")):
        with pytest.raises(PlanError, match="not both or none"):
            decode(words)
    assert decode(sealed(reason="no gain: because")).skip_reason == "no gain: because"


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, 7, "not an encoded plan of this version"),
        (1, 7, "does not match its digest"),
        (3, 2, "in 2 banks"),
        (4, 2, "do not add up"),
        (5, 2, "do not add up"),
        (5, -2, "do not add up"),
        (6, 1 << 40, "do not add up"),
        (10, 2, "hold 2 of 1 moves"),
    ],
)
def test_counts_that_do_not_fit_are_refused(at: int, value: int, message: str) -> None:
    """A header that does not describe the rest is refused even if the digest fits it."""
    words = sealed([[0, 2, 5, 3]])
    words[at] = value
    words[-1] = words_digest(words[:-1])
    with pytest.raises(PlanError, match=message):
        decode(words)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros(0, dtype=np.int64),
        np.zeros(30, dtype=np.int64),
        np.zeros((3, 10), dtype=np.int64),
        np.zeros(30, dtype=np.float64),
        np.zeros(30, dtype=np.int32),
    ],
)
def test_other_arrays_are_refused(array: np.ndarray) -> None:
    """What is not a plan at all is refused as such."""
    with pytest.raises(PlanError, match="not an encoded plan"):
        decode(array)


def test_a_reason_that_is_no_text_is_refused() -> None:
    """Damaged text under a fitting digest is refused, not passed on to a log."""
    words = sealed(reason="no gain: \u00e4")
    words[10] = -1
    words[-1] = words_digest(words[:-1])
    with pytest.raises(PlanError, match="is not text"):
        decode(words)


def test_the_decoded_plan_does_not_share_the_callers_memory() -> None:
    """A reused receive buffer does not change a plan, and nobody can write into one."""
    words = sealed([[0, 2, 5, 3]])
    plan = decode(words)
    words[:] = 0
    assert plan.chunks[0].moves.tolist() == [[0, 2, 5, 3]]
    for array in (plan.encode(), plan.chunks[0].moves, plan.chunks[0].emptied):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0
