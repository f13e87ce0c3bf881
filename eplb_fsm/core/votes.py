"""The vote of a rank, the tally of a round, and the one function that decides.

A vote is a fixed vector of signed 64-bit words. A round reduces the votes of all ranks with MAX over
each word and over its bitwise complement, which gives the largest and the smallest value of each word:
``min(x) == ~max(~x)``. (Negation would not do: the smallest int64 has none.) "All equal" is then one
comparison, and the result does not depend on the order of the ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum
from operator import invert
from typing import NamedTuple

from eplb_fsm.core.reasons import AbortReason, StopReason, decode_reason

PROTOCOL_VERSION = 4
"""Compared by every rank through the store before the first round, and again in each vote."""


class Progress(IntEnum):
    """What a vote says about the epoch; the order is that of an epoch's life."""

    IDLE = 0
    BUSY = 1
    SKIP = 2
    READY = 3
    STAGING = 4
    STAGED = 5


class Vote(NamedTuple):
    """What one rank says in one round; every word is a signed 64-bit integer."""

    protocol_version: int
    generation: int
    """Membership generation: which set of ranks this domain consists of."""
    config_fingerprint: int
    round_idx: int
    step_idx: int
    """The step at which the vote was posted."""
    pass_id: int
    """The engine's number of the forward pass, 0 where it has none that all ranks share."""
    epoch: int
    live_digest: int
    """Digest of the placement that this rank serves with."""
    progress: int
    chunk_idx: int
    """The next chunk that a round may commit while transferring, else 0."""
    num_staged: int
    """Chunks of the plan that are staged here, those that are live included; 0 before and after transferring."""
    num_chunks: int
    """Chunks of the plan once it is known, else 0."""
    plan_digest: int
    """Digest of the plan once it is known, else 0."""
    abort: int
    """``code << 32 | rank`` of an :class:`AbortReason`, 0 for none."""
    stop: int
    """``code << 32 | rank`` of a :class:`StopReason`, 0 for none."""
    request: int
    """1 when this rank wants a rebalance: asked for, interval reached, or back-off over."""
    drained: int
    """1 when no transfer of an earlier epoch is under way on this rank."""
    freeze: int
    """1 while this rank asks for a freeze."""
    earliest_next_step: int
    """No epoch starts in a round that was posted before this step."""
    lag: int
    """Steps between posting and reading that this rank asks for; adopted while idle."""

    @property
    def promises_commit(self) -> bool:
        """True when the round may commit chunks for all this vote says; if not, no tally of it can."""
        return self.progress == Progress.STAGED and not (self.stop or self.abort or self.freeze)


NUM_VOTE_WORDS = len(Vote._fields)

_EQUAL_WORDS = (
    "protocol_version",
    "generation",
    "config_fingerprint",
    "round_idx",
    "step_idx",
    "pass_id",
    "epoch",
)
_EQUAL_WORDS_TRANSFERRING = ("chunk_idx", "num_chunks", "plan_digest")


class Tally(NamedTuple):
    """The largest and the smallest value of each word over all votes of a round."""

    largest: Vote
    smallest: Vote


def encode_vote(vote: Vote) -> list[int]:
    """Return the ``2 * NUM_VOTE_WORDS`` words that a MAX reduction is made over."""
    return [*vote, *map(invert, vote)]


def decode_tally(words: Sequence[int]) -> Tally:
    """Return the tally from the MAX-reduced words of :func:`encode_vote`."""
    return Tally(Vote(*words[:NUM_VOTE_WORDS]), Vote(*map(invert, words[NUM_VOTE_WORDS:])))


def tally_votes(votes: Iterable[Vote]) -> Tally:
    """Return the tally of votes that are all at hand (mesh, piggyback and in-memory channels)."""
    columns = list(zip(*votes, strict=True))
    return Tally(Vote(*map(max, columns)), Vote(*map(min, columns)))


class DecisionKind(Enum):
    """What a round decided."""

    NONE = "NONE"
    FREEZE = "FREEZE"
    START = "START"
    SKIP = "SKIP"
    BEGIN = "BEGIN"
    COMMIT = "COMMIT"
    ABORT = "ABORT"
    STOP = "STOP"


