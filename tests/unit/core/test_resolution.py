"""Resolving a lost decision: the truth table, and that it never contradicts what some rank read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eplb_fsm.core.rank import NEVER
from eplb_fsm.core.resolution import Journal, resolve

ROUND = 7
BEFORE = Journal(posted_round=6, read_round=5)
STAGED = Journal(posted_round=7, posted_staged=True, read_round=6)
UNSTAGED = Journal(posted_round=7, posted_staged=False, read_round=6)
COMMITTED = STAGED._replace(read_round=7, read_commits=2)
WENT_ON = COMMITTED._replace(posted_round=8, posted_staged=False)
REFUSED = STAGED._replace(read_round=7, read_commits=0)
GAVE_UP = STAGED._replace(gave_up_round=7)
STOPPED = Journal(posted_round=6, read_round=5, stopped_from_round=7)


@pytest.mark.parametrize(
    ("others", "verdict"),
    [
        ([STAGED], None),
        ([BEFORE], None),
        ([None], None),
        ([GAVE_UP], 0),
        ([COMMITTED], 2),
        ([WENT_ON], 2),
        ([REFUSED], 0),
        ([UNSTAGED], 0),
        ([STOPPED], 0),
        ([GAVE_UP, STAGED], None),
        ([GAVE_UP, None], None),
        ([GAVE_UP, GAVE_UP], 0),
        ([GAVE_UP, COMMITTED], 2),
        ([None, COMMITTED], 2),
        ([None, UNSTAGED], 0),
        ([BEFORE, REFUSED], 0),
        ([STAGED, STOPPED], 0),
    ],
)
def test_truth_table(others: list[Journal | None], verdict: int | None) -> None:
    """A decision read is adopted; a missing promise, or all giving up, means ABORT; silence keeps it open."""
    assert resolve([GAVE_UP, *others], ROUND) == verdict
    assert resolve([*others, GAVE_UP], ROUND) == verdict


def test_a_new_journal_says_nothing() -> None:
    """A rank that has not posted, read or given up anything shows just that, and keeps every round open."""
    assert Journal() == (0, False, 0, 0, 0, NEVER)
    assert resolve([GAVE_UP, Journal()], ROUND) is None


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[Journal | None], int | None, bool]:
    """Journals that ranks may show about a round: what it committed (None: nobody ever reads it), and who read it."""
    num_ranks = draw(st.integers(2, 5))
    staged = [True] + [draw(st.booleans()) for _ in range(num_ranks - 1)]
    posted = [True] + [draw(st.booleans()) for _ in range(num_ranks - 1)]
    is_complete = all(posted)
    num_chunks = draw(st.integers(1, 3)) if all(staged) else 0
    decision = num_chunks if is_complete else None
    journals: list[Journal | None] = [GAVE_UP]
    has_reader = False
    for rank in range(1, num_ranks):
        if not posted[rank]:
            journals.append(draw(st.sampled_from([None, BEFORE, STOPPED])))
            continue
        own = STAGED if staged[rank] else UNSTAGED
        reads = is_complete and draw(st.booleans())
        has_reader = has_reader or reads
        after = own._replace(read_round=7, read_commits=decision or 0) if reads else own._replace(gave_up_round=7)
        # A mark shows some moment of the rank: before its vote, after it, or after what it did then.
        journals.append(draw(st.sampled_from([None, BEFORE, own, after])))
    return journals, decision, has_reader


@given(history=histories())
def test_adopting_never_contradicts_what_some_rank_read(
    history: tuple[list[Journal | None], int | None, bool],
) -> None:
    """COMMIT is concluded only when it was decided; ABORT only when it was, or when nobody reads a COMMIT."""
    journals, decision, has_reader = history
    verdict = resolve(journals, ROUND)
    if verdict:
        assert verdict == decision
    if verdict == 0:
        assert not decision or not has_reader


@given(history=histories(), hidden=st.sets(st.integers(1, 4)))
def test_seeing_more_never_turns_a_verdict(
    history: tuple[list[Journal | None], int | None, bool], hidden: set[int]
) -> None:
    """What a rank concludes from some journals it also concludes from all of them, so ranks cannot differ."""
    journals, _, _ = history
    fewer = [None if rank in hidden else journal for rank, journal in enumerate(journals)]
    early = resolve(fewer, ROUND)
    assert early is None or early == resolve(journals, ROUND)
