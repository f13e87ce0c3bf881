"""How long an epoch may take, in steps; ``EpochBounded`` of the spec.

A deadline only votes. While an epoch is under way a vote is read ``lag`` steps after it was posted, and the next one is
posted then, or at the latest at the last of the commits that it decided: one a step, and no more than staging buffers.
So between a deadline and what it causes lie a posting and a reading:

* A rank leaves COLLECTING, and likewise COMPUTING, at a posting: at the latest at the first one past the deadline,
  ``lag`` steps after it. If it does not leave there, that vote asks to abort and is read ``lag`` steps later.
* The same holds for AWAITING_CONSENSUS and TRANSFERRING, which end with a decision: the vote that asks to abort is
  posted at most ``lag`` steps past the deadline, in TRANSFERRING also the steps of further commits, and read ``lag``
  steps after that.

So the four deadlines add up, with ``lag`` once for each of the first two states and twice for each of the others, and
once the steps that commits may put a vote off. A round that is late or lost takes time but no steps: the rank stands
still inside ``step()``.
"""

from __future__ import annotations

from eplb_fsm.config import RebalanceConfig
from eplb_fsm.core.states import ACTIVE_STATES, State


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


def epoch_bound_steps(config: RebalanceConfig, lag: int, transferring_deadline_steps: int) -> int:
    """Return the largest number of steps from START to the outcome of an epoch, on any rank.

    Args:
        config: The phases' deadlines, and the staging buffers.
        lag: Steps between posting and reading a round while the epoch was under way; it changes only in IDLE.
        transferring_deadline_steps: The deadline of TRANSFERRING that the plan carries; 0 when it was never begun.
    """
    deadlines = sum(deadline_steps(config, state, transferring_deadline_steps) for state in ACTIVE_STATES)
    return deadlines + 6 * lag + config.staging_buffers - 1
