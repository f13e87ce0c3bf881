"""Tables that say which slot each token of an expert goes to, as a kernel: slots take turns by their shares.

Engines pick a replica by the number of the token, modulo how many entries the expert has in its table. So a slot that
is entered twice gets twice the tokens, and no engine needs other code for that.
"""

from __future__ import annotations

import numpy as np

from eplb_fsm.placement.digest import Int64Array
from eplb_fsm.placement.kernels.compiled import compiled
from eplb_fsm.placement.validate import Float64Array

_AS_CLOSE = 1e-9
"""Tables of which the shares are off by as much, but for this, are equally good: the shorter one is taken."""


@compiled
def take_turns(rows: Int64Array, shares: Float64Array, num_experts: int, width: int) -> Int64Array:
    """Fill the tables of some layers.

    An expert gets as many entries, up to `width`, as come closest to the shares of its slots: equal shares are one
    entry for each slot. A slot's entries stand as far apart as they can.

    Args:
        rows: (layers, slots) int64 expert of each slot, -1 where it is empty; every expert has a slot.
        shares: (layers, slots) float64 share of its expert's tokens that each slot shall get.
        num_experts: Logical experts of a layer.
        width: Most entries of an expert, at least as many as any has slots.

    Returns:
        (layers, num_experts, width) int64 slots, padded with -1.
    """
    table = np.full((len(rows), num_experts, width), -1, dtype=np.int64)
    num_slots = rows.shape[1]
    for layer in range(len(rows)):
        replicas = np.zeros(num_experts, dtype=np.int64)
        slots_of = np.zeros((num_experts, width), dtype=np.int64)
        for slot in range(num_slots):
            expert = rows[layer, slot]
            if expert >= 0:
                slots_of[expert, replicas[expert]] = slot
                replicas[expert] += 1
        for expert in range(num_experts):
            slots = slots_of[expert, : replicas[expert]]
            if len(slots) == 1:
                table[layer, expert, 0] = slots[0]
            else:
                _order(slots, _entries(shares[layer][slots], width), table[layer, expert])
    return table


@compiled
def _entries(wanted: Float64Array, width: int) -> Int64Array:
    """How many entries each slot gets."""
    best, entries = np.ones(len(wanted), dtype=np.int64), np.zeros(len(wanted), dtype=np.int64)
    least = np.inf
    for total in range(1, width + 1):
        error = _round(wanted, total, entries)
        if error < least - _AS_CLOSE:
            best[:] = entries
            least = error
        if least <= _AS_CLOSE:
            break
    return best


@compiled
def _round(wanted: Float64Array, total: int, entries: Int64Array) -> float:
    """Divide `total` entries by the largest remainders; return by how much the share that is furthest off is off."""
    left = total
    for index in range(len(wanted)):
        entries[index] = int(wanted[index] * total + _AS_CLOSE)
        left -= entries[index]
    for _ in range(left):
        neediest = 0
        for index in range(1, len(wanted)):
            if wanted[index] * total - entries[index] > wanted[neediest] * total - entries[neediest]:
                neediest = index
        entries[neediest] += 1
    error = 0.0
    for index in range(len(wanted)):
        error = max(error, abs(entries[index] / total - wanted[index]))
    return error


@compiled
def _order(slots: Int64Array, entries: Int64Array, row: Int64Array) -> None:
    """Let the slots take turns: each time the one that is furthest behind its share."""
    total = entries.sum()
    ahead = np.zeros(len(slots), dtype=np.int64)
    for position in range(total):
        ahead += entries
        turn = np.argmax(ahead)
        ahead[turn] -= total
        row[position] = slots[turn]
