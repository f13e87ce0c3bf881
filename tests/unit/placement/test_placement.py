"""The placement value: validation, derived maps, equality, digest."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from eplb_fsm.errors import ConfigError, PlacementError
from eplb_fsm.placement import Placement, Topology, live_digest

ROW = [0, 1, 2, 3, 2, -1]


def placement() -> Placement:
    """Two layers, 4 experts on 6 slots of 3 ranks."""
    return Placement([ROW, [3, 3, 2, 1, 0, 3]], 4, 3)


def test_sizes() -> None:
    """The sizes that engines use follow from map, experts and ranks."""
    p = placement()
    assert (p.num_moe_layers, p.num_physical_experts, p.num_logical_experts, p.num_ranks) == p.shape
    assert p.shape == (2, 6, 4, 3)
    assert (p.num_redundant_experts, p.num_local_physical_experts) == (2, 2)


def test_derived_maps() -> None:
    """Replica counts and the logical-to-physical table are those of the map."""
    p = placement()
    assert p.logical_replica_count.tolist() == [[1, 1, 2, 1], [1, 1, 1, 3]]
    assert p.logical_to_physical_map.tolist() == [
        [[0, -1, -1], [1, -1, -1], [2, 4, -1], [3, -1, -1]],
        [[4, -1, -1], [3, -1, -1], [2, -1, -1], [0, 1, 5]],
    ]
    assert p.logical_to_physical(4, layers=[1])[0, 3].tolist() == [0, 1, 5, -1]
    assert p.logical_to_physical(layers=[0]).shape == (1, 4, 2)


def test_derived_maps_of_random_placements() -> None:
    """On random maps with empty slots the table lists the slots of each expert, ascending."""
    rng = np.random.default_rng(1)
    for _ in range(20):
        rows = [rng.permutation([*range(9), *rng.integers(-1, 9, 7)]) for _ in range(5)]
        p = Placement(rows, 9, 4)
        for layer, row in enumerate(rows):
            for expert in range(9):
                slots = np.nonzero(row == expert)[0].tolist()
                table = p.logical_to_physical_map[layer, expert].tolist()
                assert table == slots + [-1] * (len(table) - len(slots))
                assert p.logical_replica_count[layer, expert] == len(slots)


def test_a_narrow_table_is_refused() -> None:
    """A table narrower than the replicas is an error that names both numbers."""
    with pytest.raises(PlacementError, match=r"3 replicas.* holds 2"):
        placement().logical_to_physical(2)


def test_initial_is_the_plain_layout() -> None:
    """At first slot i holds expert i modulo the number of experts, in every layer."""
    p = Placement.initial(2, 4, 6, 2)
    assert p.physical_to_logical_map.tolist() == [[0, 1, 2, 3, 0, 1]] * 2


def test_immutable() -> None:
    """Nobody can change a placement: not its arrays, not through the array it was made from."""
    source = np.array([ROW])
    p = Placement(source, 4, 3)
    source[0, 0] = 3
    assert p.physical_to_logical_map[0, 0] == 0
    for array in (p.physical_to_logical_map, p.logical_replica_count, p.logical_to_physical_map):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_equality_and_hash_by_value() -> None:
    """Equal maps of equal shape are equal and hash alike; another map, rank count or expert count is not."""
    p = placement()
    assert p == placement()
    assert hash(p) == hash(placement())
    assert p != p.with_layer(0, [0, 1, 2, 3, 2, 2])
    assert p != Placement(p.physical_to_logical_map, 4, 2)
    assert p != "placement"
    assert "2 layers, 4 logical, 6 physical, 3 ranks" in repr(p)


def test_with_layer_equals_a_new_placement() -> None:
    """Changing one layer gives the placement, and the digests, of a map made whole."""
    p = placement()
    _ = p.digest
    changed = p.with_layer(1, [0, 1, 2, 3, 0, 1])
    whole = Placement([ROW, [0, 1, 2, 3, 0, 1]], 4, 3)
    assert changed == whole
    assert changed.digest == whole.digest
    assert changed.layer_digests == whole.layer_digests
    assert changed.layer_digests[0] == p.layer_digests[0]


def test_digest_sees_every_change() -> None:
    """Any changed slot, any two exchanged slots or layers and any other shape give another digest."""
    base = Placement([[0, 1, 2, 3, 2, 1], [3, 2, 1, 0, 0, 0]], 4, 3)
    seen = {base.digest, Placement(base.physical_to_logical_map, 4, 2).digest}
    seen.add(Placement(base.physical_to_logical_map[::-1], 4, 3).digest)
    count = 3
    for layer in range(2):
        for a in range(6):
            for b in range(a):
                row = base.physical_to_logical_map[layer].copy()
                if row[a] != row[b]:
                    row[a], row[b] = row[b], row[a]
                    seen.add(base.with_layer(layer, row).digest)
                    count += 1
    assert len(seen) == count
    assert all(-(2**63) <= digest < 2**63 for digest in seen)


def test_digest_is_the_same_for_ever() -> None:
    """The digest of a fixed placement is a fixed number: machines and versions must agree on it."""
    p = Placement.initial(2, 4, 6, 2)
    assert p.digest == GOLDEN_DIGEST
    assert live_digest([p, p]) == GOLDEN_LIVE_DIGEST


GOLDEN_DIGEST = -3415589013949209648
GOLDEN_LIVE_DIGEST = -8404012903450007230


def test_live_digest_depends_on_the_bank() -> None:
    """Two banks with exchanged placements do not look alike."""
    a, b = placement(), placement().with_layer(0, [3, 2, 1, 0, 0, 0])
    assert live_digest([a, b]) != live_digest([b, a])
    assert live_digest([a, a]) != live_digest([b, b])
    assert live_digest([a]) != live_digest([a, a])


@pytest.mark.parametrize(
    ("rows", "experts", "ranks", "message"),
    [
        ([[0, 1, 2]], 4, 3, "layer 0 has no slot for logical expert 3"),
        ([[0, 1], [0, 0]], 2, 1, "layer 1 has no slot for logical expert 1"),
        ([[0, 1, 4]], 2, 1, "layer 0, slot 2 holds expert 4"),
        ([[0, 1, -2]], 2, 1, "layer 0, slot 2 holds expert -2"),
        ([[0, 1, 0]], 2, 2, "3 physical experts do not divide among 2 ranks"),
        ([0, 1], 2, 1, r"shape \(2,\)"),
        (np.zeros((1, 0), dtype=np.int64), 1, 1, r"shape \(1, 0\)"),
        ([[0, 1], [1]], 2, 1, "not a rectangular array"),
        ([[0.0, 1.0]], 2, 1, "dtype float64"),
        ([["a", "b"]], 2, 1, "dtype"),
        ([[0]], 0, 1, "num_logical_experts=0"),
        ([[0]], 1, 0, "num_ranks=0"),
    ],
)
def test_invalid_maps_are_refused(rows: object, experts: int, ranks: int, message: str) -> None:
    """Each way in which a map can be wrong has one error that names the place or the number."""
    with pytest.raises(PlacementError, match=message):
        Placement(rows, experts, ranks)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("layer", "row", "message"),
    [
        (2, ROW, "no layer 2"),
        (-1, ROW, "no layer -1"),
        (0, ROW[:5], r"shape \(5,\)"),
        (0, [0.5] * 6, "float64"),
        (1, [0, 0, 0, 1, 2, 2], "layer 1 has no slot for logical expert 3"),
    ],
)
def test_with_layer_validates(layer: int, row: list[int], message: str) -> None:
    """An invalid row or layer number is refused like an invalid map."""
    with pytest.raises(PlacementError, match=message):
        placement().with_layer(layer, row)


@pytest.mark.parametrize("sizes", [(0, 4, 6, 2), (1, 0, 6, 2), (1, 4, 2, 2), (1, 4, -1, 1), (1, 4, 6, 0)])
def test_impossible_initial_layouts_are_refused(sizes: tuple[int, int, int, int]) -> None:
    """Sizes without a valid layout raise the placement's own error."""
    with pytest.raises(PlacementError):
        Placement.initial(*sizes)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [((0, 1, 1), "num_ranks is 0"), ((4, 3, 1), "num_nodes=3"), ((4, 2, 0), "num_groups is 0")],
)
def test_impossible_topologies_are_refused(sizes: tuple[int, int, int], message: str) -> None:
    """A topology that cannot be names the number to change."""
    with pytest.raises(ConfigError, match=message):
        Topology(*sizes)


def test_imports_no_torch() -> None:
    """The planner's process imports numpy only."""
    code = "import sys, eplb_fsm.placement; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
