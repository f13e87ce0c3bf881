"""What a rebalance policy is."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from eplb_fsm.placement.placement import Placement
from eplb_fsm.placement.topology import Topology
from eplb_fsm.placement.validate import Float64Array


@runtime_checkable
class RebalancePolicy(Protocol):
    """Chooses where the experts go; how they get there is not its concern.

    `plan` runs in the background, on the planning rank (in a process that imports no torch). It may be
    called again after it raised; an exception aborts the epoch and nothing else.

    A policy that has something to compile or to load may have a method `warm_up()` without arguments; a planner calls
    it once, before the first plan. One that gives slower ranks less, and ranks of speed 0 nothing, says so by an
    attribute `minds_speeds`; all others are taken to place as if all ranks were alike.

    Attributes:
        name: The name by which the configuration chooses it.
        deterministic: Equal arguments give equal placements on every rank, so that every rank may plan
            for itself.
    """

    @property
    def name(self) -> str:
        """The name by which the configuration chooses it."""
        ...

    @property
    def deterministic(self) -> bool:
        """Whether equal arguments give equal placements on every rank."""
        ...

    def plan(self, load: Float64Array, current: Placement, topology: Topology) -> Placement:
        """Choose the new placement of one bank.

        Args:
            load: (num_moe_layers, num_logical_experts) float64, summed over the ranks, 0 or more.
            current: The live placement.
            topology: Ranks with their speeds, nodes and expert groups.

        Returns:
            A placement of the shape of `current`. The order of the slots within a rank has no meaning.
        """
        ...


def minds_speeds(policy: RebalancePolicy) -> bool:
    """Whether a policy gives slower ranks less."""
    return bool(getattr(policy, "minds_speeds", False))
