"""Replicas near their consumers: of an expert's replicas, a rank takes those of its own node first.

What each slot carries in all is given (:mod:`~eplb_fsm.placement.split`); which node's tokens it carries is free. So
the tokens of a node go to the node's own replicas, as far as those are to carry so much, and what is left goes to the
nodes whose replicas have room left, in proportion to it. No other division with the same load on each slot sends fewer
tokens to other nodes.
"""

from __future__ import annotations

import numpy as np

from eplb_fsm.placement.digest import Int64Array
from eplb_fsm.placement.validate import EMPTY, Float64Array


def near_shares(shares: Float64Array, rows: Int64Array, demand: Float64Array, node: int) -> Float64Array:
    """Shares for the tokens of one node; over all nodes each slot gets what `shares` gives it.

    Args:
        shares: (layers, num_physical_experts) float64 share of its expert's tokens that each slot gets in all; the
            slots of an expert sum to 1.
        rows: (layers, num_physical_experts) int64 expert of each slot, -1 where it is empty.
        demand: (layers, num_nodes, num_logical_experts) float64 tokens that ranks of each node have for each expert.
        node: The node.

    Returns:
        (layers, num_physical_experts) float64, the slots of an expert summing to 1. Where the node has no token for an
        expert, its slots get the shares that they get in all.
    """
    num_nodes = demand.shape[1]
    totals = demand.sum(axis=1, keepdims=True)
    asked = np.divide(demand, totals, out=np.zeros_like(demand), where=totals > 0.0)
    layer, slot = np.nonzero(rows != EMPTY)
    at = layer, slot * num_nodes // rows.shape[1], rows[layer, slot]
    given = np.zeros_like(demand)
    np.add.at(given, at, shares[layer, slot])
    own = np.minimum(asked, given)
    room = given - own
    left = np.divide(room, room.sum(axis=1, keepdims=True), out=np.zeros_like(room), where=room > 0.0)
    taken = left * (asked - own)[:, node, None, :]
    taken[:, node] += own[:, node]
    is_asked = asked[:, node] > 0.0
    taken = np.where(is_asked[:, None, :], taken, given)
    # A slot's part of what its node's replicas give together.
    part = np.divide(shares[layer, slot], given[at], out=np.zeros(len(slot)), where=given[at] > 0.0)
    found = np.zeros_like(shares)
    found[layer, slot] = part * taken[at] / taken.sum(axis=1)[layer, rows[layer, slot]]
    return found


def cross_node_share(shares_of_nodes: Float64Array, rows: Int64Array, demand: Float64Array) -> float:
    """Share of all tokens that go to another node.

    Args:
        shares_of_nodes: (num_nodes, layers, num_physical_experts) float64 shares for the tokens of each node.
        rows: As for :func:`near_shares`.
        demand: As there.
    """
    num_nodes = demand.shape[1]
    layer, slot = np.nonzero(rows != EMPTY)
    home = slot * num_nodes // rows.shape[1]
    kept = sum(
        float((shares_of_nodes[node, layer, slot] * demand[layer, node, rows[layer, slot]])[home == node].sum())
        for node in range(num_nodes)
    )
    return 1.0 - kept / float(demand.sum())
