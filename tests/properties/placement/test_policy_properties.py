"""What holds for every policy and every load: checked over random instances."""

from __future__ import annotations

import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from instances import placements

from eplb_fsm.placement import Placement, RebalancePolicy, Topology, get_policy
from eplb_fsm.placement.balancedness import balancedness, mean_over_max
from eplb_fsm.placement.moves import num_peer_moves
from eplb_fsm.placement.split import weighted_rank_loads

TARGETS = st.sampled_from([0.5, 0.8, 0.95, 1.0])
SMALL = 1e-9


@st.composite
def problems(draw: st.DrawFn) -> tuple[Placement, np.ndarray]:
    """A live placement, perhaps with empty slots, and a load of its shape: spread, with zeros, with ties."""
    current = draw(placements(draw(st.integers(1, 6))))
    shape = (current.num_moe_layers, current.num_logical_experts)
    counts = draw(hnp.arrays(np.int64, shape, elements=st.integers(0, 1000) | st.sampled_from([0, 1, 1_000_000])))
    return current, counts.astype(np.float64)


def movement_aware(target: float) -> RebalancePolicy:
    """The movement-aware policy with this target."""
    return get_policy("movement_aware", target)


@given(problems(), TARGETS)
def test_no_layer_is_less_balanced_than_it_must_be(problem: tuple[Placement, np.ndarray], target: float) -> None:
    """Each layer reaches the target, or is at least as balanced as before and as in DeepSeek's placement."""
    current, load = problem
    topology = Topology(current.num_ranks)
    after = balancedness(load, movement_aware(target).plan(load, current, topology))
    anew = balancedness(load, get_policy("deepseek_global").plan(load, current, topology))
    least = np.minimum(target, np.maximum(balancedness(load, current), anew))
    assert (after >= least * (1.0 - SMALL)).all()


@given(problems(), TARGETS)
def test_no_layer_is_less_balanced_with_weighted_shares_either(
    problem: tuple[Placement, np.ndarray], target: float
) -> None:
    """The same, told by those shares, which are within 1 % of the best ones."""
    current, load = problem
    topology = Topology(current.num_ranks)
    planned = get_policy("movement_aware", target, "weighted").plan(load, current, topology)
    anew = get_policy("deepseek_global").plan(load, current, topology)
    after, before, other = (mean_over_max(weighted_rank_loads(load, p)) for p in (planned, current, anew))
    assert (after >= np.minimum(target, np.maximum(before, other)) * 0.99).all()


@given(problems(), TARGETS)
def test_what_is_balanced_stays(problem: tuple[Placement, np.ndarray], target: float) -> None:
    """A second plan for the same load leaves every layer that reaches the target as it is."""
    current, load = problem
    topology = Topology(current.num_ranks)
    once = movement_aware(target).plan(load, current, topology)
    twice = movement_aware(target).plan(load, once, topology)
    good = balancedness(load, once) >= target
    same = (once.physical_to_logical_map == twice.physical_to_logical_map).all(axis=1)
    assert same[good].all()


@given(problems(), TARGETS, st.integers(-20, 20))
def test_the_unit_of_the_load_does_not_matter(
    problem: tuple[Placement, np.ndarray], target: float, exponent: int
) -> None:
    """Loads that are a power of two times as large give the same placement: only ratios count."""
    current, load = problem
    topology = Topology(current.num_ranks)
    scaled = load * 2.0**exponent
    assert movement_aware(target).plan(scaled, current, topology) == movement_aware(target).plan(
        load, current, topology
    )


@given(problems(), TARGETS)
def test_layers_are_planned_alone(problem: tuple[Placement, np.ndarray], target: float) -> None:
    """A layer's row does not depend on the other layers."""
    current, load = problem
    topology = Topology(current.num_ranks)
    together = movement_aware(target).plan(load, current, topology)
    for layer, row in enumerate(current.physical_to_logical_map):
        one = Placement([row], current.num_logical_experts, current.num_ranks)
        alone = movement_aware(target).plan(load[layer : layer + 1], one, topology)
        assert alone.physical_to_logical_map[0].tolist() == together.physical_to_logical_map[layer].tolist()


@given(problems(), TARGETS, st.data())
def test_no_layer_is_slower_than_it_must_be(
    problem: tuple[Placement, np.ndarray], target: float, data: st.DataObject
) -> None:
    """Ranks that are to hold nothing are empty; a layer that misses the target is as balanced by time as before."""
    current, load = problem
    speed = st.sampled_from([0.0, 0.05, 0.5, 1.0, 1.0, 3.0])
    speeds = data.draw(st.lists(speed, min_size=current.num_ranks, max_size=current.num_ranks))
    assume(sum(map(bool, speeds)) * current.num_local_physical_experts >= current.num_logical_experts)
    topology = Topology(current.num_ranks, speeds=tuple(speeds))
    planned = movement_aware(target).plan(load, current, topology)
    rows = planned.physical_to_logical_map.reshape(len(load), current.num_ranks, -1)
    assert (rows[:, ~topology.may_hold] == -1).all()
    before, after = (balancedness(load, placement, topology.counted_speeds) for placement in (current, planned))
    if topology.may_hold.all():  # else what has to leave may make it worse
        assert (after >= np.minimum(target, before) * (1.0 - SMALL)).all()
    assert movement_aware(target).plan(load, planned, topology) == planned or (after < target).any()


@given(problems())
def test_moves_are_counted_by_rank(problem: tuple[Placement, np.ndarray]) -> None:
    """Swapping two slots of a rank moves nothing; handing all experts to the next rank moves what that one lacks."""
    current, _ = problem
    ranks = current.physical_to_logical_map.reshape(current.num_moe_layers, current.num_ranks, -1)
    turned = Placement(np.roll(ranks, 1, axis=1).reshape(len(ranks), -1), *current.shape[2:])
    within = Placement(np.roll(ranks, 1, axis=2).reshape(len(ranks), -1), *current.shape[2:])
    assert num_peer_moves(current, within) == 0
    lacks = [
        set(layer[rank - 1]) - set(layer[rank]) - {-1} for layer in ranks.tolist() for rank in range(current.num_ranks)
    ]
    assert num_peer_moves(current, turned) == sum(map(len, lacks))
