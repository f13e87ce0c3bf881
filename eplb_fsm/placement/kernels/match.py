"""New rows for old ranks: which rank gets which content, so that most of it is there already."""

from __future__ import annotations

import numpy as np

from eplb_fsm.placement.digest import Int64Array
from eplb_fsm.placement.kernels.compiled import compiled
from eplb_fsm.placement.validate import EMPTY, Float64Array


@compiled
def match_ranks(start: Int64Array, rows: Int64Array, kind: Float64Array, num_nodes: int, num_experts: int) -> None:
    """Give each node's, and then each rank's, content of new rows to the node or rank that has most of it already.

    Args:
        start: (layers, slots) int64 what the slots hold now.
        rows: (layers, slots) int64 new rows; permuted in place, whole nodes and ranks within nodes.
        kind: (ranks) float64; only ranks of one kind get each other's content, and nodes with the same kinds in order.
        num_nodes: Nodes.
        num_experts: Logical experts.
    """
    per_node, ranks = rows.shape[1] // num_nodes, len(kind) // num_nodes
    of_nodes = kind.reshape(num_nodes, ranks)
    for layer in range(len(rows)):
        row = rows[layer].copy()
        pair = _match_blocks(start[layer], row, of_nodes, of_nodes, num_experts)
        for node in range(num_nodes):
            at = pair[node] * per_node
            own = row[node * per_node : (node + 1) * per_node]
            own_kinds, kinds = of_nodes[node].reshape(-1, 1), of_nodes[pair[node]].reshape(-1, 1)
            rank_pair = _match_blocks(start[layer, at : at + per_node], own, own_kinds, kinds, num_experts)
            size = per_node // ranks
            for rank in range(ranks):
                to = at + rank_pair[rank] * size
                rows[layer, to : to + size] = own[rank * size : (rank + 1) * size]


@compiled
def _match_blocks(
    start: Int64Array, row: Int64Array, kinds: Float64Array, start_kinds: Float64Array, num_experts: int
) -> Int64Array:
    """Pair the blocks of a row with those of the start, greedily by common experts; returns the pair of each block."""
    num_blocks = len(kinds)
    size = len(row) // num_blocks
    held = np.zeros((num_experts, num_blocks), dtype=np.int64)
    for slot in range(len(start)):
        if start[slot] != EMPTY:
            held[start[slot], slot // size] = 1
    common = np.zeros((num_blocks, num_blocks), dtype=np.int64)
    for slot in range(len(row)):
        if row[slot] != EMPTY:
            common[slot // size] += held[row[slot]]
    for block in range(num_blocks):
        for other in range(num_blocks):
            if (kinds[block] != start_kinds[other]).any():
                common[block, other] = -1
    pair = np.empty(num_blocks, dtype=np.int64)
    for _ in range(num_blocks):
        block, other = divmod(int(common.argmax()), num_blocks)
        pair[block] = other
        common[block, :] = -1
        common[:, other] = -1
    return pair
