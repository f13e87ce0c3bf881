"""Refinement of a placement without regard to moves, as a kernel: a lighter heaviest rank by a seeded local search.

One layer at a time. For a limit between the best heaviest rank so far and a lower bound, slots are swapped and
overwritten at random, always on a rank that carries more than the limit; a change that adds excess (load above the
limit, summed over the ranks) is taken while it adds less than a random share of a threshold that falls to nothing
(threshold accepting: Dueck and Scheuer, Journal of Computational Physics 90, 1990). Then the next limit, by bisection.

Chance is the minimal standard generator (Park and Miller, Communications of the ACM 31, 1988, with the multiplier
48271), whose integers are exact everywhere; there is no exponential, so the result is the same on every machine.
"""

from __future__ import annotations

from eplb_fsm.placement.digest import Int64Array
from eplb_fsm.placement.kernels.compiled import compiled
from eplb_fsm.placement.kernels.layer import Layer, heaviest_of, make_layer, may_get, put, set_limit, sum_loads
from eplb_fsm.placement.kernels.repair import mean_load, spread
from eplb_fsm.placement.moves import BoolArray
from eplb_fsm.placement.validate import Float64Array

_MULTIPLIER, _MODULUS = 48271, (1 << 31) - 1
_PRECISION = 5e-4
"""The search for a lighter heaviest rank ends when what may be left to win is less than this share of the mean."""
_FIRST_THRESHOLD = 0.5
"""Threshold at the start of the search for one limit, as a share of the mean load of a slot."""
_LEAST_TRIES, _TRIES_PER_SLOT = 20_000, 200
"""Changes tried for each limit: with 20,000, small layers come within 1 % of the optimum."""


@compiled
def refine_layers(
    load: Float64Array, rows: Int64Array, speeds: Float64Array, may_hold: BoolArray, ranks_per_node: int
) -> None:
    """Refine all layers in place; none gets less balanced. Those without load are left alone.

    Args:
        load: (layers, experts) float64, C-contiguous.
        rows: (layers, slots) int64 where the search begins, and holds the result afterwards; slots that are empty,
            -1, stay so.
        speeds: (ranks) float64 above 0, speeds of the ranks that share the slots.
        may_hold: (ranks) bool, which of them may hold experts; `rows` has none on others.
        ranks_per_node: As `ranks_per_group` of :func:`make_layer`.
    """
    for index in range(len(load)):
        mean = mean_load(load[index], speeds)
        if mean > 0.0:
            layer = make_layer(
                load[index], rows[index], rows[index], speeds, may_hold, ranks_per_node, len(speeds), 1.0
            )
            spread(layer)
            _refine(layer, mean, max(_LEAST_TRIES, _TRIES_PER_SLOT * rows.shape[1]), rows[index])


@compiled
def _refine(layer: Layer, mean: float, num_tries: int, best: Int64Array) -> None:
    """Search by bisection of the limit; `best` holds the best row that was met."""
    best[:] = layer.expert_at
    lightest = heaviest_of(layer)
    bound = _lower_bound(layer, mean)
    state = 1
    while lightest - bound > _PRECISION * mean:
        limit = 0.5 * (lightest + bound)
        state, heaviest = _search(layer, limit, mean, num_tries, state)
        if heaviest < lightest:
            lightest = heaviest
            best[:] = layer.expert_at
        if heaviest > limit:
            bound = limit  # not proven: nothing was found


@compiled
def _lower_bound(layer: Layer, mean: float) -> float:
    """What some rank takes at least: the mean, or a replica of an expert that has as many as there can be."""
    num_experts, num_slots = len(layer.weight), len(layer.expert_at)
    most_replicas = min(len(layer.load_of), num_slots - num_experts + 1)
    return max(mean, float(layer.weight.max()) / most_replicas / float(layer.speeds.max()))


@compiled
def _search(layer: Layer, limit: float, mean: float, num_tries: int, state: int) -> tuple[int, float]:
    """Change the layer until no rank carries more than the limit, or the tries are used up.

    Returns:
        The state of the generator, and the load of the heaviest rank over its speed.
    """
    set_limit(layer, limit)
    num_slots, num_ranks = len(layer.expert_at), len(layer.load_of)
    num_local = num_slots // num_ranks
    excess = _excess(layer, limit)
    for index in range(num_tries):
        if excess <= 0.0:
            sum_loads(layer)  # what was added up change by change is not exact
            excess = _excess(layer, limit)
            if excess <= 0.0:
                break
        threshold = _FIRST_THRESHOLD * mean / num_local * (1.0 - index / num_tries)
        state, rank = _draw(state, num_ranks)
        for _ in range(num_ranks):
            if layer.load_of[rank] > limit:
                break
            rank = rank + 1 if rank + 1 < num_ranks else 0
        state, local = _draw(state, num_local)
        state, other = _draw(state, num_slots)
        state, kind = _draw(state, 3)
        state, share = _draw(state, 1 << 20)
        slot = rank * num_local + local
        excess = _try_change(layer, kind, slot, other, limit, excess, threshold * share / (1 << 20))
    sum_loads(layer)
    return state, heaviest_of(layer)


@compiled
def _draw(state: int, below: int) -> tuple[int, int]:
    """Return the next state and a number from 0 to below `below`."""
    state = state * _MULTIPLIER % _MODULUS
    return state, state * below // _MODULUS


@compiled
def _try_change(layer: Layer, kind: int, slot: int, other: int, limit: float, excess: float, allowed: float) -> float:
    """Swap two slots, or overwrite one of them with the other's expert; take it back if it adds more than `allowed`.

    Returns:
        The excess of all ranks afterwards.
    """
    expert_at, rank_of = layer.expert_at, layer.rank_of
    first, second = expert_at[slot], expert_at[other]
    rank, other_rank = rank_of[slot], rank_of[other]
    if first == second or rank == other_rank or min(first, second) < 0:
        return excess
    writes_slot, writes_other = kind != 1, kind != 2
    if (writes_slot and not may_get(layer, second, rank)) or (writes_other and not may_get(layer, first, other_rank)):
        return excess
    if (kind == 1 and layer.replicas[second] == 1) or (kind == 2 and layer.replicas[first] == 1):
        return excess
    if writes_slot:
        _put(layer, slot, second)
    if writes_other:
        _put(layer, other, first)
    changed = _excess(layer, limit)
    if changed - excess <= allowed:
        return changed
    if writes_other:
        _put(layer, other, second)
    if writes_slot:
        _put(layer, slot, first)
    return excess


@compiled
def _put(layer: Layer, slot: int, expert: int) -> None:
    """Put an expert into a slot and add up what the ranks carry."""
    old = layer.expert_at[slot]
    _add_shares(layer, old, -1.0)
    _add_shares(layer, expert, -1.0)
    put(layer, slot, expert)
    _add_shares(layer, old, 1.0)
    _add_shares(layer, expert, 1.0)


@compiled
def _add_shares(layer: Layer, expert: int, sign: float) -> None:
    count = layer.replicas[expert]
    if count > 0:
        share = sign * (layer.weight[expert] / count)
        for index in range(count):
            layer.load_of[layer.rank_of[layer.slots_of[expert, index]]] += share


@compiled
def _excess(layer: Layer, limit: float) -> float:
    total = 0.0
    for rank in range(len(layer.load_of)):
        total += max(layer.load_of[rank] - limit, 0.0)
    return total
