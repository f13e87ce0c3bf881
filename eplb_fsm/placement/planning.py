"""From loads to a plan: what the planning rank runs in the background."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from eplb_fsm.errors import ConfigError, LoadError, PlanError
from eplb_fsm.placement.balancedness import RankLoads, mean_over_max, rank_loads
from eplb_fsm.placement.chunks import cut_into_chunks
from eplb_fsm.placement.digest import Int64Array
from eplb_fsm.placement.epoch_budget import within_budget
from eplb_fsm.placement.placement import Placement
from eplb_fsm.placement.plan import Plan, encoded, live_digest
from eplb_fsm.placement.policies.protocol import RebalancePolicy
from eplb_fsm.placement.shapes import BankShape, Budget, check_banks, missing_commit_bytes
from eplb_fsm.placement.topology import Topology
from eplb_fsm.placement.validate import Float64Array, checked_load
from eplb_fsm.placement.worth import Costs, Thresholds, Worth, worth_of_layers

NO_GAIN = "no gain"


def make_plan(
    policy: RebalancePolicy,
    loads: Sequence[ArrayLike],
    current: Sequence[Placement],
    topology: Topology,
    shapes: Sequence[BankShape],
    budget: Budget,
    thresholds: Thresholds,
    costs: Costs | None = None,
    loads_of: RankLoads = rank_loads,
) -> Plan:
    """Plan a rebalance of all banks. Pure computation; may run in any thread or process.

    Args:
        policy: Chooses the target placement of each bank.
        loads: Load of each bank, (num_moe_layers, num_logical_experts), summed over the ranks, 0 or more.
        current: Live placement of each bank.
        topology: Ranks with their speeds, nodes and expert groups.
        shapes: Sizes of each bank's experts.
        budget: Bounds of a chunk and of the epoch.
        thresholds: When to move anything.
        costs: What the ranks measured; None: nothing was, so that no layer has to pay for its bytes.
        loads_of: How tokens are divided among replicas.

    Returns:
        A checked plan. It has a `skip_reason` and no chunks when the layers are balanced enough ("balanced"), when
        nothing would move or the gain is too small (both begin with "no gain"), when no layer gives back the time that
        it takes ("does not pay"), or when one expert is larger than the commit budget. None of the thresholds keeps
        experts on a rank of speed 0.

    Raises:
        PlanError: the policy returned a placement of another shape.
        LoadError: a load has the wrong shape, or an entry that is negative or not finite.
        BankError: `current` and `shapes` do not go together.
        ConfigError: the topology is of another number of ranks, or does not suit the policy.
    """
    check_banks(current, shapes)
    arrays = _checked_loads(loads, current, topology)
    speeds = topology.counted_speeds
    balance_now = _mean_balancedness(arrays, current, loads_of, speeds)
    is_due = any(topology.held_in_vain(placement).any() for placement in current)
    if reason := missing_commit_bytes(shapes, budget) or ("" if is_due else _balanced(balance_now, thresholds)):
        return _planned([], reason, (balance_now, balance_now), current, shapes, budget)
    wanted = [_target(policy, *pair, topology) for pair in zip(arrays, current, strict=True)]
    worth = worth_of_layers(arrays, current, wanted, shapes, thresholds, costs, topology, loads_of)
    targets = within_budget(worth, current, wanted, budget.epoch_bytes, must_pay=costs is not None)
    balance = balance_now, _mean_balancedness(arrays, targets, loads_of, speeds)
    empties = any(topology.empties(*pair).any() for pair in zip(current, targets, strict=True))
    reason = "" if empties else _too_little(balance, worth, thresholds, costs, budget)
    chunks = [
        (bank, moves)
        for bank, (placement, target, shape) in enumerate(zip(current, targets, shapes, strict=True))
        for moves in (() if reason else cut_into_chunks(placement, target, shape, budget, topology.num_nodes))
    ]
    if not chunks and not reason:
        reason = f"{NO_GAIN}: every expert is already where the policy wants it"
    return _planned(chunks, reason, balance, current, shapes, budget)


def _balanced(balance_now: float, thresholds: Thresholds) -> str:
    if thresholds.trigger_balancedness >= 1.0 or balance_now < thresholds.trigger_balancedness:
        return ""
    return f"balanced: mean balancedness {balance_now:.4f}, trigger_balancedness={thresholds.trigger_balancedness:g}"


def _too_little(
    balance: tuple[float, float], worth: Worth, thresholds: Thresholds, costs: Costs | None, budget: Budget
) -> str:
    """Why the gain of a plan is not worth its moves; empty if it is."""
    if costs is not None and worth.num_bytes.any() and not worth.pays.any():
        return (
            f"does not pay: over horizon_steps={thresholds.horizon_steps} its layers would give back "
            f"{worth.saved_s.clip(0.0).sum():.3g} s and take {worth.cost_s.sum():.3g} s, for "
            f"{worth.num_bytes.sum():.0f} bytes (a step takes {costs.step_s:.3g} s, {costs.trust:.0%} of the predicted "
            "gains came true)"
        )
    if balance[1] - balance[0] >= thresholds.min_gain:
        return ""
    reason = (
        f"{NO_GAIN}: mean balancedness {balance[0]:.4f} would become {balance[1]:.4f}, "
        f"a gain below min_gain={thresholds.min_gain:g}"
    )
    num_bytes = int(worth.num_bytes.sum())
    if num_bytes > budget.epoch_bytes > 0:
        reason += f"; all that the policy wants is {num_bytes} bytes, max_epoch_bytes={budget.epoch_bytes} allows less"
    return reason


def _planned(
    chunks: Sequence[tuple[int, Int64Array]],
    reason: str,
    balance: tuple[float, float],
    current: Sequence[Placement],
    shapes: Sequence[BankShape],
    budget: Budget,
) -> Plan:
    words = encoded(live_digest(current), len(current), chunks, reason, balance)
    # The planner's own plan goes through the same checks as everyone else's copy of it.
    return Plan.decode(words, current, shapes, budget)


def _checked_loads(loads: Sequence[ArrayLike], current: Sequence[Placement], topology: Topology) -> list[Float64Array]:
    if len(loads) != len(current):
        raise LoadError(f"{len(loads)} loads for {len(current)} banks; give one load for each bank")
    if topology.num_ranks != current[0].num_ranks:
        raise ConfigError(
            f"the topology has {topology.num_ranks} ranks, the placements {current[0].num_ranks}; make them equal"
        )
    return [
        checked_load(load, (placement.num_moe_layers, placement.num_logical_experts))
        for load, placement in zip(loads, current, strict=True)
    ]


def _target(policy: RebalancePolicy, load: Float64Array, current: Placement, topology: Topology) -> Placement:
    target = policy.plan(load, current, topology)
    if not isinstance(target, Placement) or target.shape != current.shape:
        got = target.shape if isinstance(target, Placement) else type(target).__name__
        raise PlanError(
            f"policy {policy.name!r} returned {got}, the live placement has (layers, physical, logical, "
            f"ranks) = {current.shape}; a policy must return a Placement of the live one's shape"
        )
    return target


def _mean_balancedness(
    loads: Sequence[Float64Array], placements: Sequence[Placement], loads_of: RankLoads, speeds: Float64Array
) -> float:
    layers = [
        mean_over_max(loads_of(load, placement), speeds) for load, placement in zip(loads, placements, strict=True)
    ]
    return float(np.concatenate(layers).mean())
