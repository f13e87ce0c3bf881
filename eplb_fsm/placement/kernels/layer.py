"""One layer while it is repaired: who holds what, what ranks carry, and what one replica more or less would do."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from eplb_fsm.placement.digest import Int64Array
from eplb_fsm.placement.kernels.compiled import borrowing, compiled
from eplb_fsm.placement.moves import BoolArray
from eplb_fsm.placement.validate import EMPTY, Float64Array


class Layer(NamedTuple):
    """One layer while it is repaired; the arrays are changed in place.

    Attributes:
        weight: (experts) float64 load of each expert.
        expert_at: (slots) int64 expert of each slot, -1 where it is empty.
        rank_of: (slots) int64 rank of each slot.
        replicas: (experts) int64 slots of each expert.
        slots_of: (experts, most replicas) int64 those slots; the first `replicas` entries of a row count.
        num_on: (experts, ranks) int16 slots of an expert on a rank.
        marks_of: (experts) int64 with the marks of the ranks that an expert is on, see :func:`mark_of`: two experts
            without a common mark have no common rank.
        standing: (ranks, experts) uint8 what is known of an expert on a rank: where it was at the start, `HELD` there,
            `NEAR` on the rank's node, or `FAR`; plus `ON` if the rank has it, plus `BARRED` if it may not.
        price_of: (16) float64 what it counts to bring an expert to a rank, by its standing there.
        speeds: (ranks) float64 speed of each rank.
        base_of: (ranks) float64 by how much less than a rank of speed 1 it may carry, see :func:`set_limit`.
        load_of: (ranks) float64 load of each rank, `base_of` included.
        share_at: (slots) float64 load of each slot.
        paid_at: (slots) float64 what it counts that the slot's rank has the slot's expert; 0 for none.
        is_spare: (slots) bool whether the slot is empty, or its expert can do without it; see `look_ahead`.
        prospect: (7, experts) float64, what one replica more or less of an expert would do; see `look_ahead`.
        is_stale: (ranks) bool, for `look_again`: whose loads change; all False otherwise.
        held: (slots) int64, for `look_again`: the first few are the experts on such ranks.
    """

    weight: Float64Array
    expert_at: Int64Array
    rank_of: Int64Array
    replicas: Int64Array
    slots_of: Int64Array
    num_on: npt.NDArray[np.int16]
    marks_of: Int64Array
    standing: npt.NDArray[np.uint8]
    price_of: Float64Array
    speeds: Float64Array
    base_of: Float64Array
    load_of: Float64Array
    share_at: Float64Array
    paid_at: Float64Array
    is_spare: BoolArray
    prospect: Float64Array
    is_stale: BoolArray
    held: Int64Array


HELD, NEAR, FAR, ON, BARRED, FROM = 0, 1, 2, 4, 8, 3
"""Of `Layer.standing`, the first three under the mask `FROM`. All that is known of an expert on a rank is one byte, so
that it stays in the cache."""
UNPAYABLE = 1e12
"""What it counts to bring an expert to a rank that has it, or may not have it."""
SHARE, SINKS, SINK_GAIN, SINK_EVENNESS, RISES, RISE_LOSS, RISE_EVENNESS = range(7)
"""Rows of `Layer.prospect`."""


@compiled
def make_layer(
    weight: Float64Array,
    start: Int64Array,
    row: Int64Array,
    speeds: Float64Array,
    may_hold: BoolArray,
    ranks_per_group: int,
    ranks_per_node: int,
    cross_node_price: float,
) -> Layer:
    """Return a layer ready to be repaired.

    Args:
        weight: (experts) float64 load of each expert.
        start: (slots) int64 what the slots hold now.
        row: (slots) int64 what they shall hold before the repair; every expert has a slot.
        speeds: (ranks) float64 above 0, speeds of the ranks that share the slots.
        may_hold: (ranks) bool, which of them may hold experts.
        ranks_per_group: An expert stays on the groups of so many ranks that `row` has it on; all ranks: it may go
            anywhere.
        ranks_per_node: Ranks among which a peer move costs 1.
        cross_node_price: What one from elsewhere costs.
    """
    num_experts, num_slots, num_ranks = len(weight), len(row), len(speeds)
    num_local = num_slots // num_ranks
    layer = Layer(
        weight,
        row.copy(),
        np.arange(num_slots) // num_local,
        np.zeros(num_experts, dtype=np.int64),
        np.zeros((num_experts, num_slots - num_experts + 2), dtype=np.int64),
        np.zeros((num_experts, num_ranks), dtype=np.int16),
        np.zeros(num_experts, dtype=np.int64),
        _standing(start, row, may_hold, ranks_per_group, ranks_per_node, num_experts),
        np.full(16, UNPAYABLE),
        speeds,
        np.zeros(num_ranks),
        np.zeros(num_ranks),
        np.zeros(num_slots),
        np.zeros(num_slots),
        row == EMPTY,
        np.zeros((7, num_experts)),
        np.zeros(num_ranks, dtype=np.bool_),
        np.zeros(num_slots, dtype=np.int64),
    )
    layer.price_of[HELD], layer.price_of[NEAR], layer.price_of[FAR] = 0.0, 1.0, cross_node_price
    for slot in range(num_slots):
        rank, expert = slot // num_local, row[slot]
        if expert != EMPTY:
            layer.slots_of[expert, layer.replicas[expert]] = slot
            layer.replicas[expert] += 1
            layer.num_on[expert, rank] += 1
            layer.marks_of[expert] |= mark_of(rank)
            layer.paid_at[slot] = layer.price_of[layer.standing[rank, expert] & FROM]
            layer.standing[rank, expert] |= np.uint8(ON)
    sum_loads(layer)
    return layer


@compiled
def _standing(
    start: Int64Array, row: Int64Array, may_hold: BoolArray, ranks_per_group: int, ranks_per_node: int, num_experts: int
) -> npt.NDArray[np.uint8]:
    """What is known of each expert on each rank, but for `ON`; arguments as of :func:`make_layer`."""
    num_ranks, num_slots = len(may_hold), len(row)
    num_local = num_slots // num_ranks
    origin = np.full((num_ranks // ranks_per_node, num_experts), FAR, dtype=np.uint8)
    bar = np.full((num_ranks // ranks_per_group, num_experts), BARRED, dtype=np.uint8)
    for slot in range(num_slots):
        rank = slot // num_local
        if start[slot] != EMPTY:
            origin[rank // ranks_per_node, start[slot]] = NEAR
        if row[slot] != EMPTY:
            bar[rank // ranks_per_group, row[slot]] = 0
    standing = np.full((num_ranks, num_experts), BARRED, dtype=np.uint8)
    for rank in range(num_ranks):
        if may_hold[rank]:
            standing[rank] = bar[rank // ranks_per_group]
        standing[rank] |= origin[rank // ranks_per_node]
    for slot in range(num_slots):
        if start[slot] != EMPTY:
            standing[slot // num_local, start[slot]] &= ~np.uint8(NEAR + FAR)
    return standing


@borrowing
def mark_of(rank: int) -> int:
    """One bit for a rank; beyond 62 ranks some share one."""
    return 1 << (rank % 62)


@borrowing
def set_limit(layer: Layer, limit: float) -> None:
    """Let all ranks have the same limit, whatever their speed.

    A rank of speed `s` may carry `s * limit`. That is so if it may carry `limit` like all others, `(1 - s) * limit` of
    which is there for good.
    """
    for rank in range(len(layer.speeds)):
        layer.base_of[rank] = (1.0 - layer.speeds[rank]) * limit
    sum_loads(layer)


@borrowing
def sum_loads(layer: Layer) -> None:
    """Compute the load of every rank anew, in the order of the slots, so that no error grows."""
    for rank in range(len(layer.base_of)):
        layer.load_of[rank] = layer.base_of[rank]
    for slot in range(len(layer.expert_at)):
        expert = layer.expert_at[slot]
        share = layer.weight[expert] / layer.replicas[expert] if expert >= 0 else 0.0
        layer.share_at[slot] = share
        layer.load_of[layer.rank_of[slot]] += share


@borrowing
def heaviest_of(layer: Layer) -> float:
    """Load of the heaviest rank over its speed."""
    heaviest = 0.0
    for rank in range(len(layer.load_of)):
        heaviest = max(heaviest, (layer.load_of[rank] - layer.base_of[rank]) / layer.speeds[rank])
    return heaviest


@borrowing
def look_ahead(layer: Layer, experts: Int64Array, limit: float) -> None:
    """Fill the prospect of some experts, and tell whether their slots are spare.

    With one replica more, each of an expert's slots carries `SINKS` less than its `SHARE`: that takes `SINK_GAIN` of
    the excess away, and `SINK_EVENNESS` of the squared loads. With one less, each carries `RISES` more, which would add
    `RISE_LOSS` to the excess and `RISE_EVENNESS` to the squared loads if all slots stayed.
    """
    replicas, slots_of, load_of = layer.replicas, layer.slots_of, layer.load_of
    for expert in experts:
        weight, count = layer.weight[expert], replicas[expert]
        share = weight / count
        sinks = share - weight / (count + 1)
        rises = weight / (count - 1) - share if count > 1 else 0.0
        is_spare = can_spare(weight, count, limit)
        gain, loss, sink_evenness, rise_evenness = 0.0, 0.0, 0.0, 0.0
        for index in range(count):
            slot = slots_of[expert, index]
            layer.is_spare[slot] = is_spare
            rank = layer.rank_of[slot]
            load, times = load_of[rank], layer.num_on[expert, rank]  # a rank is met once for each slot that it has
            excess = max(load - limit, 0.0)
            gain += min(excess, times * sinks) / times
            loss += (max(load + times * rises - limit, 0.0) - excess) / times
            sink_evenness += sinks * (2.0 * load - times * sinks)
            rise_evenness += rises * (2.0 * load + times * rises)
        layer.prospect[SHARE, expert] = share
        layer.prospect[SINKS, expert] = sinks
        layer.prospect[SINK_GAIN, expert] = gain
        layer.prospect[SINK_EVENNESS, expert] = sink_evenness
        layer.prospect[RISES, expert] = rises
        layer.prospect[RISE_LOSS, expert] = loss
        layer.prospect[RISE_EVENNESS, expert] = rise_evenness


@borrowing
def can_spare(weight: float, replicas: int, limit: float) -> bool:
    """Whether an expert can do without one of its replicas: each other one is still bearable for a rank."""
    return replicas > 1 and weight <= limit * (replicas - 1)


@borrowing
def look_again(layer: Layer, one: int, other: int, limit: float) -> None:
    """After a change of where two experts are, bring up to date what depends on it: shares, loads and prospects.

    What comes out is the same to the last bit as from :func:`sum_loads` and :func:`look_ahead`.

    Args:
        layer: The layer.
        one: An expert.
        other: The other one; -1: there is none.
        limit: As before.
    """
    num_local, count = len(layer.expert_at) // len(layer.load_of), 0
    is_stale, held = layer.is_stale, layer.held
    for expert in (one, other):
        for index in range(layer.replicas[expert] if expert >= 0 else 0):
            slot = layer.slots_of[expert, index]
            layer.share_at[slot] = layer.weight[expert] / layer.replicas[expert]
            is_stale[layer.rank_of[slot]] = True
    for rank in range(len(is_stale)):
        if is_stale[rank]:
            is_stale[rank] = False
            layer.load_of[rank] = layer.base_of[rank]
            for slot in range(rank * num_local, (rank + 1) * num_local):
                layer.load_of[rank] += layer.share_at[slot]
                if layer.expert_at[slot] >= 0:
                    held[count] = layer.expert_at[slot]
                    count += 1
    look_ahead(layer, held[:count], limit)


@borrowing
def may_get(layer: Layer, expert: int, rank: int) -> bool:
    """Whether a rank may get an expert, which it does not hold yet."""
    return bool(layer.standing[rank, expert] < ON)


@borrowing
def put(layer: Layer, slot: int, expert: int) -> None:
    """Put an expert into a slot."""
    rank, old = layer.rank_of[slot], layer.expert_at[slot]
    if old >= 0:
        last = layer.replicas[old] - 1
        for index in range(last):
            if layer.slots_of[old, index] == slot:
                layer.slots_of[old, index] = layer.slots_of[old, last]
        layer.replicas[old] = last
        layer.num_on[old, rank] -= 1
        if layer.num_on[old, rank] == 0:
            layer.standing[rank, old] &= ~np.uint8(ON)
        layer.marks_of[old] = 0
        for index in range(last):
            layer.marks_of[old] |= mark_of(layer.rank_of[layer.slots_of[old, index]])
    layer.expert_at[slot] = expert
    layer.slots_of[expert, layer.replicas[expert]] = slot
    layer.replicas[expert] += 1
    layer.num_on[expert, rank] += 1
    layer.paid_at[slot] = layer.price_of[layer.standing[rank, expert] & FROM]
    layer.standing[rank, expert] |= np.uint8(ON)
    layer.marks_of[expert] |= mark_of(rank)
