"""Repair of a placement with few moves, as a kernel: take load off the heaviest rank until a limit holds.

One layer at a time. While some rank carries more than the limit, the heaviest one is relieved by the change that
takes away most excess (load above the limit, summed over the ranks) for each peer move:

* an overwrite puts an expert into a slot whose own expert has another replica, or into an empty slot;
* a swap exchanges the experts of two slots on different ranks.

A peer move is an expert on a rank that did not hold it at the start, so taking an earlier change back costs less than
nothing. One from another node may cost more than one. No change puts a second replica of an expert on a rank, or an
expert on a node that did not hold it where nodes are to be kept apart. Of equally good changes the one that leaves the
ranks most even wins, then the first one found.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from eplb_fsm.placement.digest import Int64Array
from eplb_fsm.placement.kernels.compiled import compiled
from eplb_fsm.placement.kernels.layer import (
    FROM,
    ON,
    RISE_EVENNESS,
    RISE_LOSS,
    RISES,
    SHARE,
    SINK_EVENNESS,
    SINK_GAIN,
    SINKS,
    Layer,
    heaviest_of,
    look_again,
    look_ahead,
    make_layer,
    may_get,
    put,
    set_limit,
    sum_loads,
)
from eplb_fsm.placement.kernels.split import fill_pools, highest_of
from eplb_fsm.placement.moves import BoolArray
from eplb_fsm.placement.validate import Float64Array

_ROUNDING = 1e-9
"""Scores, and loads beside the limit, that differ by less than this share count as equal."""
_FREE = 1e-3
"""Cost of a change without a peer move, in peer moves."""
_UNPAYABLE = 1e9
"""Cost of a swap with a rank that has nothing to give, in peer moves."""


class Change(NamedTuple):
    """A change and what it is worth.

    Attributes:
        slot: Slot to overwrite, or the heaviest rank's slot of a swap; -1: there is no change.
        other: The other slot of a swap; -1: an overwrite.
        expert: What `slot` holds afterwards.
        score: Excess taken away for each peer move.
        evenness: By how much the sum of squared rank loads sinks.
    """

    slot: int
    other: int
    expert: int
    score: float
    evenness: float


@compiled
def repair_layers(
    load: Float64Array,
    start: Int64Array,
    rows: Int64Array,
    speeds: Float64Array,
    may_hold: BoolArray,
    ranks_per_group: int,
    ranks_per_node: int,
    cross_node_price: float,
    target: float,
    max_changes: int,
    is_new: bool,
    is_weighted: bool,
) -> tuple[BoolArray, Float64Array]:
    """Repair all layers in place until their balancedness is at least `target`; those without load are left alone.

    Args:
        load: (layers, experts) float64, C-contiguous.
        start: (layers, slots) int64 what the slots hold now.
        rows: (layers, slots) int64 where the repair begins; holds the result afterwards.
        speeds: (ranks) float64 above 0, speeds of the ranks that share the slots.
        may_hold: (ranks) bool, which of them may hold experts; `rows` has none on others.
        ranks_per_group: As in :func:`make_layer`.
        ranks_per_node: As there.
        cross_node_price: As there.
        target: Balancedness at which a layer is left as it is.
        max_changes: Most changes of one layer.
        is_new: `rows` is a new plan, so second replicas on a rank are spread first.
        is_weighted: Tokens are divided among replicas as in :mod:`~eplb_fsm.placement.kernels.split`.

    Returns:
        (layers) bool, whether each reaches the target, and (layers) float64 balancedness; True and 1.0 without load.
    """
    is_good, balance = np.ones(len(load), dtype=np.bool_), np.ones(len(load))
    for index in range(len(load)):
        mean = mean_load(load[index], speeds)
        if mean <= 0.0:
            continue
        layer = make_layer(
            load[index], start[index], rows[index], speeds, may_hold, ranks_per_group, ranks_per_node, cross_node_price
        )
        if is_new:
            spread(layer)
        heaviest = relieve(layer, mean / target, max_changes, is_weighted)
        rows[index] = layer.expert_at
        is_good[index] = heaviest <= _with_rounding(mean / target)
        balance[index] = mean / heaviest
    return is_good, balance


@compiled
def mean_load(weight: Float64Array, speeds: Float64Array) -> float:
    """What a rank of speed 1 carries of the experts' load if all are divided perfectly."""
    mean, capacity = 0.0, 0.0
    for rank in range(len(speeds)):  # not sum(), which adds in another order without a compiler
        capacity += speeds[rank]
    for expert in range(len(weight)):
        mean += weight[expert] / capacity
    return mean


