"""What moving experts takes from the decode loop: measured on each rank, summed with the load, the same for all."""

from __future__ import annotations

from typing import NamedTuple

from eplb_fsm.config import RebalanceConfig
from eplb_fsm.placement.worth import Costs

_FIRST_BYTES_PER_S = 1e9
"""What a rank is taken to move in a second before any epoch was measured; about what 10-gigabit Ethernet carries."""
_LEAST_SLOWDOWN = 0.01
"""Of the loop while bytes move, before any epoch was measured."""


class Measured(NamedTuple):
    """What one rank has measured since its start; integers, so that all ranks sum them to the same.

    Attributes:
        step_ns: Nanoseconds of a step outside of epochs.
        moved_bytes: Bytes of committed epochs that came from other ranks, all ranks together.
        transfer_ns: How long that took, from BEGIN to the last commit.
        lost_ns: By how much the steps in that time were longer than others.
    """

    step_ns: int = 0
    moved_bytes: int = 0
    transfer_ns: int = 0
    lost_ns: int = 0


def costs_of(total: Measured, num_ranks: int, config: RebalanceConfig, trust: float) -> Costs | None:
    """Return what the planner needs to know, from the sums of all ranks' :class:`Measured`.

    None where no layer has to pay: by the configuration, or since no step was measured yet.
    """
    if not config.horizon_steps or not total.step_ns:
        return None
    step_s = total.step_ns / num_ranks / 1e9
    if total.moved_bytes and total.transfer_ns:
        bytes_per_s = total.moved_bytes / (total.transfer_ns / 1e9)
        return Costs(step_s, bytes_per_s, max(0, total.lost_ns) / 1e9 / total.moved_bytes, trust)
    bytes_per_s = num_ranks * min(_FIRST_BYTES_PER_S, config.max_transfer_mb_s * 1e6 or _FIRST_BYTES_PER_S)
    slowdown = 1.0 if config.mode == "sync" else max(_LEAST_SLOWDOWN, config.max_slowdown)
    return Costs(step_s, bytes_per_s, slowdown / bytes_per_s, trust)
