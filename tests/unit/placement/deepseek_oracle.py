"""DeepSeek's method in plain loops, written from its description, to compare the library with.

Slow and without arrays on purpose. Ties are broken as `eplb_fsm.placement.policies.deepseek` documents.
"""

from __future__ import annotations


def pack(weights: list[float], num_packs: int) -> list[tuple[int, int]]:
    """(pack, position in it) of each item: heaviest item first, into the lightest pack with room."""
    capacity = len(weights) // num_packs
    if capacity == 1:
        return [(item, 0) for item in range(len(weights))]
    loads, counts = [0.0] * num_packs, [0] * num_packs
    result = [(-1, -1)] * len(weights)
    for item in sorted(range(len(weights)), key=lambda i: (-weights[i], i)):
        pack = min((p for p in range(num_packs) if counts[p] < capacity), key=lambda p: (loads[p], p))
        result[item] = (pack, counts[pack])
        loads[pack] += weights[item]
        counts[pack] += 1
    return result


def replicate(weights: list[float], num_slots: int) -> tuple[list[int], list[int]]:
    """Expert of each slot, and replicas of each expert."""
    slots, replicas = list(range(len(weights))), [1] * len(weights)
    while len(slots) < num_slots:
        hottest = max(range(len(weights)), key=lambda e: (weights[e] / replicas[e], -e))
        slots.append(hottest)
        replicas[hottest] += 1
    return slots, replicas


def place_layer(load: list[float], num_slots: int, groups: int, nodes: int, ranks: int) -> list[int]:
    """Expert of each slot of one layer, by the hierarchical method."""
    if not any(load):
        load = [1.0] * len(load)
    size = len(load) // groups
    group_loads = [sum_in_order(load[g * size : (g + 1) * size]) for g in range(groups)]
    groups_of_node: list[list[int]] = [[-1] * (groups // nodes) for _ in range(nodes)]
    for group, (node, position) in enumerate(pack(group_loads, nodes)):
        groups_of_node[node][position] = group
    slots_per_node, ranks_per_node = num_slots // nodes, ranks // nodes
    result: list[int] = []
    for node_groups in groups_of_node:
        experts = [group * size + i for group in node_groups for i in range(size)]
        slots, replicas = replicate([load[e] for e in experts], slots_per_node)
        each = [load[experts[s]] / replicas[s] for s in slots]
        placed = [-1] * slots_per_node
        for slot, (rank, position) in zip(slots, pack(each, ranks_per_node), strict=True):
            placed[rank * (slots_per_node // ranks_per_node) + position] = experts[slot]
        result += placed
    return result


def sum_in_order(values: list[float]) -> float:
    """A sum from left to right. Integer loads make it exact, so that numpy's other order is the same."""
    total = 0.0
    for value in values:
        total += value
    return total
