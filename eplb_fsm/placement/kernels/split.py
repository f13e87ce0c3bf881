"""How tokens are divided among the replicas of each expert, as a kernel: water-filling.

With the shares of all other experts given, the best shares of one expert pour its load onto its ranks like water: onto
the lightest until it is as heavy as the next one, then onto both. Doing that for one expert after the other
lowers the sum of the squared rank loads each time, and the division at which that sum is least also has the lightest
heaviest rank, since it is the most even one there is (the loads that can be reached form a base polytope). Experts
take turns forwards and backwards, so that load can run through a chain of ranks in one sweep. A rank of twice the speed
is a vessel of twice the width: what counts is how high the water stands, the load over the speed.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from eplb_fsm.placement.digest import Int64Array
from eplb_fsm.placement.kernels.compiled import borrowing, compiled
from eplb_fsm.placement.validate import Float64Array

_MOST_SWEEPS = 64
_SETTLED = 2e-4
"""Share of the heaviest rank's load: sweeps end when two of them together take less than this off it."""


class Pools(NamedTuple):
    """Where the experts of a layer that have a choice can be: one entry for each such expert and each of its ranks.

    Attributes:
        experts: (choices) int64 experts with more than one rank, the heaviest first.
        begin: (experts + 1) int64 first entry of each expert.
        rank: (entries) int64 rank, ascending for each expert.
        amount: (entries) float64 load of the expert that the rank carries.
        load_of: (ranks) float64 load of each rank.
        speeds: (ranks) float64 speed of each rank, and `slowness` one over it, since a division takes long.
    """

    experts: Int64Array
    begin: Int64Array
    rank: Int64Array
    amount: Float64Array
    load_of: Float64Array
    speeds: Float64Array
    slowness: Float64Array


@compiled
def split_layers(load: Float64Array, rows: Int64Array, speeds: Float64Array) -> tuple[Float64Array, Float64Array]:
    """Divide the load of every layer among its replicas, so that the slowest rank of each is as quick as can be.

    Args:
        load: (layers, experts) float64, 0 or more, C-contiguous.
        rows: (layers, slots) int64 expert of each slot, -1 where it is empty; every expert has a slot.
        speeds: (ranks) float64 above 0, speeds of the ranks that share the slots.

    Returns:
        (layers, slots) float64 share of its expert's load that each slot gets, summing to 1 over the slots of an
        expert, and (layers, ranks) float64 load of each rank.
    """
    shares, loads = np.zeros(rows.shape), np.zeros((len(rows), len(speeds)))
    for layer in range(len(rows)):
        pools = fill_pools(load[layer], rows[layer], speeds, 0.0)
        loads[layer] = pools.load_of
        _share_out(load[layer], rows[layer], pools, shares[layer])
    return shares, loads


@compiled
def fill_pools(weight: Float64Array, expert_at: Int64Array, speeds: Float64Array, limit: float) -> Pools:
    """Find the ranks of all experts that have a choice, and fill them until no rank is above `limit` or all is settled.

    Args:
        weight: (experts) float64 load of each expert.
        expert_at: (slots) int64 expert of each slot, -1 where it is empty.
        speeds: (ranks) float64 speeds of the ranks that share the slots.
        limit: Load of a rank of speed 1 at which there is no need to go on.
    """
    pools = _make_pools(weight, expert_at, speeds)
    before = np.inf
    for sweep in range(_MOST_SWEEPS):
        _pour_all(pools, weight, sweep % 2 == 1)
        heaviest = highest_of(pools)
        if heaviest <= limit:
            break
        if sweep % 2 == 1:
            if heaviest > before * (1.0 - _SETTLED):
                break
            before = heaviest
    return pools


@borrowing
def highest_of(pools: Pools) -> float:
    """Load over speed of the slowest rank."""
    highest = 0.0
    for rank in range(len(pools.load_of)):
        highest = max(highest, pools.load_of[rank] * pools.slowness[rank])
    return highest


