"""What decoding accepts: nothing damaged, and nothing that is not a path of valid placements."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from instances import Problem, problems
from path_checker import carry_out, contents_of

from eplb_fsm.errors import PlanError
from eplb_fsm.placement import Plan
from eplb_fsm.placement.digest import words_digest
from eplb_fsm.placement.plan import encoded

MANY = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
WORDS = st.integers(-(2**63), 2**63 - 1)
Cuts = list[tuple[int, list[list[int]]]]


def decoded(words: np.ndarray, problem: Problem) -> Plan:
    """Decode for a problem."""
    return Plan.decode(words, problem.current, problem.shapes, problem.budget)


@MANY
@given(problems(), st.data())
def test_one_damaged_word_is_rejected(problem: Problem, data: st.DataObject) -> None:
    """Whatever word is changed to whatever value, the plan is refused."""
    words = problem.plan().encode().copy()
    at = data.draw(st.integers(0, len(words) - 1))
    words[at] = data.draw(WORDS.filter(lambda value: value != words[at]))
    with pytest.raises(PlanError):
        decoded(words, problem)


@MANY
@given(problems(), st.data())
def test_one_damaged_word_under_a_new_digest_is_another_plan(problem: Problem, data: st.DataObject) -> None:
    """If the digest word is made to fit, the plan is refused, or valid but of another digest."""
    plan = problem.plan()
    words = plan.encode().copy()
    at = data.draw(st.integers(0, len(words) - 2))
    small = st.integers(-1, 12)
    words[at] = data.draw((small | WORDS).filter(lambda value: value != words[at]))
    words[-1] = words_digest(words[:-1])
    try:
        other = decoded(words, problem)
    except PlanError:
        return
    assert other.digest != plan.digest
    banks = carry_out(other, problem.shapes, problem.budget)
    assert banks == [contents_of(target) for target in other.banks]


@MANY
@given(problems(), st.data())
def test_words_that_change_places_are_rejected(problem: Problem, data: st.DataObject) -> None:
    """Two exchanged words, a missing or a doubled word are refused."""
    words = problem.plan().encode().copy()
    a, b = (data.draw(st.integers(0, len(words) - 1)) for _ in range(2))
    for damaged in (np.delete(words, a), np.insert(words, a, words[a])):
        with pytest.raises(PlanError):
            decoded(damaged, problem)
    assume(words[a] != words[b])
    words[[a, b]] = words[[b, a]]
    with pytest.raises(PlanError):
        decoded(words, problem)


def _edited(cuts: Cuts, data: st.DataObject) -> Cuts:
    """One or two random edits of the chunks of a plan, of the kinds that a wrong planner could make."""
    for _ in range(data.draw(st.integers(1, 2))):
        if all(moves for _, moves in cuts):
            chunk = data.draw(st.integers(0, len(cuts) - 1))
            _edit(cuts, chunk, data.draw(st.integers(0, len(cuts[chunk][1]) - 1)), data)
    for _, moves in cuts:
        moves.sort()
    return cuts


def _edit(cuts: Cuts, chunk: int, at: int, data: st.DataObject) -> None:
    bank, moves = cuts[chunk]
    other = data.draw(st.integers(0, len(cuts) - 1))
    match data.draw(st.sampled_from(("word", "drop", "elsewhere", "merge", "swap", "bank", "split"))):
        case "word":
            moves[at][data.draw(st.integers(0, 3))] = data.draw(st.integers(-2, 12))
        case "drop":
            del moves[at]
        case "elsewhere":
            cuts[other][1].append(moves.pop(at))
        case "merge" if other != chunk:
            cuts[other][1].extend(moves)
            del cuts[chunk]
        case "swap":
            cuts[chunk], cuts[other] = cuts[other], cuts[chunk]
        case "bank":
            cuts[chunk] = (data.draw(st.integers(-1, 2)), moves)
        case "split":
            cuts.insert(chunk + 1, (bank, moves[at:]))
            del moves[at:]


@settings(MANY, max_examples=800)
@given(problems(), st.data())
def test_only_valid_paths_are_accepted(problem: Problem, data: st.DataObject) -> None:
    """A plan edited at random and sealed anew is refused, or it keeps every promise of a plan."""
    plan = problem.plan()
    assume(plan.chunks)
    cuts: Cuts = []
    for chunk in plan.chunks:
        emptied = [[layer, slot, -1, -1] for layer, slot in chunk.emptied.tolist()]
        cuts.append((chunk.bank, sorted(chunk.moves.tolist() + emptied)))
    arrays = [(bank, np.array(m, dtype=np.int64).reshape(-1, 4)) for bank, m in _edited(cuts, data)]
    words = encoded(plan.base_digest, len(plan.base), arrays, "", (0.0, 0.0))
    try:
        other = decoded(words, problem)
    except PlanError:
        return
    banks = carry_out(other, problem.shapes, problem.budget)
    assert banks == [contents_of(target) for target in other.banks]
