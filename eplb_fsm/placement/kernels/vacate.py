"""Emptying the slots of ranks that are to hold no expert, as a kernel."""

from __future__ import annotations

import numpy as np

from eplb_fsm.placement.digest import Int64Array
from eplb_fsm.placement.kernels.compiled import compiled
from eplb_fsm.placement.moves import BoolArray
from eplb_fsm.placement.validate import EMPTY, Float64Array


@compiled
def vacate_layers(load: Float64Array, rows: Int64Array, may_hold: BoolArray) -> None:
    """Empty the slots of ranks that may hold nothing. What was nowhere else goes to the slot that it burdens least.

    Such a slot is empty, or its expert has another one. There is one for each expert as long as the ranks that may hold
    experts have at least as many slots as there are experts. Balancing is left to the repair.

    Args:
        load: (layers, experts) float64.
        rows: (layers, slots) int64, changed in place.
        may_hold: (ranks) bool.
    """
    num_local = rows.shape[1] // len(may_hold)
    for index in range(len(rows)):
        row, replicas = rows[index], np.zeros(load.shape[1], dtype=np.int64)
        for slot in range(len(row)):
            if not may_hold[slot // num_local]:
                row[slot] = EMPTY
            elif row[slot] != EMPTY:
                replicas[row[slot]] += 1
        for expert in range(load.shape[1]):
            if replicas[expert] == 0:
                slot = _least_burdened(load[index], row, replicas, may_hold)
                if row[slot] != EMPTY:
                    replicas[row[slot]] -= 1
                row[slot] = expert
                replicas[expert] = 1


@compiled
def _least_burdened(weight: Float64Array, row: Int64Array, replicas: Int64Array, may_hold: BoolArray) -> int:
    """Return the slot that can be taken on the rank that carries least without what is in it."""
    num_local = len(row) // len(may_hold)
    carried = np.zeros(len(may_hold))
    for slot in range(len(row)):
        if row[slot] != EMPTY:
            carried[slot // num_local] += weight[row[slot]] / replicas[row[slot]]
    best, least = -1, np.inf
    for slot in range(len(row)):
        held = row[slot]
        if may_hold[slot // num_local] and (held == EMPTY or replicas[held] > 1):
            stays = carried[slot // num_local] - (weight[held] / replicas[held] if held != EMPTY else 0.0)
            if stays < least:
                best, least = slot, stays
    return best