@compiled
def relieve(layer: Layer, limit: float, max_changes: int, is_weighted: bool) -> float:
    """Change a layer until no rank carries more than the limit, no change helps, or `max_changes` are made.

    A change lessens the excess of all ranks together, and may make one of them heavier than any was. So the lightest
    heaviest rank that was met counts: `layer.expert_at` holds that row afterwards, and the other arrays do not follow.

    Returns:
        Load of the heaviest rank of that row, over its speed.
    """
    set_limit(layer, limit)
    lightest, row = _heaviest(layer, limit, is_weighted), layer.expert_at.copy()
    begun = row.copy()
    if lightest <= _with_rounding(limit):
        return lightest
    everything = np.arange(len(layer.weight))
    _replicate_the_hottest(layer, everything, limit)
    look_ahead(layer, everything, limit)
    for _ in range(max_changes):
        heaviest = _heaviest(layer, limit, is_weighted)
        if heaviest < lightest:
            lightest = heaviest
            row[:] = layer.expert_at
        if heaviest <= _with_rounding(limit):
            break
        best = _best_change(layer, limit)
        if best.slot < 0:
            break
        look_again(layer, best.expert, _apply(layer, best), limit)
    layer.expert_at[:] = row
    if is_weighted and lightest > _with_rounding(limit):
        return _take_the_lighter(layer, begun, row)
    return lightest


@compiled
def _take_the_lighter(layer: Layer, begun: Int64Array, row: Int64Array) -> float:
    """Of two rows that miss the limit take the one whose heaviest rank is lighter with weighted shares; return that."""
    before = highest_of(fill_pools(layer.weight, begun, layer.speeds, 0.0))
    after = highest_of(fill_pools(layer.weight, row, layer.speeds, 0.0))
    layer.expert_at[:] = begun if before <= after else row
    return min(before, after)


@compiled
def _heaviest(layer: Layer, limit: float, is_weighted: bool) -> float:
    """Load of the heaviest rank over its speed; with weighted shares where it is above the limit and those may help."""
    heaviest = heaviest_of(layer)
    if is_weighted and heaviest > _with_rounding(limit) and not _has_no_choice(layer, limit):
        return highest_of(fill_pools(layer.weight, layer.expert_at, layer.speeds, limit))
    return heaviest


@compiled
def _has_no_choice(layer: Layer, limit: float) -> bool:
    """Whether experts with one replica alone are too much for some rank, so that no shares help."""
    num_local = len(layer.expert_at) // len(layer.load_of)
    for rank in range(len(layer.load_of)):
        fixed = layer.base_of[rank]
        for slot in range(rank * num_local, (rank + 1) * num_local):
            expert = layer.expert_at[slot]
            if expert >= 0 and layer.replicas[expert] == 1:
                fixed += layer.share_at[slot]
        if fixed > _with_rounding(limit):
            return True
    return False


@compiled
def _with_rounding(limit: float) -> float:
    return limit * (1.0 + _ROUNDING)


@compiled
def _replicate_the_hottest(layer: Layer, everything: Int64Array, limit: float) -> None:
    """Give experts of which one replica alone is more than the limit the replicas that they need, whatever it costs.

    One change at a time would never do it: where such a replica arrives, a rank is too heavy at first.
    """
    for expert in range(len(layer.weight)):
        while layer.weight[expert] > limit * layer.replicas[expert]:
            look_ahead(layer, everything, limit)
            best, lightest = -1, np.inf
            for slot in range(len(layer.expert_at)):
                old, rank = layer.expert_at[slot], layer.rank_of[slot]
                if old >= 0 and not _can_spare(layer.weight[old], layer.replicas[old], limit):
                    continue
                if not may_get(layer, expert, rank):
                    continue
                stays = layer.load_of[rank] - layer.share_at[slot]
                if old >= 0:
                    stays += layer.prospect[RISE_LOSS, old]
                if stays < lightest:
                    best, lightest = slot, stays
            if best < 0:
                break
            put(layer, best, expert)
            sum_loads(layer)


