"""Replicas near their consumers: as few tokens as possible go to another node, and each slot carries what it shall."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import linprog

from eplb_fsm.placement import Placement
from eplb_fsm.placement.near import cross_node_share, near_shares
from eplb_fsm.placement.split import weighted_shares
from tests.benchmarks.placement.loads import Size
from tests.benchmarks.split import drifted

SIZE = Size(2, 12, 24, 6)
NUM_NODES = 3


def problem(seed: int) -> tuple[Placement, np.ndarray, np.ndarray]:
    """A placement with many replicas, the shares that balance it, and what the nodes ask for."""
    placement, load = drifted(SIZE, 0.3, seed)
    parts = np.random.default_rng(seed).dirichlet([0.5] * NUM_NODES, load.shape).swapaxes(1, 2)
    return placement, weighted_shares(load, placement), np.round(load[:, None] * parts)


def shares_of_nodes(shares: np.ndarray, rows: np.ndarray, demand: np.ndarray) -> np.ndarray:
    """For the tokens of each node."""
    return np.stack([near_shares(shares, rows, demand, node) for node in range(demand.shape[1])])


@pytest.mark.parametrize("seed", range(5))
def test_each_slot_carries_what_it_shall(seed: int) -> None:
    """The tokens of all nodes together give every slot its share, and those of each node all find a slot."""
    placement, shares, demand = problem(seed)
    rows = placement.physical_to_logical_map
    found = shares_of_nodes(shares, rows, demand)
    for layer, row in enumerate(rows):
        carried = (found[:, layer] * demand[layer][:, row]).sum(axis=0)
        assert carried == pytest.approx(shares[layer] * demand[layer].sum(axis=0)[row])
        for expert in range(SIZE.num_logical):
            assert found[:, layer, row == expert].sum(axis=1) == pytest.approx([1.0] * NUM_NODES)


@pytest.mark.parametrize("seed", range(3))
def test_no_division_sends_fewer_tokens_to_other_nodes(seed: int) -> None:
    """Beside a linear program over what goes from each node to each slot; and far fewer than if nodes do not count."""
    placement, shares, demand = problem(seed)
    rows = placement.physical_to_logical_map
    crossing = cross_node_share(shares_of_nodes(shares, rows, demand), rows, demand)
    fewest = sum(fewest_crossing(shares[layer], row, demand[layer]) for layer, row in enumerate(rows)) / demand.sum()
    assert crossing == pytest.approx(fewest, abs=1e-6)
    assert crossing < cross_node_share(np.stack([shares] * NUM_NODES), rows, demand) - 0.05


def fewest_crossing(shares: np.ndarray, row: np.ndarray, demand: np.ndarray) -> float:
    """Tokens that have to go to another node, by a transport problem."""
    nodes, slots = demand.shape[0], len(row)
    home = np.arange(slots) * nodes // slots
    cost = (home[None, :] != np.arange(nodes)[:, None]).astype(float).reshape(-1)
    rules, values = [], []
    for slot in range(slots):  # each slot gets its share
        rule = np.zeros((nodes, slots))
        rule[:, slot] = 1.0
        rules.append(rule.reshape(-1))
        values.append(shares[slot] * demand[:, row[slot]].sum())
    for node in range(nodes):  # each token goes to some slot of its expert
        for expert in range(demand.shape[1]):
            rule = np.zeros((nodes, slots))
            rule[node, row == expert] = 1.0
            rules.append(rule.reshape(-1))
            values.append(demand[node, expert])
    solved = linprog(cost, A_eq=np.array(rules), b_eq=np.array(values))
    assert solved.success
    return float(solved.fun)


def test_what_is_idle_or_empty_is_divided_as_without_nodes() -> None:
    """An expert that nobody, or not this node, asks for keeps its shares; an empty slot has none."""
    rows = np.array([[0, 1, 0, 2, 1, -1]])
    shares = np.array([[0.25, 0.5, 0.75, 1.0, 0.5, 0.0]])
    demand = np.array([[[0.0, 0.0, 3.0], [8.0, 0.0, 1.0]]])
    first, second = shares_of_nodes(shares, rows, demand)
    assert first.tolist() == shares.tolist()
    assert second.tolist() == shares.tolist()
    local = near_shares(shares, rows, np.array([[[6.0, 1.0, 1.0], [2.0, 1.0, 1.0]]]), 0)
    assert local[0].tolist() == [pytest.approx(0.25), 1.0, pytest.approx(0.75), 1.0, 0.0, 0.0]
