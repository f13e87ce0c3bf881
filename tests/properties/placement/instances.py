"""Strategies: random placements, and problems of getting from some to others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from eplb_fsm.placement import BankShape, Budget, Placement, Plan, Thresholds, Topology, make_plan


@st.composite
def rows(draw: st.DrawFn, num_experts: int, num_slots: int, may_be_empty: bool) -> list[int]:
    """One layer: every expert once, the other slots any expert or empty, in any order."""
    extra = st.integers(-1 if may_be_empty else 0, num_experts - 1)
    filling = draw(st.lists(extra, min_size=num_slots - num_experts, max_size=num_slots - num_experts))
    return draw(st.permutations([*range(num_experts), *filling]))


@st.composite
def placements(draw: st.DrawFn, num_ranks: int) -> Placement:
    """A live placement of a few small layers."""
    return draw(placement_pairs(num_ranks))[0]


@st.composite
def placement_pairs(draw: st.DrawFn, num_ranks: int) -> tuple[Placement, Placement]:
    """A live placement and a target of the same shape."""
    num_slots = num_ranks * draw(st.integers(1, 5))
    num_experts = draw(st.integers(1, num_slots))
    num_layers = draw(st.integers(1, 3))
    may_be_empty = draw(st.booleans())
    both = [[draw(rows(num_experts, num_slots, may_be_empty)) for _ in range(num_layers)] for _ in range(2)]
    current, target = (Placement(layers, num_experts, num_ranks) for layers in both)
    return current, target


@dataclass(frozen=True)
class Problem:
    """Live placements, targets and bounds of a plan."""

    current: tuple[Placement, ...]
    target: tuple[Placement, ...]
    shapes: tuple[BankShape, ...]
    budget: Budget
    num_nodes: int = 1

    def plan(self) -> Plan:
        """The plan that solves it, whatever it gains."""
        loads = [np.ones((p.num_moe_layers, p.num_logical_experts)) for p in self.current]
        topology = Topology(self.current[0].num_ranks, self.num_nodes)
        policy = Targets(list(self.target))
        return make_plan(policy, loads, self.current, topology, self.shapes, self.budget, Thresholds(-2.0))


class Targets:
    """A policy that returns the given placements, one for each call."""

    name = "targets"
    deterministic = True

    def __init__(self, targets: list[Placement]) -> None:
        self._targets = targets

    def plan(self, load: np.ndarray, current: Placement, topology: Topology) -> Placement:
        return self._targets.pop(0)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """One or two banks, rows of several sizes, budgets from one expert upwards."""
    num_ranks = draw(st.integers(1, 4))
    pairs = [draw(placement_pairs(num_ranks)) for _ in range(draw(st.integers(1, 2)))]
    shapes = tuple(
        BankShape(f"bank{i}", tuple(draw(st.sampled_from((8, 12, 20))) for _ in range(current.num_moe_layers)))
        for i, (current, _) in enumerate(pairs)
    )
    largest = max(size for shape in shapes for size in shape.row_bytes)
    budget = Budget(draw(st.integers(largest, 5 * largest)), draw(st.integers(1, 3)))
    current, target = zip(*pairs, strict=True)
    num_nodes = draw(st.sampled_from([nodes for nodes in range(1, num_ranks + 1) if num_ranks % nodes == 0]))
    return Problem(current, target, shapes, budget, num_nodes)
