"""DeepSeek's published expert-parallel load balancer: hierarchical, and global as a case of it.

The method, for every layer: pack the expert groups onto the nodes; inside each node give the redundant
slots, one by one, to the expert with the highest load per replica; pack the replicas of the node onto its
ranks. The global method is the same with one node and one group.

Ties, which the published text leaves open, are broken in a fixed order, so that the result is the same on
every machine: items of equal load are packed in ascending index (a first copy before later replicas),
into the pack of lowest index among the least loaded ones that have room; a redundant slot goes to the
expert of lowest index among those of highest load per replica. Within a rank, slots are in the order in
which they were packed.

Two paths give the same placements: :mod:`~eplb_fsm.placement.kernels.deepseek` where numba is installed, and
here numpy, whose loops run over items, each step on all layers at once.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from eplb_fsm.errors import ConfigError
from eplb_fsm.placement.digest import Int64Array
from eplb_fsm.placement.placement import Placement
from eplb_fsm.placement.topology import Topology
from eplb_fsm.placement.validate import Float64Array

Variant = Literal["auto", "hierarchical", "global"]


def balanced_packing(weight: Float64Array, num_packs: int) -> tuple[Int64Array, Int64Array]:
    """Pack equally many items into every pack, heaviest first, each into the lightest pack with room.

    Args:
        weight: (problems, items) float64, finite, 0 or more; items a multiple of `num_packs`.
        num_packs: Packs of each problem.

    Returns:
        Pack of each item and position in that pack, both (problems, items) int64. With one item for
        each pack the items stay in order, as published.
    """
    problems, items = weight.shape
    capacity = items // num_packs
    if capacity == 1:
        return np.tile(np.arange(items), (problems, 1)), np.zeros((problems, items), dtype=np.int64)
    order = np.argsort(-weight, axis=1, kind="stable")
    rows = np.arange(problems)[:, None]
    descending = np.ascontiguousarray(weight[rows, order].T)
    loads = np.zeros((problems, num_packs))
    flat_loads, flat_counts = loads.reshape(-1), np.zeros(problems * num_packs, dtype=np.int64)
    starts = np.arange(0, problems * num_packs, num_packs)
    pack_of, position = np.empty((2, items, problems), dtype=np.int64)
    for item in range(items):
        pack = loads.argmin(axis=1, out=pack_of[item])
        index = starts + pack
        count = flat_counts[index]
        position[item] = count
        flat_counts[index] = count + 1
        flat_loads[index] += descending[item]
        # A full pack weighs infinitely much, so that it is never the lightest again.
        flat_loads[index[count == capacity - 1]] = np.inf
    packs, positions = np.empty((2, problems, items), dtype=np.int64)
    packs[rows, order] = pack_of.T
    positions[rows, order] = position.T
    return packs, positions


def replicate_experts(weight: Float64Array, num_physical: int) -> tuple[Int64Array, Int64Array]:
    """Give each redundant slot to the expert whose replicas carry most.

    Args:
        weight: (problems, experts) float64, finite, 0 or more.
        num_physical: Slots of each problem, at least as many as experts.

    Returns:
        Expert of each slot, (problems, num_physical) int64 (first one of each, then the redundant ones
        in the order in which they were given), and replicas of each expert, (problems, experts) int64.
    """
    problems, experts = weight.shape
    expert_of = np.empty((problems, num_physical), dtype=np.int64)
    expert_of[:, :experts] = np.arange(experts)
    replicas = np.ones((problems, experts), dtype=np.int64)
    each = weight.copy()
    rows = np.arange(problems)
    for slot in range(experts, num_physical):
        chosen = each.argmax(axis=1)
        expert_of[:, slot] = chosen
        count = replicas[rows, chosen] + 1
        replicas[rows, chosen] = count
        each[rows, chosen] = weight[rows, chosen] / count
    return expert_of, replicas


def rebalance_experts(load: Float64Array, num_physical: int, topology: Topology) -> Int64Array:
    """DeepSeek's hierarchical placement of all layers, `topology` taken as it is.

    Args:
        load: (layers, num_logical_experts) float64, finite, 0 or more. A layer without any load is
            planned as if every expert had the same load.
        num_physical: Slots per layer.
        topology: Ranks, nodes and groups; one node and one group is the global method.

    Returns:
        (layers, num_physical) int64 physical-to-logical map.

    Raises:
        ConfigError: groups, nodes, ranks and slots do not divide as the method needs.
    """
    check_divides(load.shape[1], num_physical, topology)
    # Imported here, since only who plans needs a compiler, and that takes half a second to import.
    from eplb_fsm.placement.kernels.compiled import IS_COMPILED
    from eplb_fsm.placement.kernels.deepseek import place_layers

    # Plus zero, since -0.0 is in another order among bits than among floats.
    load = np.ascontiguousarray(np.where(load.any(axis=1, keepdims=True), load, 1.0) + 0.0)
    place = place_layers if IS_COMPILED else place_layers_numpy
    return place(load, num_physical, topology.num_ranks, topology.num_nodes, topology.num_groups)


def place_layers_numpy(load: Float64Array, num_physical: int, num_ranks: int, nodes: int, groups: int) -> Int64Array:
    """The numpy path; as :func:`~eplb_fsm.placement.kernels.deepseek.place_layers`."""
    layers, num_logical = load.shape
    # Groups to nodes: `logical` lists each node's experts, group after group.
    group_size, groups_per_node = num_logical // groups, groups // nodes
    # The last of the running sums, since sum() adds in an order of its own.
    totals = np.cumsum(load.reshape(layers, groups, group_size), axis=2)[:, :, -1]
    node_of, position = balanced_packing(totals, nodes)
    rows = np.arange(layers)[:, None]
    group_at = np.empty((layers, groups), dtype=np.int64)
    group_at[rows, node_of * groups_per_node + position] = np.arange(groups)
    logical = (group_at[:, :, None] * group_size + np.arange(group_size)).reshape(layers, num_logical)

    # Redundant slots inside each node; every (layer, node) is a problem of its own.
    node_logical = logical.reshape(layers * nodes, -1)
    node_load = load[rows, logical].reshape(layers * nodes, -1)
    expert_of, replicas = replicate_experts(node_load, num_physical // nodes)

    # Replicas to the ranks of the node.
    rows = np.arange(layers * nodes)[:, None]
    each = (node_load / replicas)[rows, expert_of]
    rank_of, position = balanced_packing(each, num_ranks // nodes)
    placed = np.empty_like(expert_of)
    slots_per_rank = num_physical // num_ranks
    placed[rows, rank_of * slots_per_rank + position] = node_logical[rows, expert_of]
    return placed.reshape(layers, num_physical)


def check_divides(num_logical: int, num_physical: int, topology: Topology) -> None:
    """Check the divisions that the hierarchical method needs.

    Raises:
        ConfigError: naming the numbers and the option to change.
    """
    for what, number, parts_name, parts in (
        ("num_groups", topology.num_groups, "num_nodes", topology.num_nodes),
        ("num_logical_experts", num_logical, "num_groups", topology.num_groups),
        ("num_physical_experts", num_physical, "num_ranks", topology.num_ranks),
    ):
        if number % parts:
            raise ConfigError(
                f"DeepSeek's method needs {what}={number} to be a multiple of {parts_name}={parts}; "
                "change num_redundant_experts, or use policy 'deepseek_global', blind to nodes and groups"
            )
    if num_physical < num_logical:
        raise ConfigError(
            f"{num_physical} physical experts cannot hold {num_logical} logical ones; raise num_redundant_experts"
        )


def is_hierarchical(num_logical: int, topology: Topology) -> bool:
    """Whether the experts divide into groups and the groups among the nodes, as the hierarchical method needs."""
    return not (topology.num_groups % topology.num_nodes or num_logical % topology.num_groups)


class DeepseekPolicy:
    """DeepSeek's load balancer as a policy. It looks at the load only, not at where experts are now.

    A layer without any load keeps its current row: nothing was measured, so nothing is moved for it.

    Args:
        variant: "hierarchical"; "global"; or "auto", hierarchical where `num_groups` is a multiple of
            `num_nodes` (and the experts divide among the groups), else global.
    """

    deterministic = True

    def __init__(self, variant: Variant = "auto") -> None:
        self._variant = variant
        self.name = "deepseek" if variant == "auto" else f"deepseek_{variant}"

    def warm_up(self) -> None:
        """Have the kernel compiled."""
        rebalance_experts(np.ones((1, 2)), 2, Topology(1))

    def plan(self, load: Float64Array, current: Placement, topology: Topology) -> Placement:
        """Place the experts by their load; arguments and result as in `RebalancePolicy.plan`.

        Raises:
            ConfigError: "hierarchical" with a topology that it cannot divide.
        """
        if self._is_global(current.num_logical_experts, topology):
            topology = Topology(topology.num_ranks)
        rows = rebalance_experts(load, current.num_physical_experts, topology)
        idle = ~load.any(axis=1)
        rows[idle] = current.physical_to_logical_map[idle]
        return Placement(rows, current.num_logical_experts, current.num_ranks)

    def _is_global(self, num_logical: int, topology: Topology) -> bool:
        if self._variant != "auto":
            return self._variant == "global"
        return not is_hierarchical(num_logical, topology)
