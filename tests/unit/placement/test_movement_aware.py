"""The movement-aware policy: what it leaves alone, what it moves, and what it never does."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fewest_moves import fewest_moves

from eplb_fsm.errors import ConfigError
from eplb_fsm.offline.comparison import num_duplicates
from eplb_fsm.placement import Placement, Topology, get_policy
from eplb_fsm.placement.balancedness import balancedness
from eplb_fsm.placement.kernels.changes import _gather, make_sieve
from eplb_fsm.placement.kernels.compiled import borrowing, compiled
from eplb_fsm.placement.kernels.layer import make_layer
from eplb_fsm.placement.kernels.repair import mean_load, relieve, repair_layers
from eplb_fsm.placement.moves import num_cross_node_moves, num_peer_moves
from eplb_fsm.placement.policies import MovementAwarePolicy

NUM_LAYERS, NUM_LOGICAL, NUM_PHYSICAL, NUM_RANKS = 6, 64, 80, 8


def drifted(seed: int, sigma: float = 0.2) -> tuple[Placement, np.ndarray]:
    """DeepSeek's placement for some load, and the load some time later."""
    rng = np.random.default_rng(seed)
    load = rng.lognormal(0.0, 1.0, (NUM_LAYERS, NUM_LOGICAL))
    first = Placement.initial(NUM_LAYERS, NUM_LOGICAL, NUM_PHYSICAL, NUM_RANKS)
    current = get_policy("deepseek_global").plan(load, first, Topology(NUM_RANKS))
    return current, load * rng.lognormal(0.0, sigma, load.shape)


