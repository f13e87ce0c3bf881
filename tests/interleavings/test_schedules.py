"""Healthy runs under every schedule: no pass is torn, slots hold what the maps say, all ranks agree."""

from __future__ import annotations

import pytest
import torch
from clusters import ROW_BYTES, Recorded, config, shape
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]
# One example is a whole run, so making a failing one smaller would take minutes; its seed replays it as it is.
PHASES = [Phase.explicit, Phase.reuse, Phase.generate]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
@pytest.mark.parametrize("is_one_sided", [False, True])
@pytest.mark.parametrize("is_lockstep", [False, True])
def test_epochs_commit_under_any_seed(seed: int, num_ranks: int, is_one_sided: bool, is_lockstep: bool) -> None:
    """Whatever the seed, transport, number of ranks and coupling, every epoch commits everywhere alike."""
    run = Recorded(
        num_ranks,
        seed=seed,
        lag=1 + seed % 4,
        options=config(staging_buffers=1 + seed % 3),
        max_passes_ahead=seed,
        is_lockstep=is_lockstep,
        is_one_sided=is_one_sided,
    )
    run.cluster.run_steps(260)
    run.check()
    assert len(run.outcomes()) >= 2
    assert {kind for kind, _ in run.outcomes()} == {"COMMITTED"}
    assert all(outcome.num_commits >= 2 for outcome in run.ranks[0].fsm.outcomes)


@st.composite
def schedules(draw: st.DrawFn) -> Recorded:
    """A cluster with any number of ranks, lag, buffers, device delay and share of the scheduler's actions."""
    num_ranks = draw(st.integers(2, 4))
    redundant = draw(st.sampled_from([0, num_ranks]))
    commit_rows = draw(st.integers(1, 4))
    policy = draw(st.sampled_from(["rotate", "shuffle", "deepseek"]))
    run = Recorded(
        num_ranks,
        seed=draw(st.integers(0, 2**32)),
        lag=draw(st.integers(1, 4)),
        shape=shape(num_ranks, num_physical_experts=2 * num_ranks + redundant, num_moe_layers=draw(st.integers(1, 3))),
        max_passes_ahead=draw(st.integers(0, 3)),
        is_lockstep=draw(st.booleans()),
        is_one_sided=draw(st.booleans()),
        options=config(
            policy=policy,
            num_redundant_experts=redundant,
            commit_bytes=commit_rows * ROW_BYTES,
            staging_buffers=draw(st.integers(1, 3)),
            integrity=draw(st.sampled_from(["off", "wire", "slot"])),
            plan_source=draw(st.sampled_from(["lowest_rank", "every_rank"])),
            drain_deadline_steps=10_000,
            transfer_slack_steps=10_000,
        ),
    )
    run.cluster.worker_share = draw(st.sampled_from([0.1, 0.4, 0.8]))
    run.cluster.device_share = draw(st.sampled_from([0.0, 0.2]))
    return run


@given(run=schedules(), requests=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 150), st.integers(0, 3))))
@settings(max_examples=30, deadline=None, suppress_health_check=SLOW, phases=PHASES)
def test_any_schedule_and_any_requests(run: Recorded, requests: list[tuple[int, int, int]]) -> None:
    """With requests to rebalance, abort, freeze and unfreeze from any rank at any step, everything still holds."""
    asks = ("request_rebalance", "request_abort", "request_freeze", "request_unfreeze")
    for rank, step, kind in requests:
        run.cluster.at(rank % len(run.ranks), step, lambda it, ask=asks[kind]: getattr(it.fsm, ask)())
    run.cluster.run_steps(160)
    for rank in run.ranks:
        rank.fsm.request_unfreeze()
    run.check()
    run.check_recovers("COMMITTED", "SKIPPED")


@pytest.mark.parametrize("is_lockstep", [False, True])
def test_one_seed_is_one_run(is_lockstep: bool) -> None:
    """The same seed gives the same events; another seed gives others."""

    def events(seed: int) -> list[object]:
        run = Recorded(3, seed=seed, is_lockstep=is_lockstep, max_passes_ahead=1, options=config(max_slowdown=0.03))
        run.cluster.run_steps(120)
        return [*run.events]

    assert events(7) == events(7)
    assert events(7) != events(8)


