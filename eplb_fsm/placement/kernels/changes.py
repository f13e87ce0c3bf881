"""The best change of a layer for its heaviest rank, as a kernel: sift all of them, and weigh the few that pass.

A change is an overwrite or a swap, see :mod:`~eplb_fsm.placement.kernels.repair`. At real sizes some thousands are
possible at any time, and nearly all of them are far worse than the best one. So loops without a branch, of which a
compiler makes vector instructions, tell which ones could be as good as the best one so far; only those are weighed
one by one. What passes for nothing costs time, never the result.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from eplb_fsm.placement.digest import Int64Array
from eplb_fsm.placement.kernels.compiled import borrowing, compiled
from eplb_fsm.placement.kernels.layer import (
    RISE_EVENNESS,
    RISE_LOSS,
    RISES,
    SHARE,
    SINK_EVENNESS,
    SINK_GAIN,
    SINKS,
    UNPAYABLE,
    Layer,
)
from eplb_fsm.placement.moves import BoolArray
from eplb_fsm.placement.validate import Float64Array

ROUNDING = 1e-9
"""Scores, and loads beside the limit, that differ by less than this share count as equal."""
_FREE = 1e-3
"""Cost of a change without a peer move, in peer moves."""
_TOO_DEAR = 0.5 * UNPAYABLE
"""From this price on, a move of a swap cannot be."""


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


class Sieve(NamedTuple):
    """What is worked out anew for each change, in arrays that are made once.

    Attributes:
        passes: (ranks, slots or experts, whatever are most, and up to 7) bool, what is worth to be weighed.
        words: (an eighth of that) uint64 the same memory.
        hits: (as `passes`) int64 the first few: where `passes` is True.
        price_here: (experts) float64 what it costs to bring each expert to the heaviest rank.
        price_there: (slots of a rank, ranks) float64 what it costs to bring each expert of the heaviest rank to others.
        price_back: (slots) float64 what it costs to bring a slot's expert to the heaviest rank, less what is paid.
        least_back: (ranks) float64 the least of that on each rank.
        spare: (as `passes`) int64 the first few: slots that may be overwritten.
        rank: (slots) int64, as all that follow of the slots in `spare`: rank of the slot.
        load: (slots) float64, as all that follow: load of the rank.
        excess: Of that what is above the limit.
        leaves: What leaves the rank with the slot's expert.
        lost: Excess that the expert's other replicas add to their ranks.
        uneven: What the expert's other replicas add to the squared loads of their ranks.
        paid: What is paid for the expert, so a change that takes it away gets it back.
        price: What it costs to bring the expert that takes its turn to the rank.
        marks: int64 marks of the expert.
    """

    passes: BoolArray
    words: npt.NDArray[np.uint64]
    hits: Int64Array
    price_here: Float64Array
    price_there: Float64Array
    price_back: Float64Array
    least_back: Float64Array
    spare: Int64Array
    rank: Int64Array
    load: Float64Array
    excess: Float64Array
    leaves: Float64Array
    lost: Float64Array
    uneven: Float64Array
    paid: Float64Array
    price: Float64Array
    marks: Int64Array


@compiled
def make_sieve(layer: Layer) -> Sieve:
    """Return a sieve for a layer."""
    num_slots, num_experts, num_ranks = len(layer.expert_at), len(layer.weight), len(layer.load_of)
    passes = np.zeros((max(num_slots, num_experts) + 7) // 8 * 8, dtype=np.bool_)
    return Sieve(
        passes,
        passes.view(np.uint64),
        np.zeros(len(passes), dtype=np.int64),
        np.zeros(num_experts),
        np.zeros((num_slots // num_ranks, num_ranks)),
        np.zeros(num_slots),
        np.zeros(num_ranks),
        np.zeros(len(passes), dtype=np.int64),
        np.zeros(num_slots, dtype=np.int64),
        np.zeros(num_slots),
        np.zeros(num_slots),
        np.zeros(num_slots),
        np.zeros(num_slots),
        np.zeros(num_slots),
        np.zeros(num_slots),
        np.zeros(num_slots),
        np.zeros(num_slots, dtype=np.int64),
    )


@borrowing
def best_change(layer: Layer, sieve: Sieve, limit: float) -> Change:
    """Return the best change for the heaviest rank; where none helps it, for the heaviest one that can be helped."""
    best = Change(-1, -1, -1, 0.0, 0.0)
    below = np.inf
    while best.slot < 0:
        heaviest, most = -1, with_rounding(limit)
        for rank in range(len(layer.load_of)):
            if most < layer.load_of[rank] < below:
                heaviest, most = rank, layer.load_of[rank]
        if heaviest < 0:
            break
        _look_up_prices(layer, sieve, heaviest)
        best = _best_overwrite(layer, sieve, heaviest, limit, best)
        best = _best_swap(layer, sieve, heaviest, limit, best)
        below = most
    return best


@borrowing
def _look_up_prices(layer: Layer, sieve: Sieve, heaviest: int) -> None:
    """Fill the prices of moves to and from the heaviest rank."""
    standing, price_of, expert_at = layer.standing, layer.price_of, layer.expert_at
    price_here, price_there = sieve.price_here, sieve.price_there
    for expert in range(len(price_here)):
        price_here[expert] = price_of[standing[heaviest, expert]]
    for own in range(len(price_there)):
        expert = expert_at[heaviest * len(price_there) + own]
        for rank in range(len(standing)):
            price_there[own, rank] = price_of[standing[rank, expert]] if expert >= 0 else UNPAYABLE


@borrowing
def with_rounding(limit: float) -> float:
    """The load that counts as no more than a limit."""
    return limit * (1.0 + ROUNDING)


@borrowing
def _is_better(score: float, evenness: float, best_score: float, best_evenness: float) -> bool:
    if score > best_score * (1.0 + ROUNDING):
        return True
    return score > best_score * (1.0 - ROUNDING) and evenness > best_evenness


@borrowing
def _gather(passes: BoolArray, words: npt.NDArray[np.uint64], hits: Int64Array, count: int) -> int:
    """List the first `count` that pass, in order; returns how many they are."""
    num_words, found = (count + 7) // 8, 0
    for index in range(count, 8 * num_words):
        passes[index] = False
    for word in range(num_words):
        if words[word] != 0:
            for index in range(8 * word, 8 * word + 8):
                hits[found] = index  # without a branch: the next one writes over it unless it passes
                found += passes[index]
    return found


# -- overwrites -----------------------------------------------------------------------------------------------


@borrowing
def _best_overwrite(layer: Layer, sieve: Sieve, heaviest: int, limit: float, best: Change) -> Change:
    """Find the best overwrite of a slot of the heaviest rank, or by an expert that it has, if better than the best."""
    num_spare = _list_spare(layer, sieve, limit)
    expert_at, rank_of, load_of, prospect = layer.expert_at, layer.rank_of, layer.load_of, layer.prospect
    marks_of, num_on, replicas, slots_of = layer.marks_of, layer.num_on, layer.replicas, layer.slots_of
    passes, words, hits = sieve.passes, sieve.words, sieve.hits
    price_here, price_there = sieve.price_here, sieve.price_there
    spare, rank_at, load, excess, leaves = sieve.spare, sieve.rank, sieve.load, sieve.excess, sieve.leaves
    lost, uneven, paid, price, marks = sieve.lost, sieve.uneven, sieve.paid, sieve.price, sieve.marks
    share, sinks, sink_gain = prospect[SHARE], prospect[SINKS], prospect[SINK_GAIN]
    num_local = len(expert_at) // len(load_of)
    first = heaviest * num_local
    here = int(np.searchsorted(spare[:num_spare], first))
    num_here = int(np.searchsorted(spare[:num_spare], first + num_local)) - here
    for turn in range(num_local + num_here):  # each expert with all spare slots, then each spare slot with all experts
        index, expert, bar = here, expert_at[first], best.score
        if turn < num_local:
            expert = expert_at[first + turn]
            if expert < 0:
                continue
            for index in range(num_spare):
                price[index] = price_there[turn, rank_at[index]]
            _sift_slots(
                passes,
                prospect,
                marks_of,
                load,
                excess,
                leaves,
                lost,
                paid,
                price,
                marks,
                expert,
                num_spare,
                limit,
                bar,
            )
            num_hits = _gather(passes, words, hits, num_spare)
        else:
            index = here + turn - num_local
            _sift_experts(
                passes, prospect, marks_of, load, excess, leaves, lost, paid, price_here, marks, index, limit, bar
            )
            num_hits = _gather(passes, words, hits, len(marks_of))
        for hit in range(num_hits):
            if turn < num_local:
                index = hits[hit]
            else:
                expert = hits[hit]
            slot = spare[index]
            after = load[index] + share[expert] - sinks[expert] - leaves[index]
            gain = sink_gain[expert] + excess[index] - max(after - limit, 0.0) - lost[index]
            evenness = prospect[SINK_EVENNESS, expert] + (load[index] - after) * (load[index] + after) - uneven[index]
            if marks[index] & marks_of[expert] != 0:
                old = expert_at[slot]
                slots, rises = slots_of[expert, : replicas[expert]], prospect[RISES, old]
                more, evener = _where_both(rank_of, load_of, num_on, slots, old, expert, rises, sinks[expert], limit)
                gain, evenness = gain + more, evenness + evener
            cost = (price[index] if turn < num_local else price_here[expert]) - paid[index]
            score = gain / max(cost, _FREE)
            if gain > limit * ROUNDING and _is_better(score, evenness, best.score, best.evenness):
                best = Change(slot, -1, expert, score, evenness)
    return best


@borrowing
def _where_both(
    rank_of: Int64Array,
    load_of: Float64Array,
    num_on: npt.NDArray[np.int16],
    slots: Int64Array,
    old: int,
    expert: int,
    rises: float,
    sinks: float,
    limit: float,
) -> tuple[float, float]:
    """What gain and evenness are more where a rank carries less of one expert and more of the other."""
    gain, evenness = 0.0, 0.0
    for slot in slots:
        rank = rank_of[slot]
        if num_on[old, rank]:
            up, down = num_on[old, rank] * rises, num_on[expert, rank] * sinks
            over = load_of[rank] - limit
            evenness += 2.0 * up * sinks
            gain += (max(over + up, 0.0) + max(over - down, 0.0)) / num_on[expert, rank]
            gain -= (max(over + up - down, 0.0) + max(over, 0.0)) / num_on[expert, rank]
    return gain, evenness


@borrowing
def _list_spare(layer: Layer, sieve: Sieve, limit: float) -> int:
    """List the slots that may be overwritten, and what doing without their experts means; returns how many they are."""
    expert_at, rank_of, load_of, paid_at = layer.expert_at, layer.rank_of, layer.load_of, layer.paid_at
    prospect, num_on, marks_of, is_spare = layer.prospect, layer.num_on, layer.marks_of, layer.is_spare
    spare, rank_at, load, excess, leaves = sieve.spare, sieve.rank, sieve.load, sieve.excess, sieve.leaves
    lost, uneven, paid, marks = sieve.lost, sieve.uneven, sieve.paid, sieve.marks
    for slot in range(len(is_spare)):
        sieve.passes[slot] = is_spare[slot]
    count = _gather(sieve.passes, sieve.words, spare, len(is_spare))
    for index in range(count):
        slot = spare[index]
        old, rank = expert_at[slot], rank_of[slot]
        rank_at[index] = rank
        load[index], excess[index], paid[index] = load_of[rank], max(load_of[rank] - limit, 0.0), paid_at[slot]
        leaves[index], lost[index], uneven[index], marks[index] = 0.0, 0.0, 0.0, 0
        if old >= 0:
            rises, up = prospect[RISES, old], num_on[old, rank] * prospect[RISES, old]
            leaves[index] = prospect[SHARE, old] - up + rises
            lost[index] = max(prospect[RISE_LOSS, old] - max(load_of[rank] + up - limit, 0.0) + excess[index], 0.0)
            uneven[index] = prospect[RISE_EVENNESS, old] - up * (2.0 * load_of[rank] + up)
            marks[index] = marks_of[old]
    return count


@borrowing
def _sift_slots(
    passes: BoolArray,
    prospect: Float64Array,
    marks_of: Int64Array,
    load: Float64Array,
    excess: Float64Array,
    leaves: Float64Array,
    lost: Float64Array,
    paid: Float64Array,
    price: Float64Array,
    marks: Int64Array,
    expert: int,
    count: int,
    limit: float,
    bar: float,
) -> None:
    """Tell which of the spare slots an expert of the heaviest rank may go to, if the best score so far is `bar`."""
    share, sinks, gain = prospect[SHARE, expert], prospect[SINKS, expert], prospect[SINK_GAIN, expert]
    own_marks, least = marks_of[expert], limit * ROUNDING
    for index in range(count):
        after = load[index] + share - sinks - leaves[index]
        most = gain + excess[index] - max(after - limit, 0.0)
        bound = most if marks[index] & own_marks != 0 else most - lost[index]
        needed = bar * max(price[index] - paid[index], _FREE) * (1.0 - ROUNDING)
        passes[index] = (most > least) & (bound >= needed) & (price[index] < UNPAYABLE)


@borrowing
def _sift_experts(
    passes: BoolArray,
    prospect: Float64Array,
    marks_of: Int64Array,
    loads: Float64Array,
    excesses: Float64Array,
    all_leave: Float64Array,
    all_lost: Float64Array,
    all_paid: Float64Array,
    price: Float64Array,
    all_marks: Int64Array,
    index: int,
    limit: float,
    bar: float,
) -> None:
    """Tell which experts may go to a spare slot of the heaviest rank, if the best score so far is `bar`."""
    share, sinks, gain = prospect[SHARE], prospect[SINKS], prospect[SINK_GAIN]
    load, excess, leaves, lost = loads[index], excesses[index], all_leave[index], all_lost[index]
    paid, marks, least = all_paid[index], all_marks[index], limit * ROUNDING
    for expert in range(len(share)):
        after = load + share[expert] - sinks[expert] - leaves
        most = gain[expert] + excess - max(after - limit, 0.0)
        bound = most if marks & marks_of[expert] != 0 else most - lost
        needed = bar * max(price[expert] - paid, _FREE) * (1.0 - ROUNDING)
        passes[expert] = (most > least) & (bound >= needed) & (price[expert] < UNPAYABLE)


# -- swaps ----------------------------------------------------------------------------------------------------


@borrowing
def _best_swap(layer: Layer, sieve: Sieve, heaviest: int, limit: float, best: Change) -> Change:
    """Find the best swap of a slot of the heaviest rank, if it is better than the best change so far."""
    expert_at, load_of, share_at = layer.expert_at, layer.load_of, layer.share_at
    paid_at, price_here, price_there, price_back = layer.paid_at, sieve.price_here, sieve.price_there, sieve.price_back
    passes, words, hits, least_back = sieve.passes, sieve.words, sieve.hits, sieve.least_back
    load, num_local, num_ranks = load_of[heaviest], len(expert_at) // len(load_of), len(load_of)
    for slot in range(len(expert_at)):
        back = price_here[expert_at[slot]] - paid_at[slot]  # of an empty slot that of the last expert: it is not taken
        price_back[slot] = back if expert_at[slot] >= 0 else UNPAYABLE
    for rank in range(num_ranks):
        least = UNPAYABLE
        for slot in range(rank * num_local, (rank + 1) * num_local):
            least = min(least, price_back[slot])
        least_back[rank] = least
    for turn in range(num_local):
        own = heaviest * num_local + turn
        expert, share, paid, excess = expert_at[own], share_at[own], paid_at[own], load - limit
        if expert < 0:
            continue
        _sift_ranks(passes, load_of, price_there[turn], least_back, limit, excess, share, paid, best.score)
        for hit in range(_gather(passes, words, hits, num_ranks)):
            rank = hits[hit]
            for slot in range(rank * num_local, (rank + 1) * num_local):
                sinks, price = share - share_at[slot], price_there[turn, rank] - paid + price_back[slot]
                gain = min(sinks, excess) - max(sinks - (limit - load_of[rank]), 0.0)
                if gain < limit * ROUNDING or price >= _TOO_DEAR:
                    continue
                score, evenness = gain / max(price, _FREE), 2.0 * sinks * (load - load_of[rank] - sinks)
                if _is_better(score, evenness, best.score, best.evenness):
                    best = Change(own, slot, expert_at[slot], score, evenness)
    return best


@borrowing
def _sift_ranks(
    passes: BoolArray,
    load_of: Float64Array,
    price_there: Float64Array,
    least_back: Float64Array,
    limit: float,
    excess: float,
    share: float,
    paid: float,
    best_score: float,
) -> None:
    """Tell with which ranks the heaviest one may swap a slot that has that share."""
    for rank in range(len(load_of)):
        most, price = min(min(excess, share), limit - load_of[rank]), price_there[rank] - paid + least_back[rank]
        needed = best_score * max(price, _FREE) * (1.0 - ROUNDING)
        passes[rank] = (most >= limit * ROUNDING) & (most >= needed) & (price < _TOO_DEAR)