def instance(seed: int) -> tuple[Placement, np.ndarray]:
    """Some small placement of one layer, and a load of it."""
    rng = np.random.default_rng(seed)
    num_ranks, room = int(rng.integers(2, 9)), int(rng.integers(1, 6))
    num_slots = num_ranks * room
    num_experts = int(rng.integers(max(1, num_slots // 3), num_slots + 1))
    row = rng.permutation([*range(num_experts), *rng.integers(0, num_experts, num_slots - num_experts)])
    load = np.floor(rng.lognormal(2.0, rng.choice([0.5, 1.0, 2.0]), (1, num_experts)))
    return Placement([row], num_experts, num_ranks), load


@pytest.mark.parametrize("target", [0.9, 0.95, 0.99])
def test_reaches_the_target_with_few_moves(target: float) -> None:
    """After a drift every layer reaches the target, with a fifth of the moves of a new plan or fewer."""
    for seed in range(5):
        current, load = drifted(seed)
        topology = Topology(NUM_RANKS)
        planned = get_policy("movement_aware", target).plan(load, current, topology)
        anew = get_policy("deepseek_global").plan(load, current, topology)
        assert balancedness(load, planned).min() >= target - 1e-9
        assert num_peer_moves(current, planned) <= num_peer_moves(current, anew) / 5


def test_leaves_good_layers_alone() -> None:
    """A layer that reaches the target keeps its row; so does one without load."""
    current, load = drifted(1)
    load[2] = 0.0
    planned = MovementAwarePolicy(0.93).plan(load, current, Topology(NUM_RANKS))
    good = balancedness(load, current) >= 0.93
    assert 0 < good.sum() < NUM_LAYERS
    same = (planned.physical_to_logical_map == current.physical_to_logical_map).all(axis=1)
    assert same.tolist() == good.tolist()


@pytest.mark.parametrize("num_redundant", [0, 8, 16])
def test_is_never_worse_than_a_new_plan(num_redundant: int) -> None:
    """Where the load has turned over and the target is out of reach, no layer is less balanced than in a new plan."""
    rng = np.random.default_rng(num_redundant)
    current = Placement.initial(4, 32, 32 + num_redundant, 8)
    for _ in range(10):
        load = rng.lognormal(0.0, 2.0, (4, 32))
        topology = Topology(8)
        planned = MovementAwarePolicy(1.0).plan(load, current, topology)
        anew = get_policy("deepseek_global").plan(load, current, topology)
        assert (balancedness(load, planned) >= balancedness(load, anew) - 1e-12).all()
        assert num_peer_moves(current, planned) <= num_peer_moves(current, anew)
        current = planned


@pytest.mark.parametrize("seed", [377, 604, 973, 1131, 1470, 2307, 2382])
def test_a_repair_that_fails_makes_nothing_worse(seed: int) -> None:
    """Where changes that seemed to help led to a heavier rank than before, what was best on the way is the plan."""
    current, load = instance(seed)
    planned = MovementAwarePolicy(1.0).plan(load, current, Topology(current.num_ranks))
    anew = get_policy("deepseek_global").plan(load, current, Topology(current.num_ranks))
    best = max(balancedness(load, current)[0], balancedness(load, anew)[0])
    assert balancedness(load, planned)[0] >= best * (1.0 - 1e-9)


@pytest.mark.parametrize("seed", [2716, 5471, 11140, 15050])
def test_a_layer_that_just_reaches_the_target_is_good(seed: int) -> None:
    """A balancedness that is the target but for rounding is enough: nothing moves."""
    current, load = instance(seed)
    assert balancedness(load, current)[0] == pytest.approx(0.8, abs=1e-12)
    assert MovementAwarePolicy(0.8).plan(load, current, Topology(current.num_ranks)) == current


@pytest.mark.parametrize(("seed", "target"), [(80, 0.98), (172, 0.98), (385, 0.98)])
def test_a_search_that_ends_above_the_limit_is_made_again(seed: int, target: float) -> None:
    """Where no single change helps any more, a stricter limit takes another way, which arrives."""
    rng = np.random.default_rng(seed)
    load = rng.lognormal(0.0, 1.0, (1, 12)).round(2)
    start = rng.permutation([*range(12), *rng.integers(0, 12, 4)])[None]
    alike = np.ones(4), np.ones(4, dtype=np.bool_), 4, 4, 2.0
    mean = mean_load(load[0], alike[0])
    once = make_layer(load[0], start[0], start[0], *alike)
    assert relieve(once, mean / target, mean / target, 64, False) > mean / target * (1.0 + 1e-6)
    rows = start.copy()
    is_good, balance = repair_layers(load, start, rows, *alike, target, 64, False, False)
    assert is_good.all()
    assert balance[0] == pytest.approx(balancedness(load, Placement(rows, 12, 4))[0])


def test_makes_no_second_replica_on_a_rank() -> None:
    """However it moves, it adds no slot whose expert the rank has already."""
    for seed in range(5):
        _, load = drifted(seed, 1.0)
        current = Placement.initial(NUM_LAYERS, NUM_LOGICAL, NUM_PHYSICAL, NUM_RANKS)
        assert num_duplicates(current) == 0
        planned = MovementAwarePolicy(0.9).plan(load, current, Topology(NUM_RANKS))
        assert balancedness(load, planned).min() >= 0.9 - 1e-9
        assert num_duplicates(planned) == 0


def test_fills_empty_slots() -> None:
    """An empty slot is used before anything is pushed out."""
    load = np.array([[4.0, 1.0, 1.0, 1.0]])
    current = Placement([[0, 1, -1, 2, 3, -1]], 4, 2)
    planned = MovementAwarePolicy(0.85).plan(load, current, Topology(2))
    assert planned.physical_to_logical_map.tolist() == [[0, 1, -1, 2, 3, 0]]


def test_prefers_experts_of_the_same_node() -> None:
    """The dearer a move between nodes, the fewer of them; the target is reached all the same."""
    cross, peer = [], []
    for price in (1.0, 2.0, 8.0):
        topology = Topology(NUM_RANKS, 2, cross_node_price=price)
        seen = []
        for seed in range(5):
            current, load = drifted(seed)
            planned = get_policy("movement_aware").plan(load, current, topology)
            assert balancedness(load, planned).min() >= 0.95 - 1e-9
            seen.append((num_cross_node_moves(current, planned, 2), num_peer_moves(current, planned)))
        cross.append(sum(between for between, _ in seen))
        peer.append(sum(moves for _, moves in seen))
    assert cross[0] > 3 * cross[1] >= 3 * cross[2]
    assert peer[0] <= peer[1] <= peer[2] < 1.5 * peer[0]


def test_keeps_groups_on_their_nodes() -> None:
    """Where the groups divide among the nodes, every expert stays on the node that DeepSeek's placement has it on."""
    topology = Topology(NUM_RANKS, num_nodes=2, num_groups=8)
    rng = np.random.default_rng(3)
    load = rng.lognormal(0.0, 1.0, (NUM_LAYERS, NUM_LOGICAL))
    first = Placement.initial(NUM_LAYERS, NUM_LOGICAL, NUM_PHYSICAL, NUM_RANKS)
    current = get_policy("deepseek").plan(load, first, topology)
    planned = MovementAwarePolicy(0.95).plan(load * rng.lognormal(0.0, 0.2, load.shape), current, topology)
    assert planned != current
    for placement in (current, planned):
        nodes = placement.physical_to_logical_map.reshape(NUM_LAYERS, 2, -1)
        assert not any(set(one) & set(other) for one, other in nodes.tolist())


@pytest.mark.parametrize("target", [0.0, -1.0, 1.01])
def test_refuses_a_target_that_cannot_be(target: float) -> None:
    """A target that is no balancedness is one clear error."""
    with pytest.raises(ConfigError, match="target_balancedness"):
        MovementAwarePolicy(target)


@pytest.mark.parametrize("price", [0.5, 1e7, float("nan")])
def test_refuses_a_price_that_cannot_be(price: float) -> None:
    """Dearer than a move that may not be at all is no price."""
    with pytest.raises(ConfigError, match="cross_node_price"):
        Topology(NUM_RANKS, 2, cross_node_price=price)


DIGEST = """
import numpy as np
from eplb_fsm.placement import Placement, Topology, get_policy
rng = np.random.default_rng(7)
placement = Placement.initial(3, 24, 30, 6)
for target in (0.9, 0.97, 1.0):
    load = rng.lognormal(0.0, 1.5, (3, 24))
    placement = get_policy("movement_aware", target).plan(load, placement, Topology(6))
    print(placement.digest)
speeds = tuple(0.1 + rng.random(10))
placement = get_policy("movement_aware", 0.97).plan(load, Placement.initial(3, 24, 30, 10), Topology(10, speeds=speeds))
print(placement.digest)
"""


@pytest.mark.parametrize(
    ("before", "environ"),
    [("", {"NUMBA_DISABLE_JIT": "1"}), ("import sys; sys.modules['numba'] = None", {})],
    ids=["interpreted", "without numba"],
)
def test_without_a_compiler_the_same_placements_come_out(before: str, environ: dict[str, str]) -> None:
    """Interpreted kernels, and DeepSeek's numpy path, give the placements of machine code, to the last slot."""

    def digests(before: str, environ: dict[str, str]) -> list[str]:
        command = [sys.executable, "-c", before + DIGEST]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **environ})
        return done.stdout.split()

    by_machine_code = digests("", {})
    assert len(set(by_machine_code)) == 4
    assert digests(before, environ) == by_machine_code


def test_a_kernel_that_cannot_be_cached_is_compiled() -> None:
    """A function without a file, whose machine code has no place to be kept, is a kernel all the same."""
    namespace: dict[str, Any] = {}
    exec("def double(number): return 2 * number", namespace)
    assert compiled(namespace["double"])(21) == 42


def doubled(array: Any) -> Any:
    """A new array."""
    return 2 * array


def double(array: Any) -> None:
    """None: the array changes."""
    for index in range(len(array)):
        array[index] *= 2


def test_a_kernel_that_borrows_makes_no_array() -> None:
    """Nobody would free what nobody counts, so it is refused; a kernel that changes what it is given is not."""
    numba = pytest.importorskip("numba")
    with pytest.raises(numba.core.errors.NumbaError, match="returning of array"):
        borrowing(doubled)(np.ones(3))
    array = np.ones(3)
    borrowing(double)(array)
    assert array.tolist() == [2.0] * 3


def test_a_compiler_without_that_option_compiles_what_borrows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numba promises the option to nobody: without it, kernels are slower and the same."""
    numba = pytest.importorskip("numba")

    def strict(**options: bool) -> Any:
        if "_nrt" in options:
            raise KeyError("Unrecognized options: {'_nrt'}")
        return numba.njit(**options)

    monkeypatch.setattr("eplb_fsm.placement.kernels.compiled._numba", SimpleNamespace(njit=strict))
    array = np.ones(3)
    borrowing(double)(array)
    assert array.tolist() == [2.0] * 3


def test_all_slots_may_be_spare() -> None:
    """The list has room for the last one, and for the place that is written beside it before it is known to be none."""
    layer = make_layer(
        np.ones(3), np.arange(6) % 3, np.arange(6) % 3, np.ones(2), np.ones(2, dtype=np.bool_), 2, 2, 1.0
    )
    sieve = make_sieve(layer)
    sieve.passes[:] = True
    interpreted = getattr(_gather, "py_func", _gather)
    assert interpreted(sieve.passes, sieve.words, sieve.spare, 6) == 6
    assert sieve.spare[:6].tolist() == [0, 1, 2, 3, 4, 5]


def test_kept_machine_code_ends_with_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change of any kernel is a change of all, since the code of one is compiled into those that call it."""
    pytest.importorskip("numba")
    (tmp_path / "doubling.py").write_text("def double(number): return 2 * number", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    double = importlib.import_module("doubling").double
    loaded = []
    for sources in ("old", "old", "new"):
        monkeypatch.setattr("eplb_fsm.placement.kernels.compiled._SOURCES", sources)
        kernel: Any = compiled(double)
        assert kernel(21) == 42
        loaded.append(len(kernel.stats.cache_hits))
    assert loaded == [0, 1, 0]


def test_is_near_the_fewest_moves() -> None:
    """On small instances it makes at most 1.3 times as many moves, in sum, as an exact solver needs."""
    ours = fewest = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        load = rng.lognormal(0.0, 0.8, (1, 10))
        topology = Topology(4)
        current = get_policy("deepseek_global").plan(load, Placement.initial(1, 10, 12, 4), topology)
        load *= rng.lognormal(0.0, 0.5, load.shape)
        planned = MovementAwarePolicy(0.85).plan(load, current, topology)
        if balancedness(load, planned)[0] < 0.85 - 1e-9:
            continue  # nobody says that it can be reached
        ours += num_peer_moves(current, planned)
        fewest += fewest_moves(load[0], current, 0.85)
    assert fewest > 10
    assert ours <= 1.3 * fewest
