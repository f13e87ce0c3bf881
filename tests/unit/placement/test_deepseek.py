"""DeepSeek's published method: the published example, an independent oracle, ties and idle layers."""

from __future__ import annotations

import numpy as np
import pytest
from deepseek_oracle import place_layer

from eplb_fsm.errors import ConfigError
from eplb_fsm.placement import Placement, Topology, get_policy
from eplb_fsm.placement.kernels.deepseek import place_layers
from eplb_fsm.placement.policies.deepseek import place_layers_numpy, rebalance_experts

PUBLISHED_LOAD = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
PUBLISHED_MAP = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]

# (logical, physical, groups, nodes, ranks)
SIZES = [
    (12, 16, 4, 2, 8),
    (12, 16, 1, 1, 8),
    (8, 8, 1, 1, 8),
    (8, 12, 1, 1, 4),
    (16, 24, 8, 4, 8),
    (16, 16, 4, 2, 4),
    (64, 72, 8, 2, 4),
    (24, 32, 2, 2, 16),
]
ODD_SIZES = [(8, 40, 1, 1, 4), (5, 6, 1, 1, 1), (1, 4, 1, 1, 2)]
"""More slots than experts times ranks, one rank, one expert."""


def test_the_published_example() -> None:
    """The example of the published README gives the published map."""
    rows = rebalance_experts(np.array(PUBLISHED_LOAD, dtype=np.float64), 16, Topology(8, 2, 4))
    assert rows.tolist() == PUBLISHED_MAP


@pytest.mark.parametrize(("logical", "physical", "groups", "nodes", "ranks"), SIZES)
def test_equals_the_oracle_without_ties(logical: int, physical: int, groups: int, nodes: int, ranks: int) -> None:
    """On many random loads in which no two experts are equal, the maps are those of plain loops."""
    rng = np.random.default_rng(logical * 1000 + physical)
    for _ in range(15):
        # Distinct integers, so sums are exact whatever the order of addition.
        load = np.array([rng.permutation(1 << 16)[:logical] + 1 for _ in range(4)], dtype=np.float64)
        rows = rebalance_experts(load, physical, Topology(ranks, nodes, groups))
        expected = [place_layer(row, physical, groups, nodes, ranks) for row in load.tolist()]
        assert rows.tolist() == expected


@pytest.mark.parametrize(("logical", "physical", "groups", "nodes", "ranks"), SIZES)
def test_ties_follow_the_documented_order(logical: int, physical: int, groups: int, nodes: int, ranks: int) -> None:
    """Loads full of equal and zero entries give the maps of the documented order."""
    rng = np.random.default_rng(logical + physical)
    for highest in (1, 2, 3):
        load = rng.integers(0, highest + 1, (4, logical)).astype(np.float64)
        rows = rebalance_experts(load, physical, Topology(ranks, nodes, groups))
        expected = [place_layer(row, physical, groups, nodes, ranks) for row in load.tolist()]
        assert rows.tolist() == expected


def test_layers_do_not_see_each_other() -> None:
    """Planning all layers at once gives what planning each alone gives."""
    load = np.random.default_rng(5).lognormal(size=(7, 24))
    together = rebalance_experts(load, 32, Topology(8, 2, 4))
    alone = [rebalance_experts(load[i : i + 1], 32, Topology(8, 2, 4))[0] for i in range(7)]
    assert together.tolist() == [row.tolist() for row in alone]


def test_zero_load_gives_a_valid_placement() -> None:
    """Without any load every expert still has a slot, and replicas are spread, not heaped on one expert."""
    rows = rebalance_experts(np.zeros((2, 8)), 12, Topology(4))
    placement = Placement(rows, 8, 4)
    assert placement.logical_replica_count.max() == 2


@pytest.mark.parametrize("name", ["deepseek", "deepseek_hierarchical", "deepseek_global"])
def test_idle_layers_stay_as_they_are(name: str) -> None:
    """A layer without load keeps its current row; a busy one beside it is planned."""
    current = Placement.initial(2, 8, 12, 4).with_layer(0, [7, 6, 5, 4, 3, 2, 1, 0, 0, 0, 0, 0])
    load = np.zeros((2, 8))
    load[1] = np.arange(8)
    planned = get_policy(name).plan(load, current, Topology(4))
    assert planned.physical_to_logical_map[0].tolist() == current.physical_to_logical_map[0].tolist()
    assert planned.physical_to_logical_map[1].tolist() == place_layer(load[1].tolist(), 12, 1, 1, 4)


