"""DeepSeek's placement, refined by a search: the best balance there is, at any price in moves."""

from __future__ import annotations

import numpy as np

from eplb_fsm.placement.placement import Placement
from eplb_fsm.placement.policies.deepseek import is_hierarchical, rebalance_experts
from eplb_fsm.placement.topology import Topology
from eplb_fsm.placement.validate import Float64Array


class RefinedPolicy:
    """Refines DeepSeek's placement; for placements that are made once, since a plan takes seconds.

    It looks at the load only, but names the ranks so that most experts are there already. A layer without any load
    keeps its current row.
    """

    name = "deepseek_refined"
    deterministic = True

    def warm_up(self) -> None:
        """Have the kernels compiled."""
        self.plan(np.array([[3.0, 1.0]]), Placement.initial(1, 2, 2, 2), Topology(2))

    def plan(self, load: Float64Array, current: Placement, topology: Topology) -> Placement:
        """Place the experts by their load; arguments and result as in `RebalancePolicy.plan`.

        No layer is less balanced than in DeepSeek's placement, whose groups and nodes are kept.
        """
        from eplb_fsm.placement.kernels.match import match_ranks  # here: only who plans needs a compiler
        from eplb_fsm.placement.kernels.refine import refine_layers

        if not is_hierarchical(current.num_logical_experts, topology):
            topology = Topology(topology.num_ranks)
        ranks, nodes = topology.num_ranks, topology.num_nodes
        load = np.ascontiguousarray(load, dtype=np.float64)
        start = current.physical_to_logical_map.copy()
        rows = rebalance_experts(load, current.num_physical_experts, topology)
        refine_layers(load, rows, ranks, ranks // nodes)
        match_ranks(start, rows, ranks, nodes, current.num_logical_experts)
        idle = ~load.any(axis=1)
        rows[idle] = start[idle]
        return Placement(rows, current.num_logical_experts, current.num_ranks)
