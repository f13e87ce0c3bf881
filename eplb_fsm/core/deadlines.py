"""How long an epoch may take, in steps; ``EpochBounded`` of the spec.

A deadline only votes. While an epoch is under way a vote is posted every ``lag`` steps and read ``lag`` steps later,
so between a deadline and what it causes lie a posting and a reading:

* A rank leaves COLLECTING, and likewise COMPUTING, at a posting: at the latest at the first one past the deadline,
  ``lag`` steps after it. If it does not leave there, that vote asks to abort and is read ``lag`` steps later.
* The same holds for AWAITING_CONSENSUS and TRANSFERRING, which end with a decision: the vote that asks to abort is
  posted at most ``lag`` steps past the deadline, and read ``lag`` steps after that.

So the four deadlines add up, with ``lag`` once for each of the first two states and twice for each of the others. A
round that is late or lost takes time but no steps: the rank stands still inside ``step()``.
"""

from __future__ import annotations

from eplb_fsm.config import RebalanceConfig


def epoch_bound_steps(config: RebalanceConfig, lag: int, transferring_deadline_steps: int) -> int:
    """Return the largest number of steps from START to the outcome of an epoch, on any rank.

    Args:
        config: The phases' deadlines.
        lag: Steps between posting and reading a round while the epoch was under way; it changes only in IDLE.
        transferring_deadline_steps: The deadline of TRANSFERRING that the plan carries; 0 when it was never begun.
    """
    deadlines = (
        config.collecting_deadline_steps
        + config.computing_deadline_steps
        + config.awaiting_consensus_deadline_steps
        + transferring_deadline_steps
    )
    return deadlines + 6 * lag
