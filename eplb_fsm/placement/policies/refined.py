"""DeepSeek's placement, refined by a search: the best balance there is, at any price in moves."""

from __future__ import annotations

import numpy as np

from eplb_fsm.placement.placement import Placement
from eplb_fsm.placement.policies.anew import grouping, place_anew
from eplb_fsm.placement.topology import Topology
from eplb_fsm.placement.validate import Float64Array


class RefinedPolicy:
    """Refines DeepSeek's placement; for placements that are made once, since a plan takes seconds.

    It looks at the load only, but names the ranks so that most experts are there already. A layer without any load
    keeps its current row, unless that has an expert on a rank that is to hold none.
    """

    name = "deepseek_refined"
    deterministic = True
    minds_speeds = True

    def warm_up(self) -> None:
        """Have the kernels compiled."""
        self.plan(np.array([[3.0, 1.0]]), Placement.initial(1, 2, 2, 2), Topology(2))

    def plan(self, load: Float64Array, current: Placement, topology: Topology) -> Placement:
        """Place the experts by their load; arguments and result as in `RebalancePolicy.plan`.

        No layer is less balanced than in DeepSeek's placement, whose groups and nodes are kept.

        Raises:
            ConfigError: the ranks that may hold experts have too few slots.
        """
        from eplb_fsm.placement.kernels.match import match_ranks  # here: only who plans needs a compiler
        from eplb_fsm.placement.kernels.refine import refine_layers

        groups = grouping(current, topology)
        load = np.ascontiguousarray(load, dtype=np.float64)
        start = current.physical_to_logical_map.copy()
        rows = place_anew(load, current.num_physical_experts, groups)
        refine_layers(load, rows, topology.counted_speeds, topology.may_hold, groups.ranks_per_node)
        match_ranks(start, rows, topology.counted_speeds, groups.num_nodes, current.num_logical_experts)
        idle = ~load.any(axis=1) & ~topology.held_in_vain(current)
        rows[idle] = start[idle]
        return Placement(rows, current.num_logical_experts, current.num_ranks)