@compiled
def _best_change(layer: Layer, limit: float) -> Change:
    """Return the best change for the heaviest rank; where none helps it, for the heaviest one that can be helped."""
    best = Change(-1, -1, -1, 0.0, 0.0)
    below = np.inf
    while best.slot < 0:
        heaviest, most = -1, _with_rounding(limit)
        for rank in range(len(layer.load_of)):
            if most < layer.load_of[rank] < below:
                heaviest, most = rank, layer.load_of[rank]
        if heaviest < 0:
            break
        best = _best_swap(layer, heaviest, limit, best)
        best = _best_overwrite(layer, heaviest, limit, best)
        below = most
    return best


@compiled
def _best_overwrite(layer: Layer, heaviest: int, limit: float, best: Change) -> Change:
    """Look at all overwrites that change the load of the heaviest rank: of a slot, or by an expert that it has."""
    expert_at, replicas, load_of, prospect = layer.expert_at, layer.replicas, layer.load_of, layer.prospect
    num_on, standing, price_of = layer.num_on, layer.standing, layer.price_of
    slots_of, rank_of = layer.slots_of, layer.rank_of
    num_local = len(expert_at) // len(load_of)
    everything = np.arange(len(replicas))
    own = expert_at[heaviest * num_local : (heaviest + 1) * num_local]
    own = own[own >= 0]
    own_prospect = prospect[:, own]  # side by side in memory, since it is read for every slot
    for slot in range(len(expert_at)):
        old, rank = expert_at[slot], rank_of[slot]
        if old >= 0 and not _can_spare(layer.weight[old], replicas[old], limit):
            continue
        load = load_of[rank]
        excess = max(load - limit, 0.0)
        leaves, rises, loss, evenness_lost, old_cost, marks = 0.0, 0.0, 0.0, 0.0, 0.0, 0
        if old >= 0:  # what the other replicas of the old expert take over
            rises, up = prospect[RISES, old], num_on[old, rank] * prospect[RISES, old]
            leaves = prospect[SHARE, old] - up + rises
            loss = max(prospect[RISE_LOSS, old] - max(load + up - limit, 0.0) + excess, 0.0)
            evenness_lost = prospect[RISE_EVENNESS, old] - up * (2.0 * load + up)
            old_cost = price_of[standing[old, rank] & FROM]
            marks = layer.marks_of[old]
        candidates = everything if rank == heaviest else own
        ahead = prospect if rank == heaviest else own_prospect
        for candidate in range(len(candidates)):
            expert, sinks = candidates[candidate], ahead[SINKS, candidate]
            after = load + ahead[SHARE, candidate] - sinks - leaves
            most = ahead[SINK_GAIN, candidate] + excess - max(after - limit, 0.0)
            known = standing[expert, rank]
            if most <= limit * _ROUNDING or known >= ON:
                continue
            cost = max(price_of[known & FROM] - old_cost, _FREE)
            may_share = marks & layer.marks_of[expert] != 0  # a rank, where one's rise and the other's sinking meet
            gain = most - loss
            if (most if may_share else gain) < best.score * cost * (1.0 - _ROUNDING):
                continue
            evenness = ahead[SINK_EVENNESS, candidate] + (load - after) * (load + after) - evenness_lost
            for index in range(replicas[expert] if may_share else 0):
                other = rank_of[slots_of[expert, index]]
                if num_on[old, other]:  # it carries less of one and more of the other
                    up, down = num_on[old, other] * rises, num_on[expert, other] * sinks
                    over = load_of[other] - limit
                    evenness += 2.0 * up * sinks
                    gain += (max(over + up, 0.0) + max(over - down, 0.0)) / num_on[expert, other]
                    gain -= (max(over + up - down, 0.0) + max(over, 0.0)) / num_on[expert, other]
            if gain > limit * _ROUNDING and _is_better(gain / cost, evenness, best.score, best.evenness):
                best = Change(slot, -1, expert, gain / cost, evenness)
    return best


