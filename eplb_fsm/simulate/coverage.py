"""Which combinations of state, decision and fault can happen, and why the others cannot.

A combination is a rank that a fault met in a state, and the decision of the round that was out then (or whose commits
were being made, or that was posted next: then the state is the one that it voted in). What a round can decide
follows from :func:`eplb_fsm.core.votes.decide` itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from itertools import product
from typing import NamedTuple

from eplb_fsm.core.reasons import AbortReason, StopReason, encode_reason
from eplb_fsm.core.states import State
from eplb_fsm.core.votes import DecisionKind, Progress, Vote, decide, tally_votes
from eplb_fsm.simulate.scenario import NO_DECISION, FaultKind, Target

DECISIONS = (*(kind.value for kind in DecisionKind), NO_DECISION)
PROGRESS_IN: dict[State, tuple[Progress, ...]] = {
    State.IDLE: (Progress.IDLE,),
    State.COLLECTING: (Progress.BUSY,),
    State.COMPUTING: (Progress.BUSY,),
    State.AWAITING_CONSENSUS: (Progress.SKIP, Progress.READY),
    State.TRANSFERRING: (Progress.STAGING, Progress.STAGED),
    State.STOPPED: (),
}
"""What a rank votes in a state."""


class Excluded(NamedTuple):
    """Combinations that cannot happen; None stands for any."""

    state: State | None
    decision: str | None
    fault: FaultKind | None
    reason: str

    def covers(self, target: Target) -> bool:
        """Whether this is the reason why a combination cannot happen."""
        return all(mine is None or mine == its for mine, its in zip(self[:3], target, strict=True))


EXCLUDED: tuple[Excluded, ...] = ()
"""What the votes alone would allow and the cluster does not, each with its reason."""


@cache
def decisions_in(state: State) -> frozenset[str]:
    """Return what a round can decide in which a rank voted in this state, with any vote of another rank.

    Asked of :func:`~eplb_fsm.core.votes.decide`, for all that two votes can say of progress and wishes.
    """
    votes = [_vote(progress, *wishes) for progress in Progress for wishes in product((0, 1), repeat=4)]
    own = [vote for vote in votes if vote.progress in PROGRESS_IN[state]]
    decided = {decide(tally_votes(pair)).kind.value for pair in product(own, votes)}
    return frozenset(decided | {NO_DECISION})


def _vote(progress: Progress, abort: int, stop: int, request: int, freeze: int) -> Vote:
    words = dict.fromkeys(Vote._fields, 0)
    words |= {"progress": progress, "request": request, "freeze": freeze, "drained": 1}
    words["abort"] = encode_reason(AbortReason.REQUESTED, 0) * abort
    words["stop"] = encode_reason(StopReason.CLOSED, 0) * stop
    return Vote(**words)


def all_targets() -> Iterator[Target]:
    """Return every combination, possible or not."""
    return (Target(*words) for words in product(State, DECISIONS, FaultKind))


def why_impossible(target: Target) -> str:
    """Return why a combination cannot happen; empty if it can."""
    if target.decision not in decisions_in(target.state):
        return "no votes that a rank in this state takes part in decide this"
    return next((excluded.reason for excluded in EXCLUDED if excluded.covers(target)), "")


@cache
def feasible_targets() -> tuple[Target, ...]:
    """Return the combinations that can happen."""
    return tuple(target for target in all_targets() if not why_impossible(target))


class Coverage(NamedTuple):
    """How much of what can happen has been seen.

    Attributes:
        surprises: Seen, although it is listed as impossible: the list is wrong.
    """

    num_seen: int
    num_feasible: int
    missing: list[Target]
    surprises: list[Target]

    @property
    def share(self) -> float:
        """Share of the feasible combinations that were seen."""
        return self.num_seen / self.num_feasible


def measure_coverage(hits: Iterable[Target]) -> Coverage:
    """Compare what was seen with what can happen."""
    seen, feasible = set(hits), feasible_targets()
    missing = [target for target in feasible if target not in seen]
    surprises = sorted(seen.difference(feasible), key=str)
    return Coverage(len(feasible) - len(missing), len(feasible), missing, surprises)