def test_rounds_that_come_late_are_counted_and_change_nothing() -> None:
    """A rank that gets its rounds late waits for them, counts them, and commits with the others."""
    run = Recorded(3, seed=5, is_lockstep=False)
    run.cluster.run_steps(20)
    slow = run.ranks[1]
    for _ in range(30):
        slow.channel.held_from = slow.fsm._core.round_idx
        for _ in range(40):
            run.cluster.act()
        slow.channel.held_from = 1 << 62
        run.cluster.run_steps(4)
    run.check()
    assert slow.fsm.late_rounds > 5
    assert {kind for kind, _ in run.outcomes()} == {"COMMITTED"}


def test_more_lag_is_adopted_by_all_ranks_while_idle() -> None:
    """A rank that asks for more lag gets it on all ranks at once, between epochs."""
    run = Recorded(3, seed=2, lag=1)
    run.ranks[2].fsm._core.wanted_lag = 4
    run.cluster.run_steps(150)
    run.check()
    assert [rank.fsm.health().lag for rank in run.ranks] == [4, 4, 4]
    assert run.outcomes()


@pytest.mark.parametrize("seed", range(6))
def test_a_freeze_ends_the_epoch_and_holds(seed: int) -> None:
    """A freeze asked for by one rank at any time aborts the epoch, drains all ranks, and holds until taken back."""
    run = Recorded(3, seed=seed, is_lockstep=False, max_passes_ahead=1)
    run.cluster.run_steps(28 + 3 * seed)
    run.ranks[seed % 3].fsm.request_freeze()
    run.cluster.run_until(lambda: all(rank.fsm.health().is_frozen for rank in run.ranks), 200_000)
    assert all(rank.fsm.state.value == "IDLE" and rank.parts.runner.is_drained for rank in run.ranks)
    before = [rank.fsm.outcomes for rank in run.ranks]
    digests = {rank.parts.runner.live_digest for rank in run.ranks}
    run.cluster.run_steps(100)
    assert [rank.fsm.outcomes for rank in run.ranks] == before
    assert {rank.parts.runner.live_digest for rank in run.ranks} == digests
    run.ranks[seed % 3].fsm.request_unfreeze()
    run.check_recovers()


@pytest.mark.parametrize("is_held", [False, True])
def test_planning_breathes(is_held: bool) -> None:
    """Between the pieces of planning the worker waits as long as a step takes, here for ever or not at all."""
    run = Recorded(2, options=config(max_slowdown=0.0))
    run.ranks[0].parts.runner._jobs.pace.set_breath(1e9 if is_held else 0.0)
    run.cluster.run_until(lambda: bool(run.outcomes()), 50_000)
    assert any(event.action == "PlanReady" for event in run.events) != is_held


def test_health_says_what_an_epoch_gained() -> None:
    """Every rank knows what the last committed epoch promised, and, once the next plan is made, what came of it."""
    run = Recorded(3)
    gains = [rank.fsm.health().last_gain for rank in run.ranks]
    assert gains == [None] * 3
    run.cluster.run_until(lambda: sum(kind == "COMMITTED" for kind, _ in run.outcomes()) >= 2, 100_000)
    known = [rank.fsm.health().last_gain for rank in run.ranks]
    assert all(gain is not None and gain.epoch >= 1 for gain in known)
    assert all(gain.measured is None for gain in known if gain is not None)  # without load nothing is seen
    while not all(rank.fsm.health().last_gain.measured is not None for rank in run.ranks):
        run.cluster.act()
        for rank in run.ranks:
            for layer in range(2):
                rank.fsm.record(layer, torch.tensor([[0], [0], [1]]))
    first, *others = [rank.fsm.health().last_gain for rank in run.ranks]
    assert first.unmoved is not None
    assert others == [first, first]
