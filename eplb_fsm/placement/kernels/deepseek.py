"""DeepSeek's method as a kernel: the same placements as the numpy path, sooner.

Equal loads keep the order of the numpy path. What makes it fast: the two searches, for the next expert to replicate and
for the lightest rank, run over many layers at a time, item by item, in loops that the compiler turns into vector
instructions; experts with replicas are the heaviest ones, so that only as many as there are redundant slots are
searched; and the replicas of the others are in order already, so that only theirs are sorted, by leading bits.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from eplb_fsm.placement.digest import Int64Array
from eplb_fsm.placement.kernels.compiled import compiled
from eplb_fsm.placement.validate import Float64Array

_LANES = 32
"""Layers, or nodes of layers, that are placed at a time: what belongs to them stays in the first cache, and is small
enough for the allocator to keep between two plans; mapped anew, its pages would take half as long again."""
_BUCKETS = 1024
_FEW_BUCKETS = 256
"""For replicas, whose weights are close to each other."""
_KEY_SHIFT = 46
"""Bits of a float64 that the key leaves out: 64 buckets for each factor of two, 16 of those below the largest one."""
_PACKS_AT_A_TIME = 4


class _Scratch(NamedTuple):
    """Arrays that every layer uses again.

    Attributes:
        order: (experts) int64, heaviest first.
        starts: (buckets + 1) int64 of a sort; ``few_starts`` with fewer buckets.
        replicas: (experts) int64 of each expert.
        item: int64 replicas of experts that have several: a first copy is its expert, then come the redundant slots.
        each: float64 their load.
        item_order: int64 their order, heaviest first.
    """

    order: Int64Array
    starts: Int64Array
    few_starts: Int64Array
    replicas: Int64Array
    item: Int64Array
    each: Float64Array
    item_order: Int64Array


@compiled
def _sort_descending(weight: Float64Array, order: Int64Array, starts: Int64Array) -> None:
    """Fill `order` with the indices of `weight`, heaviest first, equal ones ascending.

    A bucket sort by the leading bits, which for floats of 0 or more are in the order of the floats, and an insertion
    sort of what it leaves. No weight is outside of all buckets: the last one takes what is far below the largest.
    """
    num_items, last = len(weight), len(starts) - 2
    bits = weight.view(np.int64)
    top = bits.max()
    starts[:] = 0
    for item in range(num_items):
        starts[min((top - bits[item]) >> _KEY_SHIFT, last) + 1] += 1
    for bucket in range(1, last + 1):
        starts[bucket] += starts[bucket - 1]
    for item in range(num_items):
        bucket = min((top - bits[item]) >> _KEY_SHIFT, last)
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
def _replicate(weight: Float64Array, expert: Float64Array, num_redundant: int, extra: Int64Array) -> None:
    """Give redundant slots away, one by one, to the expert with most load per replica; of equals to the first one.

    Args:
        weight: (experts, lanes) their loads, heaviest first; at least one more of them than slots, or all.
        expert: (experts, lanes) their numbers.
        num_redundant: Slots to give away.
        extra: (num_redundant, lanes); set to the expert of each redundant slot.
    """
    num_experts, lanes = weight.shape
    each = weight.copy()
    replicas = np.ones((num_experts, lanes))
    most, chosen, row = np.empty(lanes), np.empty(lanes), np.empty(lanes)
    for slot in range(num_redundant):
        for lane in range(lanes):
            most[lane], chosen[lane], row[lane] = each[0, lane], expert[0, lane], 0.0
        for candidate in range(1, min(slot + 1, num_experts)):
            load, number, place = each[candidate], expert[candidate], float(candidate)
            for lane in range(lanes):
                is_it = (load[lane] > most[lane]) | ((load[lane] == most[lane]) & (number[lane] < chosen[lane]))
                most[lane] = load[lane] if is_it else most[lane]
                chosen[lane] = number[lane] if is_it else chosen[lane]
                row[lane] = place if is_it else row[lane]
        for lane in range(lanes):
            place = int(row[lane])
            replicas[place, lane] += 1.0
            each[place, lane] = weight[place, lane] / replicas[place, lane]
            extra[slot, lane] = int(chosen[lane])


@compiled
def _pack(weight: Float64Array, num_packs: int, slot_of: Int64Array) -> None:
    """Put each item into the lightest pack with room, in this order; of equally light packs into the first.

    Args:
        weight: (items, lanes) their loads, heaviest first.
        num_packs: Packs, with equal room.
        slot_of: (items, lanes); set to the slot of each item, pack by pack, each filled from its first one.
    """
    num_items, lanes = weight.shape
    capacity = num_items // num_packs
    num_rows = -(-num_packs // _PACKS_AT_A_TIME) * _PACKS_AT_A_TIME
    loads = np.zeros((num_rows, lanes))
    loads[num_packs:] = np.inf  # of packs that are not there; a full one, too, is never the lightest again
    counts = np.zeros((num_packs, lanes), dtype=np.int64)
    least, lightest = np.empty(lanes), np.empty(lanes)
    for item in range(num_items):
        least[:] = np.inf
        lightest[:] = 0.0
        for pack in range(0, num_rows, _PACKS_AT_A_TIME):
            first, second, third, fourth = loads[pack], loads[pack + 1], loads[pack + 2], loads[pack + 3]
            number = float(pack)
            for lane in range(lanes):  # a tournament, whose winners stay in registers
                is_second = second[lane] < first[lane]
                load = second[lane] if is_second else first[lane]
                winner = number + 1.0 if is_second else number
                is_fourth = fourth[lane] < third[lane]
                other_load = fourth[lane] if is_fourth else third[lane]
                other = number + 3.0 if is_fourth else number + 2.0
                is_other = other_load < load
                load = other_load if is_other else load
                winner = other if is_other else winner
                is_least = load < least[lane]
                least[lane] = load if is_least else least[lane]
                lightest[lane] = winner if is_least else lightest[lane]
        for lane in range(lanes):
            pack = int(lightest[lane])
            count = counts[pack, lane]
            slot_of[item, lane] = pack * capacity + count
            counts[pack, lane] = count + 1
            loads[pack, lane] = least[lane] + weight[item, lane] if count + 1 < capacity else np.inf


@compiled
def _order_items(
    weight: Float64Array, extra: Int64Array, scratch: _Scratch, expert_of: Int64Array, load_of: Float64Array
) -> None:
    """List the replicas of all experts, heaviest first; equal ones by the number of the item.

    Args:
        weight: Load of each expert, whose order is in the scratch.
        extra: Expert of each redundant slot.
        scratch: Arrays to use.
        expert_of: Set to the expert of each replica.
        load_of: Set to its load.
    """
    num_experts, order, replicas = len(weight), scratch.order, scratch.replicas
    replicas[:] = 1
    for slot in range(len(extra)):
        replicas[extra[slot]] += 1
    num_items = num_replicated = 0
    for expert in range(num_experts):
        if replicas[expert] > 1:
            scratch.item[num_items] = expert
            scratch.each[num_items] = weight[expert] / replicas[expert]
            num_items += 1
    num_replicated = num_items
    for slot in range(len(extra)):
        scratch.item[num_items] = num_experts + slot
        scratch.each[num_items] = weight[extra[slot]] / replicas[extra[slot]]
        num_items += 1
    if num_items:
        _sort_descending(scratch.each[:num_items], scratch.item_order, scratch.few_starts)
    taken, single = 0, num_replicated  # experts with replicas are the first ones of the order
    for position in range(num_items + num_experts - num_replicated):
        if taken < num_items:
            item, load = scratch.item[scratch.item_order[taken]], scratch.each[scratch.item_order[taken]]
            if (
                single == num_experts
                or load > weight[order[single]]
                or (load == weight[order[single]] and item < order[single])
            ):
                expert_of[position] = item if item < num_experts else extra[item - num_experts]
                load_of[position] = load
                taken += 1
                continue
        expert_of[position] = order[single]
        load_of[position] = weight[order[single]]
        single += 1


@compiled
def _place_lanes(weight: Float64Array, num_packs: int, placed: Int64Array) -> None:
    """Fill the slots of some layers, or of nodes of layers, pack by pack: replicate, then pack.

    Args:
        weight: (lanes, experts) loads.
        num_packs: Ranks.
        placed: (lanes, slots); set to the expert of each slot.
    """
    lanes, num_experts = weight.shape
    num_slots = placed.shape[1]
    num_redundant = num_slots - num_experts
    scratch = _Scratch(
        np.empty(num_experts, dtype=np.int64),
        np.empty(_BUCKETS + 1, dtype=np.int64),
        np.empty(_FEW_BUCKETS + 1, dtype=np.int64),
        np.empty(num_experts, dtype=np.int64),
        np.empty(2 * num_redundant, dtype=np.int64),
        np.empty(2 * num_redundant),
        np.empty(2 * num_redundant, dtype=np.int64),
    )
    num_heavy = min(num_redundant + 1, num_experts)
    orders = np.empty((lanes, num_experts), dtype=np.int64)
    heavy, heavy_experts = np.empty((num_heavy, lanes)), np.empty((num_heavy, lanes))
    for lane in range(lanes):
        _sort_descending(weight[lane], orders[lane], scratch.starts)
        for row in range(num_heavy):
            heavy[row, lane], heavy_experts[row, lane] = weight[lane, orders[lane, row]], orders[lane, row]
    extra = np.empty((num_redundant, lanes), dtype=np.int64)
    _replicate(heavy, heavy_experts, num_redundant, extra)
    if num_packs == num_slots:  # as published: the items stay in order
        for lane in range(lanes):
            placed[lane, :num_experts] = np.arange(num_experts)
            placed[lane, num_experts:] = extra[:, lane]
        return
    expert_of, loads = np.empty((lanes, num_slots), dtype=np.int64), np.empty((num_slots, lanes))
    load_of = np.empty(num_slots)
    for lane in range(lanes):
        scratch.order[:] = orders[lane]
        _order_items(weight[lane], extra[:, lane].copy(), scratch, expert_of[lane], load_of)
        loads[:, lane] = load_of
    slot_of = np.empty((num_slots, lanes), dtype=np.int64)
    _pack(loads, num_packs, slot_of)
    for lane in range(lanes):
        for item in range(num_slots):
            placed[lane, slot_of[item, lane]] = expert_of[lane, item]


@compiled
def _experts_of_nodes(load: Float64Array, num_groups: int, num_nodes: int) -> Int64Array:
    """List the experts of each node of each layer: its groups in the order in which they were packed."""
    layers, num_experts = load.shape
    size = num_experts // num_groups
    logical = np.empty(load.shape, dtype=np.int64)
    totals, order = np.zeros(num_groups), np.arange(num_groups)
    orders, descending = np.empty((layers, num_groups), dtype=np.int64), np.empty((num_groups, layers))
    starts = np.empty(_FEW_BUCKETS + 1, dtype=np.int64)
    for layer in range(layers):
        totals[:] = 0.0
        for expert in range(num_experts):
            totals[expert // size] += load[layer, expert]
        if num_nodes < num_groups:  # else, as published, the groups stay in order
            _sort_descending(totals, order, starts)
        orders[layer], descending[:, layer] = order, totals[order]
    slot_of = np.empty((num_groups, layers), dtype=np.int64)
    if num_nodes < num_groups:
        _pack(descending, num_nodes, slot_of)
    for layer in range(layers):
        for item in range(num_groups):
            start = slot_of[item, layer] if num_nodes < num_groups else item
            for offset in range(size):
                logical[layer, start * size + offset] = orders[layer, item] * size + offset
    return logical


@compiled
def _place_problems(weight: Float64Array, num_packs: int, placed: Int64Array) -> None:
    """As :func:`_place_lanes`, of any number of lanes."""
    for first in range(0, len(weight), _LANES):
        some = slice(first, min(first + _LANES, len(weight)))
        _place_lanes(weight[some], num_packs, placed[some])


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
    layers, num_logical = load.shape
    placed = np.empty((layers, num_physical), dtype=np.int64)
    if num_groups == num_nodes == 1:
        _place_problems(load, num_ranks, placed)
        return placed
    logical = _experts_of_nodes(load, num_groups, num_nodes)
    weight = np.empty((layers, num_logical))
    for layer in range(layers):
        for index in range(num_logical):
            weight[layer, index] = load[layer, logical[layer, index]]
    problems = layers * num_nodes
    of_nodes, experts = placed.reshape(problems, -1), logical.reshape(problems, -1)
    _place_problems(weight.reshape(problems, -1), num_ranks // num_nodes, of_nodes)
    for problem in range(problems):
        for slot in range(of_nodes.shape[1]):
            of_nodes[problem, slot] = experts[problem, of_nodes[problem, slot]]
    return placed
