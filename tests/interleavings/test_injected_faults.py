"""Faults at chosen ranks and steps: what they end in, that nothing else is hurt, and that the next epoch works."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
from clusters import Recorded, config, has_voted_staged, is_read, reached

from eplb_fsm.core.invariants import find_violations
from eplb_fsm.core.states import State
from eplb_fsm.simulate.cluster import SimulatedRank

Fault = Callable[[SimulatedRank], None]


def repaired(run: Recorded) -> None:
    """Take every fault back."""
    for rank in run.ranks:
        rank.faults.policy_error = ""
        rank.faults.load_change = 0
        rank.faults.failing.clear()
        rank.faults.damages_parcels = False
        rank.faults.map_error.clear()
        rank.faults.is_worker_stuck = False


def check_aborts_and_recovers(run: Recorded, reason: str, num_commits: int | None = 0) -> None:
    """The first epoch is aborted for this reason on all ranks at one step; once repaired, another one commits."""
    run.run_until_event(lambda event: bool(event.detail.get("outcome")), goal=len(run.ranks))
    run.check()
    assert run.outcomes() == [("ABORTED", reason)]
    assert len({rank.fsm.outcomes[0].end_step for rank in run.ranks}) == 1
    if num_commits is not None:
        assert [rank.fsm.outcomes[0].num_commits for rank in run.ranks] == [num_commits] * len(run.ranks)
    repaired(run)
    run.check_recovers()


@pytest.mark.parametrize("plan_source", ["lowest_rank", "every_rank"])
def test_a_policy_that_raises(plan_source: str) -> None:
    """A policy that raises on a rank aborts the epoch on all of them, and the next one commits."""
    run = Recorded(3, options=config(plan_source=plan_source))
    run.ranks[0].faults.policy_error = "no idea"
    check_aborts_and_recovers(run, "POLICY_ERROR")


def test_ranks_that_compute_different_plans() -> None:
    """A rank with another plan: all abort at the same step, both digests are named, and nothing moves."""
    run = Recorded(4, options=config(plan_source="every_rank"))
    run.ranks[2].faults.load_change = 1
    check_aborts_and_recovers(run, "PLAN_MISMATCH")
    detail = run.ranks[0].fsm.outcomes[0].detail
    digests = {event.detail["plan_digest"] for event in run.events if event.action == "PlanReady" and event.epoch == 1}
    assert len(digests) == 2
    assert all(str(digest) in detail for digest in digests)


@pytest.mark.parametrize("is_one_sided", [False, True])
def test_a_damaged_parcel(is_one_sided: bool) -> None:
    """A parcel that was damaged on its way is never committed; the epoch is aborted."""
    run = Recorded(3, is_one_sided=is_one_sided)
    run.ranks[1].faults.damages_parcels = True
    check_aborts_and_recovers(run, "INTEGRITY")


def test_a_damaged_parcel_of_a_later_chunk() -> None:
    """Chunks that were committed before the damage stay; the damaged one is not committed."""
    run = Recorded(3, options=config(staging_buffers=1))
    run.run_until_event(is_read("COMMIT", rank=1))
    run.ranks[1].faults.damages_parcels = True
    check_aborts_and_recovers(run, "INTEGRITY", num_commits=1)


def test_a_map_writer_that_cannot_prepare() -> None:
    """A map writer that raises while it prepares aborts the epoch before anything is promised."""
    run = Recorded(3)
    run.ranks[2].faults.map_error.append("prepare")
    check_aborts_and_recovers(run, "TRANSFER_ERROR")


def test_a_map_writer_that_cannot_write_ends_its_rank() -> None:
    """A map writer that raises at the commit ends its rank at once: no further forward pass there, none torn."""
    run = Recorded(3, is_lockstep=False)
    run.ranks[2].faults.map_error.append("write")
    run.run_until_event(is_read("COMMIT", rank=2))
    run.cluster.run_until(lambda: not run.ranks[2].is_alive, 50_000)
    passes = run.ranks[2].engine.num_forwards
    run.cluster.run_until(lambda: all(not rank.is_alive or rank.fsm.state.value == "STOPPED" for rank in run.ranks))
    run.check(same_outcomes=False)
    assert run.ranks[2].engine.num_forwards == passes
    assert "fails in write" in str(run.ranks[2].failure)


@pytest.mark.parametrize("state", ["COLLECTING", "COMPUTING", "TRANSFERRING"])
def test_a_stuck_worker_passes_its_deadline(state: str) -> None:
    """A worker that makes no progress ends in a deadline of its phase; once it goes on, the next epoch commits."""
    run = Recorded(3, options=config(drain_deadline_steps=10_000))
    run.run_until_event(reached([state], rank=1))
    run.ranks[1].faults.is_worker_stuck = True
    run.run_until_event(lambda event: bool(event.detail.get("outcome")), goal=3, max_actions=200_000)
    run.check()
    ((kind, reason),) = run.outcomes()
    assert kind == "ABORTED"
    assert reason.startswith("DEADLINE_")
    assert not all(rank.parts.runner.is_drained for rank in run.ranks)
    run.cluster.run_steps(150)
    assert len(run.outcomes()) == 1, "no epoch may start before all ranks are drained"
    repaired(run)
    run.check_recovers()


def test_a_worker_that_never_drains() -> None:
    """A rank that is not drained within its deadline stops rebalancing on all ranks; serving goes on."""
    run = Recorded(3)
    run.run_until_event(reached(["TRANSFERRING"], rank=1))
    run.ranks[1].faults.is_worker_stuck = True
    run.cluster.run_until(lambda: all(rank.fsm.state.value == "STOPPED" for rank in run.ranks), 400_000)
    run.cluster.run_steps(30)
    run.check()
    assert {rank.fsm.health().why_stopped.split(":")[0] for rank in run.ranks} == {"TRANSPORT"}


def test_a_dead_worker() -> None:
    """A worker that is gone aborts the epoch at once, and stops rebalancing since its jobs never end."""
    run = Recorded(3)
    run.run_until_event(reached(["TRANSFERRING"], rank=2))
    run.ranks[2].worker.is_alive = False
    run.ranks[2].faults.is_worker_stuck = True
    run.cluster.run_until(lambda: all(rank.fsm.state.value == "STOPPED" for rank in run.ranks), 400_000)
    run.cluster.run_steps(30)
    run.check()
    assert run.outcomes() == [("ABORTED", "WORKER_DIED")]
    assert sum(event.action == "WorkFailed" for event in run.events) == 1


@pytest.mark.parametrize("operation", ["begin", "all_reduce_sum", "broadcast"])
def test_a_transport_that_raises(operation: str) -> None:
    """A transport that raises on one rank aborts the epoch; its peers cannot finish, so rebalancing stops."""
    run = Recorded(3)
    run.ranks[1].faults.failing.append(operation)
    run.cluster.run_until(lambda: all(rank.fsm.state.value == "STOPPED" for rank in run.ranks), 400_000)
    run.cluster.run_steps(30)
    run.check()
    ((kind, reason),) = run.outcomes()
    assert (kind, reason) == ("ABORTED", "TRANSFER_ERROR" if operation == "begin" else "LOAD_ERROR")
    assert {rank.fsm.health().why_stopped.split(":")[0] for rank in run.ranks} == {"TRANSPORT"}


@pytest.mark.parametrize("step_idx", range(3, 60, 3))
def test_a_doubled_step_counts_for_nothing(step_idx: int) -> None:
    """With pass numbers one step() too many changes nothing, also between a promise and the commit."""
    run = Recorded(3, has_pass_ids=True)
    for doubled in range(step_idx, step_idx + 6, 2):
        run.cluster.at(1, doubled, lambda rank: setattr(rank, "doubled_steps", 1))
    run.cluster.run_until(lambda: run.ranks[0].fsm.step_idx > 150, 100_000)
    assert ("COMMITTED", "") in run.outcomes()
    run.check()


def test_a_skipped_step_heals_or_ends_rebalancing() -> None:
    """With pass numbers a missing step() is made up for; where a vote was due, DESYNC; where a commit, FailStop."""
    ends = [_skip(step_idx) for step_idx in range(3, 80)]
    assert set(ends) == {"went on", "DESYNC", "fail-stop"}


def _skip(step_idx: int) -> str:
    run = Recorded(3, has_pass_ids=True, is_lockstep=False)
    run.cluster.at(1, step_idx, lambda rank: setattr(rank, "skipped_steps", 1))
    skipped = run.ranks[1]

    def is_over() -> bool:
        # Ranks that run freely read the round of a commit at different times, but are between two epochs together.
        states = {rank.fsm.state.value for rank in run.ranks}
        is_between = states == {"IDLE"} and run.ranks[0].fsm.step_idx > 150
        return is_between or bool(skipped.failure) or run.ranks[0].fsm.state.value == "STOPPED"

    run.cluster.run_until(is_over, 100_000)
    if skipped.failure:
        assert "left out the step()" in str(skipped.failure)
        return "fail-stop"
    assert run.cluster.torn == []
    if run.ranks[0].fsm.state.value == "STOPPED":
        assert run.ranks[0].fsm.health().why_stopped.startswith("DESYNC: step_idx is ")
        return "DESYNC"
    assert ("COMMITTED", "") in run.outcomes()
    assert len({rank.parts.runner.live_digest for rank in run.ranks}) == 1
    found = find_violations(run.events, run.bound)
    assert all(text.startswith("same_decision") for text in found)  # read late, and what it decided made in time
    return "went on"


def test_a_diverged_map() -> None:
    """A rank that serves another placement is found at the next round; nothing is transferred."""
    run = Recorded(3)
    run.ranks[1].fsm._core.live_digest ^= 1
    run.cluster.run_until(lambda: all(rank.fsm.state.value == "STOPPED" for rank in run.ranks), 50_000)
    assert all(rank.fsm.health().why_stopped.startswith("DIVERGED: live_digest is ") for rank in run.ranks)
    assert not any(event.action == "ChunkStaged" for event in run.events)


@pytest.mark.parametrize("seed", range(8))
def test_an_abort_while_a_staged_vote_is_out(seed: int) -> None:
    """A rank that asks to abort or freeze right after it voted staged keeps its promise; the epoch ends after it."""
    run = Recorded(3, seed=seed, is_lockstep=False, lag=2, max_passes_ahead=seed % 3)
    run.run_until_event(has_voted_staged(seed % 3))
    rank = run.ranks[seed % 3]
    if seed % 2:
        rank.fsm.request_abort()
    else:
        rank.fsm.request_freeze()
    run.cluster.run_until(lambda: all(rank.fsm.outcomes for rank in run.ranks), 100_000)
    run.check()
    assert run.outcomes()[0] in (("ABORTED", "REQUESTED"), ("ABORTED", "FROZEN"), ("COMMITTED", ""))
    rank.fsm.request_unfreeze()
    run.check_recovers()


@pytest.mark.parametrize("step_idx", [4, 31, 36, 40, 44])
def test_a_stop_that_is_asked_for(step_idx: int) -> None:
    """request_stop() of one rank stops all at an agreed step, and serving goes on."""
    run = Recorded(3, max_passes_ahead=2)
    run.cluster.at(2, step_idx, lambda rank: rank.fsm.request_stop())
    run.cluster.run_steps(90)
    run.check()
    assert all(rank.fsm.state.value == "STOPPED" for rank in run.ranks)
    assert len({event.step_idx for event in run.events if event.detail.get("decision") == "STOP"}) == 1


@pytest.mark.parametrize("backoff", [10, 25])
def test_back_off_grows_and_is_bounded(backoff: int) -> None:
    """Each abort in a row doubles the pause before the next try, up to the bound; a commit resets it."""
    run = Recorded(2, lag=1, options=config(backoff_steps=backoff, max_backoff_steps=80, idle_round_interval=1))
    run.ranks[0].faults.policy_error = "never"
    run.cluster.run_steps(600)
    run.check()
    outcomes = run.ranks[0].fsm.outcomes
    pauses = [after.start_step - before.end_step for before, after in pairwise(outcomes)]
    wanted = [min(backoff << n, 80) for n in range(len(pauses))]
    assert len(pauses) >= 4
    assert all(want <= pause <= want + 3 for pause, want in zip(pauses, wanted, strict=True))


def test_a_stopped_rank_is_frozen_once_it_is_drained() -> None:
    """After a STOP in the middle of an epoch every rank goes on until it is drained, and then a freeze holds."""
    run = Recorded(3, seed=5)
    run.run_until_event(reached(["TRANSFERRING"], 0))
    run.ranks[1].fsm.request_stop()
    run.cluster.run_until(lambda: all(is_stopped(rank) and rank.fsm.health().is_frozen for rank in run.ranks))
    run.check()


def is_stopped(rank: SimulatedRank) -> bool:
    """Whether rebalancing has ended on a rank."""
    return rank.fsm.state is State.STOPPED
