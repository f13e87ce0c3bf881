"""DeepSeek's placement, refined: beside proven optima, and never worse than where the search began."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from eplb_fsm.offline.comparison import num_duplicates
from eplb_fsm.placement import Placement, Topology, get_policy
from eplb_fsm.placement.balancedness import balancedness, rank_loads
from eplb_fsm.placement.moves import num_peer_moves
from eplb_fsm.placement.policies import RefinedPolicy

INSTANCES = json.loads(Path(__file__).with_name("optima.json").read_text(encoding="utf-8"))


def test_the_published_example_of_flashlb() -> None:
    """vllm-ascend's pull request 3042: DeepSeek's method 232, FlashLB 205, the optimum is 560 / 3 + 10."""
    load = [INSTANCES[0]["load"]]
    start = Placement.initial(1, 8, 16, 8)
    heaviest = {
        name: rank_loads(load, get_policy(name).plan(np.array(load, float), start, Topology(8))).max()
        for name in ("deepseek", "deepseek_refined")
    }
    assert heaviest == {"deepseek": 232.0, "deepseek_refined": pytest.approx(560 / 3 + 10)}


@pytest.mark.parametrize("index", range(len(INSTANCES)))
def test_is_near_the_proven_optimum(index: int) -> None:
    """At least 0.99 of it; `prove_optima.py` has proven them."""
    instance = INSTANCES[index]
    load = np.array([instance["load"]], dtype=np.float64)
    start = Placement.initial(1, load.shape[1], instance["num_physical"], instance["num_ranks"])
    planned = RefinedPolicy().plan(load, start, Topology(instance["num_ranks"]))
    heaviest = rank_loads(load, planned).max()
    assert instance["optimum"] * (1.0 - 1e-9) <= heaviest <= instance["optimum"] / 0.99


@pytest.mark.parametrize(("nodes", "groups"), [(1, 1), (2, 4)])
def test_no_layer_is_less_balanced_than_deepseeks(nodes: int, groups: int) -> None:
    """Each of many layers; nodes keep their groups, and an idle layer stays as it is."""
    rng = np.random.default_rng(7)
    load = np.round(rng.lognormal(0.0, 1.6, (24, 32)) * 1000)
    load[3] = 0.0
    start, topology = Placement.initial(24, 32, 40, 8), Topology(8, nodes, groups)
    theirs = get_policy("deepseek").plan(load, start, topology)
    ours = RefinedPolicy().plan(load, start, topology)
    gain = balancedness(load, ours) - balancedness(load, theirs)
    assert gain.min() >= -1e-12
    assert gain.mean() > 0.01
    assert num_duplicates(ours) <= num_duplicates(theirs)
    assert ours.physical_to_logical_map[3].tolist() == start.physical_to_logical_map[3].tolist()
    for row in np.delete(ours.physical_to_logical_map, 3, axis=0) if nodes == 2 else ():
        on_node = [{expert // 8 for expert in half} for half in row.reshape(2, -1).tolist()]
        assert not on_node[0] & on_node[1]


def test_the_same_everywhere() -> None:
    """The digest was seen with numba and interpreted."""
    rng = np.random.default_rng(11)
    load = np.round(rng.lognormal(0.0, 1.2, (2, 12)) * 1000)
    planned = RefinedPolicy().plan(load, Placement.initial(2, 12, 16, 4), Topology(4))
    assert f"{planned.digest & (1 << 64) - 1:016x}" == "a8fd40764bce71a1"


def test_names_the_ranks_so_that_little_moves() -> None:
    """A second plan for the same load moves nothing."""
    load = np.round(np.random.default_rng(3).lognormal(0.0, 1.0, (3, 16)) * 1000)
    once = RefinedPolicy().plan(load, Placement.initial(3, 16, 24, 4), Topology(4))
    assert num_peer_moves(once, RefinedPolicy().plan(load, once, Topology(4))) == 0
