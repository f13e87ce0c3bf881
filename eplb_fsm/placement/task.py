"""What a planner is given once, and does for every epoch; numpy only, so it pickles into a child process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from eplb_fsm.placement.placement import Placement
from eplb_fsm.placement.plan import Plan
from eplb_fsm.placement.planning import make_plan
from eplb_fsm.placement.policies import get_policy
from eplb_fsm.placement.shapes import BankShape, Budget
from eplb_fsm.placement.topology import Topology

EncodedPlan = npt.NDArray[np.int64]
"""A plan as it travels, ``(n,)``."""
Load = npt.NDArray[np.int64]
"""Tokens per logical expert of one bank, ``(num_moe_layers, num_logical_experts)``."""


@dataclass(frozen=True, slots=True)
class PlanTask:
    """What stays the same from plan to plan."""

    policy: str
    topology: Topology
    shapes: tuple[BankShape, ...]
    budget: Budget
    min_gain: float

    def plan(self, loads: Sequence[Load], current: Sequence[Placement]) -> EncodedPlan:
        """Compute and encode a plan on the calling thread.

        Raises:
            PlanError: If no valid plan can be made. A policy may raise anything else.
        """
        policy = get_policy(self.policy)
        return make_plan(policy, loads, current, self.topology, self.shapes, self.budget, self.min_gain).encode()

    def decode(self, encoded: EncodedPlan, current: tuple[Placement, ...]) -> Plan:
        """Read a plan that some rank has encoded, and check all of it.

        Raises:
            PlanError: As :meth:`Plan.decode`.
        """
        return Plan.decode(encoded, current, self.shapes, self.budget)
