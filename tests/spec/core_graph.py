"""The state graph of real cores: every order in which ranks can make the calls that the driver makes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from graphs import Call, Graph, Table
from projections import project_vote
from replayed_rank import Move, ReplayedRank, Snapshot

from eplb_fsm.core.states import State
from eplb_fsm.core.votes import Vote

_NUM_KEPT_VOTES = 3
"""Of each rank; nobody reads an older one any more."""


class _State(NamedTuple):
    ranks: tuple[Snapshot, ...]
    cast: tuple[tuple[Vote | None, ...], ...]


class Explorer:
    """Breadth-first search over the cores of all ranks.

    Args:
        setup: The constants of the spec, as TLC prints them.
        table: Numbers what the graph is made of.
    """

    def __init__(self, setup: Mapping[str, Any], table: Table) -> None:
        self._setup = setup
        self._ranks = [ReplayedRank(rank, setup, table) for rank in range(self._setup["num_ranks"])]
        self._table = table
        self._casts: dict[tuple[Vote | None, ...], int] = {}

    def explore(self) -> Graph:
        """Return the graph of all that can be reached."""
        graph = Graph(self._table)
        no_votes = (None,) * _NUM_KEPT_VOTES
        first = _State(tuple(rank.initial for rank in self._ranks), (no_votes,) * len(self._ranks))
        graph.initial = self._canonical(first)
        seen = {first}
        queue = deque(seen)
        while queue:
            state = queue.popleft()
            source = self._canonical(state)
            for call, target in self._moves(state):
                if not self._is_bounded(target):
                    continue
                graph.edges[source, self._table.number(call), self._canonical(target)] = None
                if target not in seen:
                    seen.add(target)
                    queue.append(target)
        return graph

    def _is_bounded(self, state: _State) -> bool:
        cores = [own.attributes for own in state.ranks]
        epoch = max(core["epoch"] for core in cores)
        round_idx = max(core["round_idx"] for core in cores)
        return epoch <= self._setup["max_epochs"] and round_idx <= self._setup["max_rounds"]

    def _moves(self, state: _State) -> Iterator[tuple[Call, _State]]:
        for rank, own in enumerate(state.ranks):
            for move in self._rank_moves(state, rank, own):
                ranks = (*state.ranks[:rank], move.after, *state.ranks[rank + 1 :])
                cast = state.cast
                if move.vote is not None:
                    votes = (move.vote, *cast[rank][: _NUM_KEPT_VOTES - 1])
                    cast = (*cast[:rank], votes, *cast[rank + 1 :])
                yield Call(move.action, rank, move.argument), _State(ranks, cast)

    def _rank_moves(self, state: _State, rank: int, own: Snapshot) -> Iterator[Move]:
        yield from self._ranks[rank].local_moves(own)
        if own.has_left or own.is_commit_due:
            return
        if own.is_read_due:
            votes = self._votes_of(state, own.attributes["round_idx"])
            if votes is not None:
                yield from self._ranks[rank].read_moves(own, votes)
        elif not own.is_post_due:
            for steps in (1, 2) if "SkipStep" in self._setup["allowed"][rank] else (1,):
                if self._may_step(state, own, steps):
                    yield Move("Step", steps, self._ranks[rank].step(own, steps), None)

    def _may_step(self, state: _State, own: Snapshot, steps: int) -> bool:
        """In lockstep nobody is a forward pass behind, but who has left."""
        step_idx = own.attributes["step_idx"]
        in_pass = all(it.state is State.STOPPED or it.attributes["step_idx"] >= step_idx for it in state.ranks)
        return in_pass and step_idx + steps <= self._setup["max_steps"]

    def _votes_of(self, state: _State, round_idx: int) -> tuple[Vote, ...] | None:
        """The votes of a round, None while one is missing."""
        votes = [vote for cast in state.cast for vote in cast if vote is not None and vote.round_idx == round_idx]
        return tuple(votes) if len(votes) == len(state.cast) else None

    def _canonical(self, state: _State) -> int:
        casts = [self._cast_number(cast) for cast in state.cast]
        return self._table.number((*(own.canonical for own in state.ranks), *casts))

    def _cast_number(self, cast: tuple[Vote | None, ...]) -> int:
        if cast not in self._casts:
            self._casts[cast] = self._table.number(tuple(project_vote(vote) for vote in cast))
        return self._casts[cast]