@pytest.mark.parametrize(
    ("topology", "groups", "nodes"),
    [
        (Topology(8, 2, 4), 4, 2),
        (Topology(8, 4, 2), 1, 1),
        (Topology(8, 2, 1), 1, 1),
        (Topology(8, 1, 5), 1, 1),
    ],
)
def test_auto_is_hierarchical_where_groups_divide(topology: Topology, groups: int, nodes: int) -> None:
    """Policy "deepseek" is hierarchical where groups divide among nodes, and global elsewhere."""
    load = np.array(PUBLISHED_LOAD, dtype=np.float64)
    planned = get_policy("deepseek").plan(load, Placement.initial(2, 12, 16, 8), topology)
    expected = [place_layer(row, 16, groups, nodes, 8) for row in load.tolist()]
    assert planned.physical_to_logical_map.tolist() == expected


def test_global_ignores_nodes_and_groups() -> None:
    """Policy "deepseek_global" gives the same map for every topology of as many ranks."""
    load = np.array(PUBLISHED_LOAD, dtype=np.float64)
    current = Placement.initial(2, 12, 16, 8)
    policy = get_policy("deepseek_global")
    assert policy.plan(load, current, Topology(8, 2, 4)) == policy.plan(load, current, Topology(8))


@pytest.mark.parametrize(
    ("topology", "named"), [(Topology(8, 4, 2), "num_groups=2"), (Topology(8, 1, 5), "num_logical_experts=12")]
)
def test_hierarchical_refuses_what_it_cannot_divide(topology: Topology, named: str) -> None:
    """Policy "deepseek_hierarchical" names the number that does not divide instead of falling back."""
    with pytest.raises(ConfigError, match=named):
        get_policy("deepseek_hierarchical").plan(np.ones((2, 12)), Placement.initial(2, 12, 16, 8), topology)


def test_too_few_slots_are_refused() -> None:
    """Fewer slots than experts is an error that says what to raise."""
    with pytest.raises(ConfigError, match="num_redundant_experts"):
        rebalance_experts(np.ones((1, 8)), 4, Topology(4))


def test_more_redundant_slots_than_experts() -> None:
    """Many redundant slots for few experts still give every expert a slot."""
    rows = rebalance_experts(np.array([[5.0, 1.0, 0.0]]), 16, Topology(4))
    assert set(rows[0].tolist()) == {0, 1, 2}


def loads(num_logical: int) -> dict[str, np.ndarray]:
    """Loads of four layers: spread, with ties, with zeros, and as large and as small as floats get."""
    rng = np.random.default_rng(num_logical)
    spread = rng.lognormal(0.0, 2.0, (4, num_logical))
    return {
        "spread": spread,
        "ties": rng.integers(0, 3, (4, num_logical)).astype(np.float64),
        "equal": np.full((4, num_logical), 7.0),
        "zeros": np.zeros((4, num_logical)),
        "one": np.eye(4, num_logical) * 5.0,
        "huge": spread * 1e300,
        "tiny": spread * 1e-320,
        "close": 1.0 + rng.integers(0, 4, (4, num_logical)) * np.finfo(np.float64).eps,
    }


@pytest.mark.parametrize(("logical", "physical", "groups", "nodes", "ranks"), [*SIZES, *ODD_SIZES])
@pytest.mark.parametrize("kind", list(loads(1)))
def test_the_kernel_equals_the_numpy_path(
    logical: int, physical: int, groups: int, nodes: int, ranks: int, kind: str
) -> None:
    """Both paths give the same map to the last slot, whatever the load looks like."""
    load = loads(logical)[kind]
    by_kernel = place_layers(load, physical, ranks, nodes, groups)
    assert by_kernel.tolist() == place_layers_numpy(load, physical, ranks, nodes, groups).tolist()


@pytest.mark.parametrize("num_layers", [31, 33, 65])
@pytest.mark.parametrize(("groups", "nodes"), [(1, 1), (8, 4)])
def test_the_kernel_equals_the_numpy_path_for_many_layers(num_layers: int, groups: int, nodes: int) -> None:
    """Also where the layers are placed in several turns, the last one shorter than the others."""
    load = np.random.default_rng(num_layers).lognormal(0.0, 1.0, (num_layers, 16))
    by_kernel = place_layers(load, 24, 8, nodes, groups)
    assert by_kernel.tolist() == place_layers_numpy(load, 24, 8, nodes, groups).tolist()


def test_a_negative_zero_is_zero() -> None:
    """A load of -0.0 gives the map of a load of 0.0."""
    load = np.array([[3.0, 0.0, 1.0, 0.0, 0.0, 2.0]])
    negative = np.where(load == 0.0, -0.0, load)
    maps = [rebalance_experts(each, 8, Topology(4)).tolist() for each in (load, negative)]
    assert maps[0] == maps[1]
