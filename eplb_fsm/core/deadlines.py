"""When an epoch's rounds follow each other, and how long it may take, in steps; ``EpochBounded`` of the spec.

What an epoch waits for takes as long as it takes, and rounds meanwhile cost steps. So the longer ranks have waited, the
later the next round: that makes no wait longer than by a quarter, and the rounds in it few.

A deadline only votes. While an epoch is under way a vote is read ``lag`` steps after it was posted. The next one is
posted then or after the pause that the wait so far allows; or, where more has been decided, at the latest at the last
of those commits: one a step, and no more than staging buffers. So what a deadline causes comes later than it:

* A rank leaves COLLECTING, and likewise COMPUTING, at a posting: at the latest at the first one past the deadline. If
  it does not leave there, that vote asks to abort and is read ``lag`` steps later.
* AWAITING_CONSENSUS ends with the reading of a vote: of one from before the deadline, or of the first one past it,
  which asks to abort.
* So does TRANSFERRING; there the first vote past the deadline may be as much later as commits take steps.

A round that is late or lost takes time but no steps: the rank stands still inside ``step()``.
"""

from __future__ import annotations

from eplb_fsm.config import RebalanceConfig
from eplb_fsm.core.states import State

_WAITED_PER_PAUSE = 4
"""Steps of waiting for each step between two rounds."""


def deadline_steps(config: RebalanceConfig, state: State, transferring_deadline_steps: int) -> int:
    """Return how many steps an epoch may be in an active state.

    Args:
        config: The deadlines of all phases but the last.
        state: The state.
        transferring_deadline_steps: As in :func:`epoch_bound_steps`.
    """
    if state is State.TRANSFERRING:
        return transferring_deadline_steps
    steps: int = getattr(config, f"{state.value.lower()}_deadline_steps")
    return steps


def pause_steps(waited: int, idle_interval: int) -> int:
    """Return how many steps after the reading of a round the next one of the same epoch is posted.

    Args:
        waited: Steps since ranks last got further together.
        idle_interval: Steps between rounds in IDLE; no pause is longer.
    """
    return min(waited // _WAITED_PER_PAUSE, idle_interval)


def epoch_bound_steps(config: RebalanceConfig, lag: int, transferring_deadline_steps: int) -> int:
    """Return the largest number of steps from START to the outcome of an epoch, on any rank.

    Args:
        config: The phases' deadlines, and the staging buffers.
        lag: Steps between posting and reading a round while the epoch was under way; it changes only in IDLE.
        transferring_deadline_steps: The deadline of TRANSFERRING that the plan carries; 0 when it was never begun.
    """

    def first_vote_past(deadline: int) -> int:
        read = deadline + lag
        return read + pause_steps(read, config.idle_round_interval)

    computing = first_vote_past(config.collecting_deadline_steps)
    awaiting = first_vote_past(computing + config.computing_deadline_steps)
    decided = awaiting + config.awaiting_consensus_deadline_steps
    moved = decided + lag + first_vote_past(transferring_deadline_steps) + config.staging_buffers - 1
    return max(first_vote_past(decided), moved) + lag
