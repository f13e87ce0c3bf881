"""DeepSeek's placement as other policies begin with it: on the ranks that may hold experts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from eplb_fsm.errors import ConfigError
from eplb_fsm.placement.digest import Int64Array
from eplb_fsm.placement.placement import Placement
from eplb_fsm.placement.policies.deepseek import is_hierarchical, rebalance_experts
from eplb_fsm.placement.topology import Topology
from eplb_fsm.placement.validate import EMPTY, Float64Array


def grouping(current: Placement, topology: Topology) -> Topology:
    """Return the topology by which experts are kept on nodes: one node where DeepSeek's method would not keep them.

    That is also so where a rank is to hold no expert, since nodes have unequally many slots then.

    Raises:
        ConfigError: the ranks that may hold experts have too few slots for one of each.
    """
    num_slots = int(topology.may_hold.sum()) * current.num_local_physical_experts
    if num_slots < current.num_logical_experts:
        raise ConfigError(
            f"the ranks of a speed above 0 have {num_slots} slots, too few for {current.num_logical_experts} experts; "
            "leave more ranks, or raise num_redundant_experts"
        )
    if is_hierarchical(current.num_logical_experts, topology) and topology.may_hold.all():
        return topology
    return replace(topology, num_nodes=1, num_groups=1)


def place_anew(load: Float64Array, num_slots: int, groups: Topology) -> Int64Array:
    """DeepSeek's placement of some layers.

    Args:
        load: (layers, experts) float64.
        num_slots: Slots of a layer, all ranks together.
        groups: As from :func:`grouping`.

    Returns:
        (layers, num_slots) int64, -1 for the slots of ranks that may hold nothing.
    """
    held = np.repeat(groups.may_hold, num_slots // groups.num_ranks)
    part = Topology(int(groups.may_hold.sum()), groups.num_nodes, groups.num_groups)
    rows = np.full((len(load), num_slots), EMPTY)
    rows[:, held] = rebalance_experts(load, int(held.sum()), part)
    return rows
