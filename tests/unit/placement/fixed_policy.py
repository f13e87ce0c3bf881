"""A policy that returns what it was given, so that a test chooses the target."""

from __future__ import annotations

import numpy as np

from eplb_fsm.placement import BankShape, Budget, Placement, Plan, Thresholds, Topology, make_plan


class Fixed:
    """Returns the given targets, one for each call."""

    name = "fixed"
    deterministic = True

    def __init__(self, *targets: object) -> None:
        self._targets = list(targets)

    def plan(self, load: np.ndarray, current: Placement, topology: Topology) -> Placement:
        return self._targets.pop(0)  # type: ignore[return-value]


def plan_between(
    current: Placement, target: Placement, rows: int, staging_buffers: int = 2, row_bytes: int = 10, num_nodes: int = 1
) -> Plan:
    """The plan from one placement to another, when a rank may write and send `rows` experts in a chunk."""
    return make_plan(
        Fixed(target),
        [np.ones((current.num_moe_layers, current.num_logical_experts))],
        [current],
        Topology(current.num_ranks, num_nodes),
        [BankShape("experts", (row_bytes,) * current.num_moe_layers)],
        Budget(rows * row_bytes, staging_buffers),
        thresholds=Thresholds(-1.0),
    )
