"""What has to move: the difference of two placements, when the slot order within a rank is free."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eplb_fsm.placement.digest import Int64Array
from eplb_fsm.placement.placement import Placement

BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class LayerDifference:
    """What one layer still has to do, per rank; both lists of a rank have the same length.

    Attributes:
        layer: MoE layer of the bank.
        outgoing: For each rank the slots to overwrite, ascending.
        incoming: For each rank the experts to receive, ascending, -1 for a slot to empty.
    """

    layer: int
    outgoing: list[list[int]]
    incoming: list[list[int]]


def differences(current: Placement, target: Placement) -> list[LayerDifference]:
    """Slots to overwrite and experts to receive, as few as possible, for each layer that changes.

    A rank keeps what it holds and shall hold, whatever slots the target names for it: the order of
    slots within a rank has no meaning to a forward pass.

    Args:
        current: The live placement.
        target: A placement of the same shape.

    Returns:
        One entry for each layer that changes, ascending.
    """
    staying, arrived = _matched(current, target)
    num_slots, num_local = current.num_physical_experts, current.num_local_physical_experts
    slots = np.nonzero(~staying)[0]
    arrivals = np.nonzero(~arrived)[0]
    # Equally many per (layer, rank) on both sides, so one list of blocks serves both.
    blocks = (slots // num_local).tolist()
    columns = (slots % num_slots).tolist()
    experts = target.physical_to_logical_map.reshape(-1)[arrivals].tolist()
    found: dict[int, LayerDifference] = {}
    for block, slot, expert in zip(blocks, columns, experts, strict=True):
        layer, rank = divmod(block, current.num_ranks)
        if layer not in found:
            empty: tuple[list[list[int]], list[list[int]]] = (
                [[] for _ in range(current.num_ranks)],
                [[] for _ in range(current.num_ranks)],
            )
            found[layer] = LayerDifference(layer, *empty)
        found[layer].outgoing[rank].append(slot)
        found[layer].incoming[rank].append(expert)
    for difference in found.values():
        for arriving in difference.incoming:
            arriving.sort()
    return list(found.values())


def num_peer_moves(current: Placement, target: Placement) -> int:
    """Experts that have to come from another rank: those of each layer and rank that the rank does not hold yet.

    Args:
        current: The live placement.
        target: A placement of the same shape.
    """
    return int(peer_moves_of_layers(current, target).sum())


def peer_moves_of_layers(current: Placement, target: Placement) -> Int64Array:
    """Those of each layer, (layers) int64; arguments as of :func:`num_peer_moves`."""
    new = _held(target) & ~_held(current)
    return np.asarray(new.reshape(current.num_moe_layers, -1).sum(axis=1), dtype=np.int64)


def num_cross_node_moves(current: Placement, target: Placement, num_nodes: int) -> int:
    """Those of the peer moves for which no rank of the receiver's node holds the expert yet.

    Args:
        current: The live placement.
        target: A placement of the same shape.
        num_nodes: Nodes that the ranks stand on, equally many neighbours on each.
    """
    return int(cross_node_moves_of_layers(current, target, num_nodes).sum())


def cross_node_moves_of_layers(current: Placement, target: Placement, num_nodes: int) -> Int64Array:
    """Those of each layer, (layers) int64; arguments as of :func:`num_cross_node_moves`."""
    shape = current.num_moe_layers, num_nodes, current.num_ranks // num_nodes, current.num_logical_experts
    before, after = _held(current).reshape(shape), _held(target).reshape(shape)
    moved = after & ~before.any(axis=2, keepdims=True)
    return np.asarray(moved.reshape(len(moved), -1).sum(axis=1), dtype=np.int64)


def _held(placement: Placement) -> BoolArray:
    """Which experts each rank has, (layers and ranks, experts)."""
    slots = placement.physical_to_logical_map.reshape(-1, placement.num_local_physical_experts)
    held = np.zeros((len(slots), placement.num_logical_experts + 1), dtype=np.bool_)
    held[np.arange(len(slots))[:, None], slots] = True
    return held[:, :-1]  # without the empty slots, whose -1 is the last column


def _matched(current: Placement, target: Placement) -> tuple[BoolArray, BoolArray]:
    """Flat masks: slots of `current` that keep their expert, slots of `target` that are thereby served."""
    blocks = current.num_moe_layers * current.num_ranks
    # -1 counts as an expert here: an empty slot that shall stay empty is a match too.
    width = current.num_logical_experts + 1
    offsets = np.arange(1, blocks * width + 1, width)[:, None]
    before, order_before = _occurrences(current, offsets)
    after, order_after = _occurrences(target, offsets)
    staying = np.empty(len(before), dtype=np.bool_)
    arrived = np.empty(len(after), dtype=np.bool_)
    staying[order_before] = _contained(before, after)
    arrived[order_after] = _contained(after, before)
    return staying, arrived


def _occurrences(placement: Placement, offsets: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Ascending unique keys of (layer, rank, expert, how many of it came before), and their slots."""
    num_local = placement.num_local_physical_experts
    keys = (placement.physical_to_logical_map.reshape(-1, num_local) + offsets).reshape(-1)
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    position = np.arange(len(keys))
    starts = np.where(np.append(True, keys[1:] != keys[:-1]), position, 0)
    return keys * num_local + position - np.maximum.accumulate(starts), order


def _contained(keys: Int64Array, among: Int64Array) -> BoolArray:
    index = np.minimum(np.searchsorted(among, keys), len(among) - 1)
    return np.asarray(among[index] == keys)
