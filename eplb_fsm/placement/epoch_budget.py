"""Which layers an epoch moves: those that pay, and of them what fits its budget."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from eplb_fsm.placement.moves import BoolArray
from eplb_fsm.placement.placement import Placement
from eplb_fsm.placement.worth import Worth


def within_budget(
    worth: Worth, current: Sequence[Placement], targets: Sequence[Placement], max_bytes: int, *, must_pay: bool
) -> list[Placement]:
    """Leave layers as they are until each that moves pays, and what comes from other ranks fits the budget.

    What has to leave a rank goes first, then the layers that save most for each byte (by what it counts). One that does
    not fit is passed over, so the budget is filled; where there is too much, one that saves nothing waits. The next
    epoch starts from here, so it finds what was left.

    Args:
        worth: Of all layers.
        current: Live placement of each bank.
        targets: Wanted placement of each bank.
        max_bytes: Most bytes that come from other ranks, all ranks and banks together; 0: no limit.
        must_pay: Whether a layer stays that takes more time than it saves.
    """
    is_chosen = worth.pays if must_pay else np.ones(len(worth.num_bytes), dtype=np.bool_)
    if max_bytes and worth.num_bytes[is_chosen].sum() > max_bytes:
        is_chosen = _fitting(worth, is_chosen & ((worth.saved_share > 0.0) | worth.is_due), max_bytes)
    if is_chosen.all():
        return list(targets)
    ends = np.cumsum([placement.num_moe_layers for placement in current])
    fitting = []
    for before, after, chosen in zip(current, targets, np.split(is_chosen, ends[:-1]), strict=True):
        rows = np.where(chosen[:, None], after.physical_to_logical_map, before.physical_to_logical_map)
        fitting.append(Placement(rows, before.num_logical_experts, before.num_ranks))
    return fitting


def _fitting(worth: Worth, is_wanted: BoolArray, max_bytes: int) -> BoolArray:
    is_chosen, left = np.zeros_like(is_wanted), float(max_bytes)
    gain = worth.saved_share / np.maximum(worth.price, 1.0)
    for layer in np.lexsort((-gain, ~worth.is_due)).tolist():
        if is_wanted[layer] and worth.num_bytes[layer] <= left:
            is_chosen[layer] = True
            left -= worth.num_bytes[layer]
    return is_chosen