@compiled
def _best_swap(layer: Layer, heaviest: int, limit: float, best: Change) -> Change:
    """Look at all swaps of a slot of the heaviest rank that could be better than the best change so far."""
    expert_at, load_of, share_at = layer.expert_at, layer.load_of, layer.share_at
    standing, price_of = layer.standing, layer.price_of
    num_local = len(expert_at) // len(load_of)
    excess = load_of[heaviest] - limit
    least_cost = _least_costs(layer, heaviest)
    for own in range(heaviest * num_local, (heaviest + 1) * num_local):
        expert = expert_at[own]
        if expert < 0:
            continue
        for rank in range(len(load_of)):
            room = limit - load_of[rank]
            known = standing[expert, rank]
            new_cost = price_of[known & FROM] - price_of[standing[expert, heaviest] & FROM]
            needed = best.score * max(new_cost + least_cost[rank], _FREE) * (1.0 - _ROUNDING)
            needed = max(needed, limit * _ROUNDING)
            if min(excess, room, share_at[own]) < needed or known >= ON:
                continue
            for slot in range(rank * num_local, (rank + 1) * num_local):
                sinks, other = share_at[own] - share_at[slot], expert_at[slot]
                gain = min(sinks, excess) - max(sinks - room, 0.0)
                if gain < needed or other < 0:
                    continue
                other_known = standing[other, heaviest]
                if other_known >= ON:
                    continue
                cost = new_cost + price_of[other_known & FROM] - price_of[standing[other, rank] & FROM]
                score = gain / max(cost, _FREE)
                evenness = 2.0 * sinks * (load_of[heaviest] - load_of[rank] - sinks)
                if _is_better(score, evenness, best.score, best.evenness):
                    best = Change(own, slot, other, score, evenness)
    return best


@compiled
def _least_costs(layer: Layer, heaviest: int) -> Float64Array:
    """For each rank what taking one of its experts costs at least, less what it cost to have it there."""
    least = np.full(len(layer.load_of), _UNPAYABLE)
    for slot in range(len(layer.expert_at)):
        expert, rank = layer.expert_at[slot], layer.rank_of[slot]
        if expert >= 0 and layer.standing[expert, heaviest] < ON:
            here, there = layer.standing[expert, heaviest] & FROM, layer.standing[expert, rank] & FROM
            least[rank] = min(least[rank], layer.price_of[here] - layer.price_of[there])
    return least


@compiled
def _can_spare(weight: float, replicas: int, limit: float) -> bool:
    """Whether an expert can do without one of its replicas: each other one is still bearable for a rank."""
    return replicas > 1 and weight <= limit * (replicas - 1)


@compiled
def _is_better(score: float, evenness: float, best_score: float, best_evenness: float) -> bool:
    if score > best_score * (1.0 + _ROUNDING):
        return True
    return score > best_score * (1.0 - _ROUNDING) and evenness > best_evenness


@compiled
def _apply(layer: Layer, change: Change) -> int:
    """Make a change; loads and prospects do not follow yet. Returns the expert that was in its slot, -1 for none."""
    old = int(layer.expert_at[change.slot])
    put(layer, change.slot, change.expert)
    if change.other >= 0:
        put(layer, change.other, old)
    return old


@compiled
def spread(layer: Layer) -> None:
    """Swap second replicas of an expert away from their rank, as long as no rank gets heavier than the heaviest.

    Before :func:`set_limit`.
    """
    for slot in range(len(layer.expert_at)):
        rank, expert = layer.rank_of[slot], layer.expert_at[slot]
        if expert < 0 or layer.num_on[expert, rank] < 2:
            continue
        best, lightest = -1, heaviest_of(layer) * (1.0 + _ROUNDING)
        for other_slot in range(len(layer.expert_at)):
            other_rank, other = layer.rank_of[other_slot], layer.expert_at[other_slot]
            if other < 0 or not may_get(layer, expert, other_rank) or not may_get(layer, other, rank):
                continue
            sinks = layer.weight[expert] / layer.replicas[expert] - layer.weight[other] / layer.replicas[other]
            heavier = max(
                (layer.load_of[rank] - sinks) / layer.speeds[rank],
                (layer.load_of[other_rank] + sinks) / layer.speeds[other_rank],
            )
            if heavier < lightest:
                best, lightest = other_slot, heavier
        if best >= 0:
            _apply(layer, Change(slot, best, layer.expert_at[best], 0.0, 0.0))
            sum_loads(layer)
