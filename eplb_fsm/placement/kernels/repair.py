"""Repair of a placement with few moves, as a kernel: take load off the heaviest rank until a limit holds.

One layer at a time. While some rank carries more than the limit, the heaviest one is relieved by the change that
takes away most excess (load above the limit, summed over the ranks) for each peer move:

* an overwrite puts an expert into a slot whose own expert has another replica, or into an empty slot;
* a swap exchanges the experts of two slots on different ranks.

A peer move is an expert on a rank that did not hold it at the start, so taking an earlier change back costs less than
nothing. One from another node may cost more than one. No change puts a second replica of an expert on a rank, or an
expert on a node that did not hold it where nodes are to be kept apart. Of equally good changes the one that leaves the
ranks most even wins, then the first one found.

The search is greedy, and may end where some rank is a little too heavy and no single change helps. Then it is made
again with a limit that is a little stricter.
"""

from __future__ import annotations

import numpy as np

from eplb_fsm.placement.digest import Int64Array
from eplb_fsm.placement.kernels.changes import (
    ROUNDING,
    Change,
    best_change,
    make_sieve,
    with_rounding,
)
from eplb_fsm.placement.kernels.compiled import borrowing, compiled
from eplb_fsm.placement.kernels.layer import (
    RISE_LOSS,
    Layer,
    can_spare,
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

_TRIES = 4
"""Searches of one layer. With eight, few more arrive."""
_STRICTER = 1e-3
"""Each is stricter than the one before by this share of the limit."""
_NEAR = 1.02
"""What ends further above the limit than by this factor is not tried again: of such layers hardly any arrives."""


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
        limit, begun, heaviest = mean / target, rows[index].copy(), np.inf
        for aim in limit * (1.0 - _STRICTER * np.arange(_TRIES)):
            is_missed = with_rounding(limit) < heaviest <= _NEAR * limit and aim >= mean
            if heaviest < np.inf and not is_missed:
                break
            layer = make_layer(
                load[index], start[index], begun, speeds, may_hold, ranks_per_group, ranks_per_node, cross_node_price
            )
            if is_new:
                spread(layer)
            reached = relieve(layer, limit, aim, max_changes, is_weighted)
            if reached < heaviest:
                heaviest = reached
                rows[index] = layer.expert_at
        is_good[index] = heaviest <= with_rounding(limit)
        balance[index] = mean / heaviest
    return is_good, balance


@borrowing
def mean_load(weight: Float64Array, speeds: Float64Array) -> float:
    """What a rank of speed 1 carries of the experts' load if all are divided perfectly."""
    mean, capacity = 0.0, 0.0
    for rank in range(len(speeds)):  # not sum(), which adds in another order without a compiler
        capacity += speeds[rank]
    for expert in range(len(weight)):
        mean += weight[expert] / capacity
    return mean


@compiled
def relieve(layer: Layer, limit: float, aim: float, max_changes: int, is_weighted: bool) -> float:
    """Change a layer until no rank carries more than the limit, no change helps, or `max_changes` are made.

    What a rank carries above `aim`, at most the limit, is its excess.

    A change lessens the excess of all ranks together, and may make one of them heavier than any was. So the lightest
    heaviest rank that was met counts: `layer.expert_at` holds that row afterwards, and the other arrays do not follow.

    Returns:
        Load of the heaviest rank of that row, over its speed.
    """
    set_limit(layer, aim)
    lightest, row = _heaviest(layer, limit, is_weighted), layer.expert_at.copy()
    begun = row.copy()
    if lightest <= with_rounding(limit):
        return lightest
    everything = np.arange(len(layer.weight))
    _replicate_the_hottest(layer, everything, aim)
    look_ahead(layer, everything, aim)
    sieve = make_sieve(layer)
    for _ in range(max_changes):
        heaviest = _heaviest(layer, limit, is_weighted)
        if heaviest < lightest:
            lightest = heaviest
            row[:] = layer.expert_at
        if heaviest <= with_rounding(limit):
            break
        best = best_change(layer, sieve, aim)
        if best.slot < 0:
            break
        look_again(layer, best.expert, _apply(layer, best), aim)
    layer.expert_at[:] = row
    if is_weighted and lightest > with_rounding(limit):
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
    if is_weighted and heaviest > with_rounding(limit) and not _has_no_choice(layer, limit):
        return highest_of(fill_pools(layer.weight, layer.expert_at, layer.speeds, limit))
    return heaviest


@borrowing
def _has_no_choice(layer: Layer, limit: float) -> bool:
    """Whether experts with one replica alone are too much for some rank, so that no shares help."""
    num_local = len(layer.expert_at) // len(layer.load_of)
    for rank in range(len(layer.load_of)):
        fixed = layer.base_of[rank]
        for slot in range(rank * num_local, (rank + 1) * num_local):
            expert = layer.expert_at[slot]
            if expert >= 0 and layer.replicas[expert] == 1:
                fixed += layer.share_at[slot]
        if fixed > with_rounding(limit):
            return True
    return False


@borrowing
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
                if old >= 0 and not can_spare(layer.weight[old], layer.replicas[old], limit):
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


@borrowing
def _apply(layer: Layer, change: Change) -> int:
    """Make a change; loads and prospects do not follow yet. Returns the expert that was in its slot, -1 for none."""
    old = int(layer.expert_at[change.slot])
    put(layer, change.slot, change.expert)
    if change.other >= 0:
        put(layer, change.other, old)
    return old


@borrowing
def spread(layer: Layer) -> None:
    """Swap second replicas of an expert away from their rank, as long as no rank gets heavier than the heaviest.

    Before :func:`set_limit`.
    """
    for slot in range(len(layer.expert_at)):
        rank, expert = layer.rank_of[slot], layer.expert_at[slot]
        if expert < 0 or layer.num_on[expert, rank] < 2:
            continue
        best, lightest = -1, heaviest_of(layer) * (1.0 + ROUNDING)
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
