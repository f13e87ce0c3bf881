"""The movement-aware policy: repairs the current placement instead of making a new one.

Each layer that is not balanced well enough is repaired with as few peer moves as a greedy search finds
(:mod:`~eplb_fsm.placement.kernels.repair`). Where the target cannot be reached that way, and for a layer
whose load has turned over, DeepSeek's placement is the other candidate, with its ranks renamed so that most experts
are there already: so the result is never less balanced than that one.
"""

from __future__ import annotations

import numpy as np

from eplb_fsm.config import DEFAULT_TARGET_BALANCEDNESS
from eplb_fsm.errors import ConfigError
from eplb_fsm.placement.digest import Int64Array
from eplb_fsm.placement.moves import BoolArray
from eplb_fsm.placement.placement import Placement
from eplb_fsm.placement.policies.anew import grouping, place_anew
from eplb_fsm.placement.topology import Topology
from eplb_fsm.placement.validate import Float64Array

_CHANGES_PER_SLOT = 4
"""Bound of the search; what it finds takes far less than one change for each slot."""


class MovementAwarePolicy:
    """Reaches a target balancedness in each layer with few peer moves.

    Args:
        target_balancedness: Layers that reach it are left alone; above 0, at most 1.
        replica_split: "equal", or "weighted": a layer counts as balanced as it is when tokens are divided among
            replicas so that the heaviest rank is as light as can be.

    Raises:
        ConfigError: another target, another split.
    """

    name = "movement_aware"
    deterministic = True
    minds_speeds = True

    def __init__(self, target_balancedness: float = DEFAULT_TARGET_BALANCEDNESS, replica_split: str = "equal") -> None:
        if not 0.0 < target_balancedness <= 1.0:
            raise ConfigError(f"target_balancedness = {target_balancedness}: must be above 0, at most 1")
        if replica_split not in ("equal", "weighted"):
            raise ConfigError(f'replica_split = {replica_split!r}: must be "equal" or "weighted"')
        self._target = target_balancedness
        self._is_weighted = replica_split == "weighted"

    def warm_up(self) -> None:
        """Have the kernels compiled: plan what cannot be balanced, with a rank to empty, so that each is needed."""
        self.plan(np.array([[3.0, 1.0]]), Placement.initial(1, 2, 4, 2), Topology(2, speeds=(1.0, 0.0)))

    def plan(self, load: Float64Array, current: Placement, topology: Topology) -> Placement:
        """Repair the current placement; arguments and result as in `RebalancePolicy.plan`.

        Expert groups stay on their nodes where DeepSeek's method would keep them there, as long as all ranks may hold
        experts.

        Raises:
            ConfigError: the ranks that may hold experts have too few slots.
        """
        from eplb_fsm.placement.kernels.match import match_ranks  # here: only who plans needs a compiler
        from eplb_fsm.placement.kernels.vacate import vacate_layers

        load = np.ascontiguousarray(load, dtype=np.float64)
        start = current.physical_to_logical_map.copy()  # a read-only array is another type, to be compiled for again
        groups = grouping(current, topology)
        rows = start.copy()
        if not topology.may_hold.all():
            vacate_layers(load, rows, topology.may_hold)
        is_good, balance = self._repair(load, start, rows, groups, topology, is_new=False)
        missed = np.flatnonzero(~is_good)
        if len(missed):
            others = place_anew(load[missed], current.num_physical_experts, groups)
            kind = topology.may_hold.astype(np.float64)
            match_ranks(start[missed], others, kind, groups.num_nodes, current.num_logical_experts)
            _, other_balance = self._repair(load[missed], start[missed], others, groups, topology, is_new=True)
            better = other_balance > balance[missed]
            rows[missed[better]] = others[better]
        return Placement(rows, current.num_logical_experts, current.num_ranks)

    def _repair(
        self,
        load: Float64Array,
        start: Int64Array,
        rows: Int64Array,
        groups: Topology,
        topology: Topology,
        *,
        is_new: bool,
    ) -> tuple[BoolArray, Float64Array]:
        """Repair rows in place; experts stay on the nodes of `groups`, moves are priced by those of `topology`."""
        from eplb_fsm.placement.kernels.repair import repair_layers  # here: only who plans needs a compiler

        return repair_layers(
            load,
            start,
            rows,
            topology.counted_speeds,
            topology.may_hold,
            groups.ranks_per_node,
            topology.ranks_per_node,
            topology.cross_node_price,
            self._target,
            _CHANGES_PER_SLOT * rows.shape[1],
            is_new,
            self._is_weighted,
        )
