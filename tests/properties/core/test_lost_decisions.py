"""Ranks that lose the decision of a round, each looking at what the others showed at some moment: they agree."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st

from eplb_fsm.core.resolution import Journal, resolve

ROUND = 7
BEFORE = Journal(posted_round=ROUND - 1, read_round=ROUND - 2)


class Move(NamedTuple):
    """Something that a rank does if it can, and how old the journals are that it sees (by rank)."""

    rank: int
    does: str
    ages: tuple[int, ...] = (0, 0, 0, 0)


MOVES = st.lists(
    st.builds(
        Move,
        st.integers(0, 3),
        st.sampled_from(("promise", "promise", "vote", "stop", "read", "give up", "resolve", "resolve")),
        st.sampled_from([*product((0, 1, 99), repeat=4)]),
    ),
    max_size=25,
)


CASTS = st.one_of(
    st.just(("promise",) * 4),
    st.tuples(*[st.sampled_from(("promise", "vote", "stop", "nothing"))] * 4),
)
"""What each rank does first."""
MANY = settings(max_examples=max(settings().max_examples, 1000))
"""A round takes no time."""


class Ranks:
    """The journals of all ranks, and what each concluded about one round."""

    def __init__(self, num_ranks: int, casts: tuple[str, ...], num_chunks: int) -> None:
        self._num_chunks = num_chunks
        self.shown: list[list[Journal | None]] = [[None, BEFORE] for _ in range(num_ranks)]
        """All that each has ever shown, oldest first."""
        self.verdicts: dict[int, int] = {}
        for rank, does in enumerate(casts[:num_ranks]):
            self.make(Move(rank, does))

    def make(self, move: Move) -> None:
        """Let a rank do something, if it can."""
        rank = move.rank % len(self.shown)
        own = self.shown[rank][-1]
        assert own is not None
        new = self._after(rank, own, move)
        if new is not None:
            self.shown[rank].append(new)

    def _after(self, rank: int, own: Journal, move: Move) -> Journal | None:
        has_cast = own.posted_round == ROUND or own.stopped_from_round == ROUND
        is_open = own.posted_round == ROUND and own.read_round != ROUND
        may_read = is_open and own.gave_up_round != ROUND
        if move.does in ("promise", "vote") and not has_cast:
            return own._replace(posted_round=ROUND, posted_staged=move.does == "promise")
        if move.does == "stop" and not has_cast:
            return own._replace(stopped_from_round=ROUND)
        if move.does == "give up" and may_read:
            return own._replace(gave_up_round=ROUND)
        if move.does == "read" and may_read:
            return self._concludes(rank, own, self._decision())
        if move.does == "resolve" and is_open and not may_read and own.posted_staged:
            return self._concludes(rank, own, resolve(self._seen_by(rank, move.ages), ROUND))
        return None

    def _concludes(self, rank: int, own: Journal, verdict: int | None) -> Journal | None:
        if verdict is None:
            return None
        self.verdicts[rank] = verdict
        return own._replace(read_round=ROUND, read_commits=verdict)

    def _decision(self) -> int | None:
        """How many chunks the round commits, None while a vote is missing."""
        last = [shown[-1] for shown in self.shown]
        assert None not in last
        journals = [journal for journal in last if journal is not None]
        if any(journal.stopped_from_round == ROUND for journal in journals):
            return 0
        if any(journal.posted_round < ROUND for journal in journals):
            return None
        return self._num_chunks if all(journal.posted_staged for journal in journals) else 0

    def _seen_by(self, rank: int, ages: tuple[int, ...]) -> list[Journal | None]:
        """Its own journal as it is; of the others one that they have shown at some time."""
        ages = (*ages[:rank], 0, *ages[rank + 1 :])
        return [shown[max(len(shown) - 1 - age, 0)] for shown, age in zip(self.shown, ages, strict=False)]


@MANY
@given(num_ranks=st.integers(2, 4), casts=CASTS, moves=MOVES, num_chunks=st.integers(1, 3))
def test_all_conclude_the_same(num_ranks: int, casts: tuple[str, ...], moves: list[Move], num_chunks: int) -> None:
    """Whatever ranks do and however old the journals are that each sees, all that conclude anything agree."""
    ranks = Ranks(num_ranks, casts, num_chunks)
    for move in moves:
        ranks.make(move)
    assert len(set(ranks.verdicts.values())) <= 1


@MANY
@given(num_ranks=st.integers(2, 4), casts=CASTS, moves=MOVES, num_chunks=st.integers(1, 3))
def test_a_rank_is_not_left_in_doubt(
    num_ranks: int, casts: tuple[str, ...], moves: list[Move], num_chunks: int
) -> None:
    """Once every rank has voted and has read the round or given it up, whoever then looks concludes something."""
    ranks = Ranks(num_ranks, casts, num_chunks)
    for move in moves:
        ranks.make(move)
    for does in ("vote", "give up", "resolve"):
        for rank in range(num_ranks):
            ranks.make(Move(rank, does))
    last = [shown[-1] for shown in ranks.shown]
    in_doubt = [it for it in last if it is not None and it.posted_staged and it.read_round != ROUND]
    assert in_doubt == []
