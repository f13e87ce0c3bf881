"""DeepSeek's method, one layer after the other, as a kernel: the same placements as the numpy path, sooner.

Equal loads keep the order of the numpy path. What makes it fast: items are sorted by the leading bits of their
weight, in one pass; experts with replicas are a prefix of that order, so the next redundant slot is found without
looking at the rest; and the lightest rank is the root of a tournament, of which one item changes one path.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from eplb_fsm.placement.digest import Int64Array
from eplb_fsm.placement.kernels.compiled import compiled
from eplb_fsm.placement.validate import Float64Array

_NUM_BUCKETS = 1024
_KEY_SHIFT = 46
"""Bits of a float64 that the key leaves out: 64 buckets for each factor of two, 16 of those below the largest one."""


class _Scratch(NamedTuple):
    """Arrays of one node that every layer uses again.

    Attributes:
        order: (slots) int64 items in descending order.
        starts: (buckets + 1) int64 of the sort.
        replicas: (experts) int64.
        expert_of: (slots) int64 expert of each item: first one of each, then the redundant ones.
        each: (slots) float64 load of each item.
        pack_of: (slots) int64.
        position: (slots) int64 place in the pack.
    """

    order: Int64Array
    starts: Int64Array
    replicas: Int64Array
    expert_of: Int64Array
    each: Float64Array
    pack_of: Int64Array
    position: Int64Array


@compiled
def _bucket(distance: int) -> int:
    """Return the bucket of a weight from how far its bits are below the largest; no weight is outside of all."""
    return max(min(distance >> _KEY_SHIFT, _NUM_BUCKETS - 1), 0)


@compiled
def _sort_descending(weight: Float64Array, order: Int64Array, starts: Int64Array) -> None:
    """Fill `order` with the indices of `weight`, heaviest first, equal ones ascending.

    A bucket sort by the leading bits, which for floats of 0 or more are in the order of the floats, and an insertion
    sort of what it leaves.
    """
    num_items = len(weight)
    bits = weight.view(np.int64)
    top = bits.max()
    starts[:] = 0
    for item in range(num_items):
        starts[_bucket(top - bits[item]) + 1] += 1
    for bucket in range(1, _NUM_BUCKETS):
        starts[bucket] += starts[bucket - 1]
    for item in range(num_items):
        bucket = _bucket(top - bits[item])
        order[starts[bucket]] = item
        starts[bucket] += 1
    for position in range(1, num_items):
        item = order[position]
        at = position
        while at > 0 and weight[order[at - 1]] < weight[item]:
            order[at] = order[at - 1]
            at -= 1
        order[at] = item


@compiled
def _replicate(
    weight: Float64Array, order: Int64Array, num_redundant: int, replicas: Int64Array, extra: Int64Array
) -> None:
    """Give redundant slots away, one by one, to the expert with most load per replica.

    Experts that have replicas are the first ones of `order`, so only those and the next one have to be looked at.

    Args:
        weight: Load of each expert.
        order: The experts, heaviest first.
        num_redundant: Slots to give away.
        replicas: Set to the replicas of each expert.
        extra: Set to the expert of each redundant slot.
    """
    replicas[:] = 1
    num_replicated = 0
    for slot in range(num_redundant):
        chosen, most = -1, -1.0
        for position in range(min(num_replicated + 1, len(weight))):
            expert = order[position]
            each = weight[expert] / replicas[expert]
            if each > most or (each == most and expert < chosen):
                chosen, most = expert, each
        num_replicated += replicas[chosen] == 1
        replicas[chosen] += 1
        extra[slot] = chosen


@compiled
def _pack(weight: Float64Array, order: Int64Array, num_packs: int, pack_of: Int64Array, position: Int64Array) -> None:
    """Put each item into the lightest pack with room, in this order; of equally light packs into the first.

    Args:
        weight: Load of each item.
        order: The items, heaviest first.
        num_packs: Packs, with equal room.
        pack_of: Set to the pack of each item.
        position: Set to the place of each item in its pack.
    """
    capacity = len(weight) // num_packs
    size = 1
    while size < num_packs:
        size *= 2
    # Node n has the lighter one of nodes 2n and 2n + 1, the left one where they are equal; leaves are the packs.
    lightest = np.full(2 * size, np.inf)
    lightest[size : size + num_packs] = 0.0
    bits = lightest.view(np.int64)  # of floats of 0 or more: in the order of the floats
    winner = np.arange(-size, size)
    for node in range(size - 1, 0, -1):
        left = lightest[2 * node] <= lightest[2 * node + 1]
        lightest[node] = lightest[2 * node] if left else lightest[2 * node + 1]
        winner[node] = winner[2 * node] if left else winner[2 * node + 1]
    counts = np.zeros(num_packs, dtype=np.int64)
    for index in range(len(order)):
        item, pack = order[index], winner[1]
        pack_of[item], position[item] = pack, counts[pack]
        counts[pack] += 1
        node = size + pack
        # A full pack is never the lightest again.
        lightest[node] = lightest[node] + weight[item] if counts[pack] < capacity else np.inf
        load = bits[node]
        while node > 1:
            other, other_pack = bits[node ^ 1], winner[node ^ 1]
            # All ones where it stays the lighter one: that cannot be predicted, and a wrong guess costs most.
            mask = -np.int64(load < other + 1 - (node & 1))
            load = other ^ ((load ^ other) & mask)
            pack = other_pack ^ ((pack ^ other_pack) & mask)
            node >>= 1
            bits[node], winner[node] = load, pack


@compiled
def _place_on_node(weight: Float64Array, num_ranks: int, scratch: _Scratch, expert_at: Int64Array) -> None:
    """Fill the slots of one node, rank by rank, with positions in `weight`: replicate, then pack."""
    num_experts, num_slots = len(weight), len(expert_at)
    expert_of, each, order = scratch.expert_of, scratch.each, scratch.order
    pack_of, position = scratch.pack_of, scratch.position
    _sort_descending(weight, order, scratch.starts)
    _replicate(weight, order, num_slots - num_experts, scratch.replicas, expert_of[num_experts:])
    for item in range(num_slots):
        each[item] = weight[expert_of[item]] / scratch.replicas[expert_of[item]]
    slots_per_rank = num_slots // num_ranks
    if slots_per_rank == 1:  # as published: the items stay in order
        expert_at[:] = expert_of
        return
    _sort_descending(each, order, scratch.starts)
    _pack(each, order, num_ranks, pack_of, position)
    for item in range(num_slots):
        expert_at[pack_of[item] * slots_per_rank + position[item]] = expert_of[item]


@compiled
def _experts_of_nodes(weight: Float64Array, num_groups: int, num_nodes: int) -> Int64Array:
    """List the experts of each node, one node after the other: its groups in the order in which they were packed."""
    if num_groups == num_nodes == 1:
        return np.arange(len(weight))
    size = len(weight) // num_groups
    total = np.zeros(num_groups)
    for group in range(num_groups):
        for expert in range(group * size, (group + 1) * size):
            total[group] += weight[expert]
    node_of, position = np.arange(num_groups), np.zeros(num_groups, dtype=np.int64)
    if num_nodes < num_groups:
        order = np.empty(num_groups, dtype=np.int64)
        _sort_descending(total, order, np.empty(_NUM_BUCKETS + 1, dtype=np.int64))
        _pack(total, order, num_nodes, node_of, position)
    logical = np.empty(len(weight), dtype=np.int64)
    for group in range(num_groups):
        start = (node_of[group] * (num_groups // num_nodes) + position[group]) * size
        for offset in range(size):
            logical[start + offset] = group * size + offset
    return logical


@compiled
def place_layers(load: Float64Array, num_physical: int, num_ranks: int, num_nodes: int, num_groups: int) -> Int64Array:
    """DeepSeek's hierarchical placement of all layers; everything divides, and every layer has some load.

    Args:
        load: (layers, num_logical_experts) float64, C-contiguous, 0 or more, and no -0.0.
        num_physical: Slots per layer.
        num_ranks: Ranks that share them.
        num_nodes: Nodes; 1 with one group is the global method.
        num_groups: Groups of experts, each kept on one node.

    Returns:
        (layers, num_physical) int64 physical-to-logical map.
    """
    placed = np.empty((len(load), num_physical), dtype=np.int64)
    experts, slots = load.shape[1] // num_nodes, num_physical // num_nodes
    expert_at = np.empty(slots, dtype=np.int64)
    scratch = _Scratch(
        np.empty(slots, dtype=np.int64),
        np.empty(_NUM_BUCKETS + 1, dtype=np.int64),
        np.empty(experts, dtype=np.int64),
        np.arange(slots),
        np.empty(slots),
        np.empty(slots, dtype=np.int64),
        np.empty(slots, dtype=np.int64),
    )
    for layer in range(len(load)):
        logical = _experts_of_nodes(load[layer], num_groups, num_nodes)
        for node in range(num_nodes):
            own = logical[node * experts : (node + 1) * experts]
            _place_on_node(load[layer][own], num_ranks // num_nodes, scratch, expert_at)
            for slot in range(slots):
                placed[layer, node * slots + slot] = own[expert_at[slot]]
    return placed
