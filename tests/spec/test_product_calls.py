"""The calls that the state graphs are made of are those that the product makes."""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from recorded_calls import METHODS, recorded_calls
from replayed_rank import ReplayedRank

import eplb_fsm
from eplb_fsm.config import RebalanceConfig
from eplb_fsm.observe.events import Observer
from eplb_fsm.placement import Placement, Topology, register_policy
from eplb_fsm.placement.policies import policy_names
from eplb_fsm.simulate.cluster import SimulatedCluster, SimulatedRank
from eplb_fsm.simulate.engine import Shape

torch.set_num_threads(1)
PACKAGE = Path(eplb_fsm.__file__).parent
MAX_ACTIONS = 100_000
CALLERS = ("fsm.py", "runtime/driver.py")

NOT_REPLAYED = {"wanted_lag"}
"""What the driver writes and the replay leaves alone: a setup of the spec has one lag. (That more lag is adopted on all
ranks at once is tested in tests/interleavings.)"""


class _Turn:
    """Hands every rank the experts of the next one."""

    name = "turn"
    deterministic = True

    def plan(self, load: np.ndarray, current: Placement, topology: Topology) -> Placement:
        rows = np.roll(current.physical_to_logical_map, current.num_local_physical_experts, axis=1)
        return Placement(rows, current.num_logical_experts, current.num_ranks)


if _Turn.name not in policy_names():
    register_policy(_Turn())


def used_names(source: Path, owner: Callable[[ast.expr], bool], context: type[ast.expr_context]) -> set[str]:
    """The attributes of some object that a source file reads or writes."""
    nodes = ast.walk(ast.parse(source.read_text(encoding="utf-8")))
    return {n.attr for n in nodes if isinstance(n, ast.Attribute) and owner(n.value) and isinstance(n.ctx, context)}


def is_core(owner: ast.expr) -> bool:
    """Whether an expression is what the product calls its core."""
    return ast.unparse(owner) in {"core", "self.core", "self._core", "self._driver.core"}


def product_names(context: type[ast.expr_context]) -> set[str]:
    """What the product reads, or writes, of its cores."""
    return set().union(*(used_names(PACKAGE / caller, is_core, context) for caller in CALLERS))


def make_cluster(seed: int, observers: Callable[[int], Sequence[Observer]] = lambda rank: ()) -> SimulatedCluster:
    """Three ranks that start an epoch every few steps."""
    config = RebalanceConfig(
        policy=_Turn.name,
        step_interval=10,
        idle_round_interval=5,
        window_size=10,
        min_gain=0.0,
        horizon_steps=0,
        cooldown_steps=3,
        max_slowdown=0.0,
        backoff_steps=5,
        drain_deadline_steps=30,
    )
    shape = Shape(num_moe_layers=2, num_logical_experts=6, num_physical_experts=6)
    return SimulatedCluster(3, config, seed=seed, shape=shape, has_pass_ids=True, observers=observers)


def is_in_window(rank: SimulatedRank) -> Callable[[], bool]:
    """Whether a rank has promised a commit that it has not read yet."""
    return lambda: rank.fsm._core.in_window


def all_requests(cluster: SimulatedCluster) -> None:
    """Whatever an engine can ask for."""
    for step_idx, ask in enumerate(
        ("request_rebalance", "request_abort", "request_freeze", "request_unfreeze", "request_stop"), 12
    ):
        cluster.at(0, 3 * step_idx, lambda it, ask=ask: getattr(it.fsm, ask)())
    cluster.run_steps(80)


def lost_in_window(cluster: SimulatedCluster) -> None:
    """A rank that has promised a commit loses its channel."""
    cluster.run_until(is_in_window(cluster.ranks[1]), MAX_ACTIONS)
    cluster.ranks[1].channel.is_lost = True
    cluster.run_until(lambda: cluster.ranks[1].fsm.state.value == "STOPPED", MAX_ACTIONS)


def commit_that_fails(cluster: SimulatedCluster) -> None:
    """The engine leaves out the step() in which a rank would make live what a round has decided."""
    rank, core = cluster.ranks[1], cluster.ranks[1].fsm._core
    cluster.run_until(lambda: core.num_decided > 0 and core.commit_due == rank.fsm.step_idx + 1, MAX_ACTIONS)
    rank.skipped_steps = 1
    cluster.run_until(lambda: not rank.is_alive, MAX_ACTIONS)


def lost_transport(cluster: SimulatedCluster) -> None:
    """The transfer group of a rank breaks."""
    cluster.ranks[1].faults.is_transport_lost = True
    cluster.ranks[1].faults.failing += ["begin", "all_reduce_sum", "broadcast"]
    cluster.run_steps(60)


def failing_policy(cluster: SimulatedCluster) -> None:
    """A policy raises, and then a rank is closed."""
    cluster.ranks[0].faults.policy_error = "no idea"
    cluster.run_steps(40)
    cluster.close(2)


CASES = (all_requests, lost_in_window, commit_that_fails, lost_transport, failing_policy)


def test_the_product_calls_what_is_replayed() -> None:
    """Seeds of the simulated cluster call every public method of a core, and nobody but fsm and driver does."""
    with recorded_calls() as called:
        for seed, case in enumerate(CASES):
            case(make_cluster(seed))
    assert called == METHODS
    assert product_names(ast.Load) & METHODS == METHODS
    others = [path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).as_posix() not in CALLERS]
    assert not [path for path in others if used_names(path, is_core, ast.Load) & METHODS]


def test_the_replay_writes_what_the_driver_writes() -> None:
    """The attributes of a core that the product writes itself are those that the replay writes."""
    source = Path(ReplayedRank.__init__.__code__.co_filename)
    in_replay = used_names(source, is_core, ast.Store)
    assert product_names(ast.Store) - NOT_REPLAYED == in_replay
    assert not NOT_REPLAYED & in_replay


def test_only_what_was_called_is_recorded() -> None:
    """The record of calls has the methods that were called, and they still do what they do."""
    core = make_cluster(0).ranks[0].fsm._core
    with recorded_calls() as called:
        core.request_rebalance()
        vote = core.post_vote(0)
    assert called == {"request_rebalance", "post_vote"}
    assert vote.request == 1
