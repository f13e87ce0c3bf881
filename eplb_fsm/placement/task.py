"""What a planner is given once, and does for every epoch; numpy only, so it pickles into a child process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from eplb_fsm.config import DEFAULT_TARGET_BALANCEDNESS
from eplb_fsm.placement.balancedness import rank_loads
from eplb_fsm.placement.placement import Placement
from eplb_fsm.placement.plan import Plan
from eplb_fsm.placement.planning import make_plan
from eplb_fsm.placement.policies import RebalancePolicy, get_policy, minds_speeds
from eplb_fsm.placement.shapes import BankShape, Budget
from eplb_fsm.placement.split import warm_up, weighted_rank_loads
from eplb_fsm.placement.topology import Topology
from eplb_fsm.placement.worth import Costs, Thresholds

EncodedPlan = npt.NDArray[np.int64]
"""A plan as it travels, ``(n,)``."""
Load = npt.NDArray[np.int64]
"""Tokens per logical expert of one bank, ``(num_moe_layers, num_logical_experts)``."""
Speeds = tuple[float, ...]
"""As in :class:`Topology`."""


class PlanRequest(NamedTuple):
    """What changes from plan to plan.

    Attributes:
        loads: Load of each bank.
        current: Live placement of each bank.
        costs: What the ranks measured; None: no layer has to pay.
        speeds: How fast the ranks are; empty: all are alike.
    """

    loads: Sequence[Load]
    current: Sequence[Placement]
    costs: Costs | None = None
    speeds: Speeds = ()


@dataclass(frozen=True, slots=True)
class PlanTask:
    """What stays the same from plan to plan."""

    policy: str
    topology: Topology
    shapes: tuple[BankShape, ...]
    budget: Budget
    thresholds: Thresholds
    target_balancedness: float = DEFAULT_TARGET_BALANCEDNESS
    replica_split: str = "equal"

    def make_policy(self) -> RebalancePolicy:
        """Make the policy.

        Raises:
            ConfigError: As :func:`~eplb_fsm.placement.policies.get_policy`.
        """
        return get_policy(self.policy, self.target_balancedness, self.replica_split)

    def warm_up(self) -> None:
        """Make the policy and have it compute once, so that no plan waits for a compiler; takes seconds at most once.

        Raises:
            ConfigError: As :meth:`make_policy`.
        """
        warm_up_policy = getattr(self.make_policy(), "warm_up", None)
        if warm_up_policy is not None:
            warm_up_policy()
        if self._is_weighted:
            warm_up()

    @property
    def minds_speeds(self) -> bool:
        """Whether the policy gives slower ranks less; looked up once."""
        return _minds_speeds(self)

    def topology_with(self, speeds: Speeds) -> Topology:
        """The topology with ranks of these speeds.

        Raises:
            ConfigError: all speeds are 0.
        """
        return replace(self.topology, speeds=speeds)

    def plan(self, request: PlanRequest) -> EncodedPlan:
        """Compute and encode a plan on the calling thread.

        Raises:
            PlanError: If no valid plan can be made. A policy may raise anything else.
        """
        topology = self.topology_with(request.speeds)
        loads_of = partial(weighted_rank_loads, speeds=topology.counted_speeds) if self._is_weighted else rank_loads
        plan = make_plan(
            self.make_policy(),
            request.loads,
            request.current,
            topology,
            self.shapes,
            self.budget,
            self.thresholds,
            request.costs,
            loads_of,
        )
        return plan.encode()

    @property
    def _is_weighted(self) -> bool:
        return self.replica_split == "weighted"

    def decode(self, encoded: EncodedPlan, current: tuple[Placement, ...]) -> Plan:
        """Read a plan that some rank has encoded, and check all of it.

        Raises:
            PlanError: As :meth:`Plan.decode`.
        """
        return Plan.decode(encoded, current, self.shapes, self.budget)


@cache
def _minds_speeds(task: PlanTask) -> bool:
    return minds_speeds(task.make_policy())