@dataclass(frozen=True, slots=True)
class Decision:
    """The outcome of one round, equal on all ranks because it is computed from the tally alone."""

    kind: DecisionKind
    reason: AbortReason | StopReason | None = None
    """Set for ABORT and STOP."""
    rank: int = -1
    """The rank that gave the reason, -1 where the tally itself is the reason."""
    detail: str = ""
    """For a word that must be equal and is not: its name and both values."""
    num_chunks: int = 0
    """For COMMIT, how many chunks: one becomes live at each of the steps that follow, in sync mode all at this one."""


_NONE = Decision(DecisionKind.NONE)


def decide(tally: Tally) -> Decision:
    """Return what a round decided.

    STOP comes first, then what must be equal, then ABORT, then the ladder of progress. BEGIN and COMMIT
    compare epoch, chunk and digests, not only progress. COMMIT is of all chunks that every rank has staged.
    Pure: this is the only source of agreed transitions.
    """
    largest, smallest = tally
    if largest.stop:
        return _give_reason(DecisionKind.STOP, StopReason, "stop", largest.stop)
    unequal = _find_unequal(tally)
    if unequal is not None:
        return unequal
    if largest.progress == Progress.IDLE:
        return _decide_idle(tally)
    if largest.abort:
        return _give_reason(DecisionKind.ABORT, AbortReason, "abort", largest.abort)
    if largest.freeze:
        return Decision(DecisionKind.ABORT, AbortReason.FROZEN)
    if smallest.progress == Progress.STAGED:
        return Decision(DecisionKind.COMMIT, num_chunks=smallest.num_staged - smallest.chunk_idx)
    if smallest.progress in (Progress.SKIP, Progress.READY):
        return _decide_plan(tally)
    return _NONE


def _give_reason(kind: DecisionKind, reasons: type[AbortReason] | type[StopReason], word: str, value: int) -> Decision:
    """Return the decision that a rank asked for; a reason that this version does not know is a DESYNC."""
    code, rank = decode_reason(value)
    try:
        return Decision(kind, reasons(code), rank)
    except ValueError:
        detail = f"{word} is {value:#x} on some rank, a reason that this version does not know"
        return Decision(DecisionKind.STOP, StopReason.DESYNC, detail=detail)


def _find_unequal(tally: Tally) -> Decision | None:
    """Return a STOP when the ranks do not stand at the same place, or serve different maps."""
    largest, smallest = tally
    if largest == smallest:
        return None
    transferring = largest.progress >= Progress.STAGING
    words = _EQUAL_WORDS + _EQUAL_WORDS_TRANSFERRING if transferring else _EQUAL_WORDS
    for word in words:
        low, high = getattr(smallest, word), getattr(largest, word)
        if low != high:
            return _stop_unequal(StopReason.DESYNC, word, low, high)
    if _phase(largest.progress) != _phase(smallest.progress):
        return _stop_unequal(StopReason.DESYNC, "progress", smallest.progress, largest.progress)
    if largest.live_digest != smallest.live_digest:
        return _stop_unequal(StopReason.DIVERGED, "live_digest", smallest.live_digest, largest.live_digest)
    return None


def _stop_unequal(reason: StopReason, word: str, low: int, high: int) -> Decision:
    return Decision(DecisionKind.STOP, reason, detail=f"{word} is {low} on one rank and {high} on another")


def _phase(progress: int) -> int:
    """Ranks differ in progress only within a phase: entering the next one is an agreed transition."""
    if progress == Progress.IDLE:
        return 0
    return 1 if progress <= Progress.READY else 2


def _decide_idle(tally: Tally) -> Decision:
    largest, smallest = tally
    if largest.freeze:
        return Decision(DecisionKind.FREEZE) if smallest.drained else _NONE
    may_start = smallest.drained and largest.step_idx >= largest.earliest_next_step
    return Decision(DecisionKind.START) if largest.request and may_start else _NONE


def _decide_plan(tally: Tally) -> Decision:
    """All ranks have a plan: they must be the same one, or nothing moves."""
    largest, smallest = tally
    for word in ("progress", "num_chunks", "plan_digest"):
        low, high = getattr(smallest, word), getattr(largest, word)
        if low != high:
            return Decision(
                DecisionKind.ABORT,
                AbortReason.PLAN_MISMATCH,
                detail=f"{word} is {low} on one rank and {high} on another",
            )
    return Decision(DecisionKind.SKIP if largest.progress == Progress.SKIP else DecisionKind.BEGIN)
