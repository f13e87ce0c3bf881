"""What each kind of fault does to a rank of a simulated cluster."""

from __future__ import annotations

from collections.abc import Callable

from eplb_fsm.simulate.cluster import SimulatedCluster, SimulatedRank
from eplb_fsm.simulate.scenario import FaultKind

_NO_ROUND = 1 << 62


def strike(kind: FaultKind, cluster: SimulatedCluster, rank: SimulatedRank) -> None:
    """Let a fault happen to a rank, now."""
    if kind is FaultKind.CRASH:
        cluster.crash(rank.rank)
    elif kind is FaultKind.CLOSE:
        cluster.close(rank.rank)
    else:
        _STRIKES[kind](rank)


def _hold_rounds(rank: SimulatedRank) -> None:
    """Hold the round that is out, or the next one, and all after it."""
    rank.channel.held_from = rank.parts.rounds.journal.read_round + 1


def _kill_worker(rank: SimulatedRank) -> None:
    rank.worker.is_alive = False
    rank.faults.is_worker_stuck = True


def _lose_transport(rank: SimulatedRank) -> None:
    rank.faults.is_transport_lost = True
    rank.faults.failing += ["begin", "all_reduce_sum", "broadcast"]


def _skip_step(rank: SimulatedRank) -> None:
    rank.skipped_steps += 1


def _double_step(rank: SimulatedRank) -> None:
    rank.doubled_steps += 1


_STRIKES: dict[FaultKind, Callable[[SimulatedRank], object]] = {
    FaultKind.CHANNEL_LOST: lambda it: setattr(it.channel, "is_lost", True),
    FaultKind.ROUNDS_HELD: _hold_rounds,
    FaultKind.ROUNDS_DELIVERED: lambda it: setattr(it.channel, "held_from", _NO_ROUND),
    FaultKind.POLICY_ERROR: lambda it: setattr(it.faults, "policy_error", "the simulated policy fails"),
    FaultKind.OTHER_PLAN: lambda it: setattr(it.faults, "load_change", 1),
    FaultKind.PLANNER_STUCK: lambda it: setattr(it.faults, "is_planner_stuck", True),
    FaultKind.PLANNER_RETURNS: lambda it: setattr(it.faults, "is_planner_stuck", False),
    FaultKind.WORKER_STUCK: lambda it: setattr(it.faults, "is_worker_stuck", True),
    FaultKind.WORKER_GOES_ON: lambda it: setattr(it.faults, "is_worker_stuck", not it.worker.is_alive),
    FaultKind.WORKER_DEAD: _kill_worker,
    FaultKind.ROW_DAMAGED: lambda it: setattr(it.faults, "damages_parcels", True),
    FaultKind.TRANSFER_ERROR: lambda it: it.faults.failing.append("begin"),
    FaultKind.LOAD_ERROR: lambda it: it.faults.failing.append("all_reduce_sum"),
    FaultKind.TRANSPORT_LOST: _lose_transport,
    FaultKind.PREPARE_ERROR: lambda it: it.faults.map_error.append("prepare"),
    FaultKind.WRITE_ERROR: lambda it: it.faults.map_error.append("write"),
    FaultKind.FREEZE: lambda it: it.fsm.request_freeze(),
    FaultKind.UNFREEZE: lambda it: it.fsm.request_unfreeze(),
    FaultKind.ABORT: lambda it: it.fsm.request_abort(),
    FaultKind.STOP: lambda it: it.fsm.request_stop(),
    FaultKind.STEP_SKIPPED: _skip_step,
    FaultKind.STEP_DOUBLED: _double_step,
}


def repair(rank: SimulatedRank) -> None:
    """Take back what lasts for one epoch: its next one goes well."""
    faults = rank.faults
    faults.policy_error = ""
    faults.load_change = 0
    faults.damages_parcels = False
    faults.map_error.clear()
    if not faults.is_transport_lost:
        faults.failing.clear()
