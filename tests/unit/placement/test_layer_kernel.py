"""What the repair keeps of a layer while it changes it: the same, to the last bit, as worked out anew."""

from __future__ import annotations

import numpy as np

from eplb_fsm.placement.kernels.layer import (
    FROM,
    ON,
    Layer,
    look_again,
    look_ahead,
    make_layer,
    may_get,
    put,
    set_limit,
    sum_loads,
)


def layer_of(seed: int) -> tuple[Layer, float]:
    """Some layer with empty slots and ranks of several speeds, one of which may hold nothing; and a limit."""
    rng = np.random.default_rng(seed)
    num_ranks, num_local = int(rng.integers(4, 8)), int(rng.integers(2, 6))
    num_experts = int(rng.integers(1, num_local * (num_ranks - 1) + 1))
    extra = rng.integers(-1, num_experts, num_local * (num_ranks - 1) - num_experts)
    row = np.concatenate([rng.permutation([*range(num_experts), *extra]), np.full(num_local, -1)])
    speeds = np.array([*rng.choice([0.25, 1.0, 1.0], num_ranks - 1), 1e-6])
    weight = rng.lognormal(0.0, 1.0, num_experts)
    layer = make_layer(weight, row, row, speeds, np.arange(num_ranks) < num_ranks - 1, num_ranks, num_ranks, 2.0)
    limit = float(weight.sum() / speeds.sum())
    set_limit(layer, limit)
    look_ahead(layer, np.arange(num_experts), limit)
    return layer, limit


def test_a_change_brings_everything_up_to_date() -> None:
    """Shares, loads, what is spare and prospects after each of many overwrites and swaps; and who holds what."""
    assert sum(check_changes(seed) for seed in range(20)) > 500


def check_changes(seed: int) -> int:
    """Make random changes to some layer; return how many there were."""
    layer, limit = layer_of(seed)
    rng = np.random.default_rng(seed)
    num_changes = 0
    for _ in range(200):
        slot, other = rng.integers(0, len(layer.expert_at), 2)
        expert, old = int(layer.expert_at[other]), int(layer.expert_at[slot])
        if expert < 0 or not may_get(layer, expert, layer.rank_of[slot]):
            continue
        is_swap = old >= 0 and may_get(layer, old, layer.rank_of[other])
        if not is_swap and old >= 0 and layer.replicas[old] == 1:
            continue
        put(layer, int(slot), expert)
        if is_swap:
            put(layer, int(other), old)
        look_again(layer, expert, old, limit)
        kept = [array.copy() for array in (layer.share_at, layer.load_of, layer.is_spare, layer.prospect)]
        sum_loads(layer)
        look_ahead(layer, np.arange(len(layer.weight)), limit)
        for before, anew in zip(kept, (layer.share_at, layer.load_of, layer.is_spare, layer.prospect), strict=True):
            assert before.tobytes() == anew.tobytes()
        assert ((layer.standing & ON > 0) == (layer.num_on.T > 0)).all()
        held = layer.expert_at >= 0
        known = layer.standing[layer.rank_of[held], layer.expert_at[held]]
        assert (layer.paid_at[held] == layer.price_of[known & FROM]).all()
        assert layer.is_spare[~held].all()
        num_changes += 1
    return num_changes
