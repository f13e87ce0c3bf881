"""Why an epoch was aborted, or rebalancing stopped; the codes travel in votes.

A code of a later version may be added, never renumbered: two versions can meet in one domain only long
enough to see that their protocol versions differ, but traces outlive both.
"""

from __future__ import annotations

from enum import IntEnum


class AbortReason(IntEnum):
    """Why an epoch ended without (all of) its commits; the ranks are back in IDLE."""

    PLAN_MISMATCH = 1
    """The ranks hold plans with different digests."""
    LOAD_ERROR = 2
    """The load of the ranks could not be summed."""
    POLICY_ERROR = 3
    """The policy raised, ran past its limit, or returned an invalid placement."""
    INVALID_PLAN = 4
    """A rank refused the plan that it received."""
    WORKER_ERROR = 5
    """The background worker raised where no other reason fits."""
    WORKER_DIED = 6
    """The background worker is gone."""
    INTEGRITY = 7
    """The hash of a received expert differs from the one that travelled with it."""
    TRANSFER_ERROR = 8
    """Staging of a chunk failed."""
    DEADLINE_COLLECTING = 9
    """COLLECTING took more steps than its deadline."""
    DEADLINE_COMPUTING = 10
    """COMPUTING took more steps than its deadline."""
    DEADLINE_AWAITING_CONSENSUS = 11
    """AWAITING_CONSENSUS took more steps than its deadline."""
    DEADLINE_TRANSFERRING = 12
    """TRANSFERRING took more steps than the deadline that the plan carries."""
    FROZEN = 13
    """Some rank asked for a freeze."""
    REQUESTED = 14
    """Some rank asked to abort."""
    UNRESOLVED_VOTE = 15
    """The decision on a staged chunk was lost, and the ranks agreed over the store not to commit it."""


class StopReason(IntEnum):
    """Why rebalancing ended; the placement stays as it is."""

    CLOSED = 1
    """A rank was closed."""
    TIMEOUT = 2
    """The votes of a round did not arrive within the vote timeout."""
    TRANSPORT = 3
    """The vote channel broke, or a transfer did not drain within its deadline."""
    DIVERGED = 4
    """The live placements of the ranks differ."""
    DESYNC = 5
    """A word of the vote that must be equal on all ranks is not."""
    COMMIT_FAILED = 6
    """A promised commit raised on this rank, which must not run another forward pass."""


class OutcomeKind(IntEnum):
    """How an epoch ended."""

    COMMITTED = 1
    """All chunks are live."""
    SKIPPED = 2
    """The ranks agreed that there is nothing to gain."""
    ABORTED = 3
    """Ended early, for an :class:`AbortReason`; chunks that were committed stay."""
    FAILED = 4
    """Ended because rebalancing stopped, for a :class:`StopReason`."""


def encode_reason(code: int, rank: int) -> int:
    """Pack a reason and the rank that gives it into one vote word (0 means none)."""
    return code << 32 | rank


def decode_reason(word: int) -> tuple[int, int]:
    """Return ``(code, rank)`` of a word made by :func:`encode_reason`."""
    return word >> 32, word & 0xFFFFFFFF