@compiled
def _make_pools(weight: Float64Array, expert_at: Int64Array, speeds: Float64Array) -> Pools:
    """Put what has no choice onto its ranks, and list the ranks of what has."""
    num_ranks = len(speeds)
    num_experts, num_local = len(weight), len(expert_at) // num_ranks
    num_on = np.zeros(num_experts, dtype=np.int64)
    last_rank = np.full(num_experts, -1, dtype=np.int64)
    for slot in range(len(expert_at)):
        expert, rank = expert_at[slot], slot // num_local
        if expert >= 0 and last_rank[expert] != rank:
            last_rank[expert] = rank
            num_on[expert] += 1
    load_of = np.zeros(num_ranks)
    begin = np.zeros(num_experts + 1, dtype=np.int64)
    for expert in range(num_experts):
        begin[expert + 1] = begin[expert] + (num_on[expert] if num_on[expert] > 1 else 0)
        if num_on[expert] == 1:
            load_of[last_rank[expert]] += weight[expert]
    rank_of, next_entry = np.zeros(begin[-1], dtype=np.int64), begin[:-1].copy()
    last_rank[:] = -1
    for slot in range(len(expert_at)):
        expert, rank = expert_at[slot], slot // num_local
        if expert >= 0 and num_on[expert] > 1 and last_rank[expert] != rank:
            last_rank[expert] = rank
            rank_of[next_entry[expert]] = rank
            next_entry[expert] += 1
    choices = np.flatnonzero(num_on > 1)
    order = np.argsort(-weight[choices], kind="mergesort")
    return Pools(choices[order], begin, rank_of, np.zeros(begin[-1]), load_of, speeds, 1.0 / speeds)


@borrowing
def _pour_all(pools: Pools, weight: Float64Array, is_backwards: bool) -> None:
    """Take one expert after the other off its ranks and pour it on again, the lightest ranks first."""
    rank_of, amount, load_of = pools.rank, pools.amount, pools.load_of
    for turn in range(len(pools.experts)):
        expert = pools.experts[len(pools.experts) - 1 - turn if is_backwards else turn]
        entries = range(pools.begin[expert], pools.begin[expert + 1])
        for entry in entries:
            load_of[rank_of[entry]] -= amount[entry]
            amount[entry] = -1.0  # not reached by the water yet
        level, below, width = 0.0, weight[expert], 0.0
        for _ in entries:
            lightest, lowest = -1, np.inf
            for entry in entries:
                height = load_of[rank_of[entry]] * pools.slowness[rank_of[entry]]
                if amount[entry] < 0.0 and height < lowest:
                    lightest, lowest = entry, height
            if width > 0.0 and lowest >= level:
                break
            amount[lightest] = 0.0
            width += pools.speeds[rank_of[lightest]]
            below += load_of[rank_of[lightest]]
            level = below / width
        for entry in entries:
            rank = rank_of[entry]
            amount[entry] = max(level * pools.speeds[rank] - load_of[rank], 0.0) if amount[entry] == 0.0 else 0.0
            load_of[rank] += amount[entry]


@compiled
def _share_out(weight: Float64Array, expert_at: Int64Array, pools: Pools, shares: Float64Array) -> None:
    """Turn what each rank carries of an expert into the share of each slot; equal ones on a rank, and without load."""
    num_ranks = len(pools.load_of)
    num_experts, num_local = len(weight), len(expert_at) // num_ranks
    replicas = np.zeros(num_experts, dtype=np.int64)
    num_on = np.zeros((num_experts, num_ranks), dtype=np.int16)
    for slot in range(len(expert_at)):
        if expert_at[slot] >= 0:
            replicas[expert_at[slot]] += 1
            num_on[expert_at[slot], slot // num_local] += 1
    for slot in range(len(expert_at)):
        expert, rank = expert_at[slot], slot // num_local
        if expert < 0:
            continue
        shares[slot] = 1.0 / replicas[expert]
        for entry in range(pools.begin[expert], pools.begin[expert + 1]):
            if pools.rank[entry] == rank and weight[expert] > 0.0:
                shares[slot] = pools.amount[entry] / weight[expert] / num_on[expert, rank]
