"""Which layers an epoch moves when not all of what the policy wants fits its budget."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from eplb_fsm.placement.balancedness import rank_loads
from eplb_fsm.placement.moves import peer_moves_of_layers
from eplb_fsm.placement.placement import Placement
from eplb_fsm.placement.shapes import BankShape
from eplb_fsm.placement.validate import Float64Array


def within_budget(
    loads: Sequence[Float64Array],
    current: Sequence[Placement],
    targets: Sequence[Placement],
    shapes: Sequence[BankShape],
    max_bytes: int,
) -> tuple[list[Placement], int]:
    """Leave layers as they are until what comes from other ranks fits the budget.

    The layers that save most for each byte go first: load of the heaviest rank, which is what a forward pass waits
    for. One that does not fit is passed over, so the budget is filled; one that saves nothing waits. The next epoch
    starts from here, so it finds what was left.

    Args:
        loads: Load of each bank, (layers, experts).
        current: Live placement of each bank.
        targets: Wanted placement of each bank.
        shapes: Sizes of each bank's experts.
        max_bytes: Most bytes that come from other ranks, all ranks and banks together; 0: no limit.

    Returns:
        Placements that fit, and the bytes of all that was wanted.
    """
    costs = [
        peer_moves_of_layers(*pair) * np.array(shape.row_bytes, dtype=np.int64)
        for *pair, shape in zip(current, targets, shapes, strict=True)
    ]
    cost = np.concatenate(costs)
    wanted = int(cost.sum())
    if not max_bytes or wanted <= max_bytes:
        return list(targets), wanted
    saved = np.concatenate([_saved(*parts) for parts in zip(loads, current, targets, strict=True)])
    is_chosen, left = np.zeros(len(cost), dtype=np.bool_), max_bytes
    for layer in np.argsort(-saved / np.maximum(cost, 1), kind="stable").tolist():
        if saved[layer] > 0.0 and cost[layer] <= left:
            is_chosen[layer] = True
            left -= int(cost[layer])
    ends = np.cumsum([len(each) for each in costs])
    fitting = []
    for before, after, chosen in zip(current, targets, np.split(is_chosen, ends[:-1]), strict=True):
        rows = np.where(chosen[:, None], after.physical_to_logical_map, before.physical_to_logical_map)
        fitting.append(Placement(rows, before.num_logical_experts, before.num_ranks))
    return fitting, wanted


def _saved(load: Float64Array, current: Placement, target: Placement) -> Float64Array:
    """By how much the heaviest rank of each layer gets lighter."""
    return np.asarray(rank_loads(load, current).max(axis=1) - rank_loads(load, target).max(axis=1))
