"""Votes that do not arrive, ranks that leave or die: what is adopted, what is aborted, and who must not serve on."""

from __future__ import annotations

import pytest
from clusters import Recorded, config, has_voted_staged, is_read, reached

from eplb_fsm.errors import ConsensusTimeout

ALL_OVER = 400_000


def run_until_over(run: Recorded) -> None:
    """Run until every rank has stopped rebalancing or must not serve on, then some passes more."""
    run.cluster.run_until(lambda: all(rank.fsm.state.value == "STOPPED" for rank in run.cluster.living), ALL_OVER)
    run.cluster.run_steps(10)
    run.check(same_outcomes=False)


def lost_in_window(seed: int, *, num_ranks: int = 3, **how: object) -> Recorded:
    """A cluster whose rank 1 has just voted staged and lost its channel."""
    run = Recorded(num_ranks, seed=seed, is_lockstep=False, **how)
    run.run_until_event(has_voted_staged(1))
    run.ranks[1].channel.is_lost = True
    return run


@pytest.mark.parametrize("state", ["IDLE", "COLLECTING", "COMPUTING", "AWAITING_CONSENSUS"])
@pytest.mark.parametrize("seed", range(2))
def test_a_channel_lost_outside_the_window(state: str, seed: int) -> None:
    """A rank whose channel is cut where nothing can commit stops; so do the others, and all serve on."""
    run = Recorded(3, seed=seed, is_lockstep=False)
    run.run_until_event(reached([state], rank=1))
    run.ranks[1].channel.is_lost = True
    run_until_over(run)
    assert len(run.cluster.living) == 3
    assert not any(event.detail.get("decision") == "COMMIT" for event in run.events)
    assert run.ranks[1].fsm.health().why_stopped.startswith("TRANSPORT")


@pytest.mark.parametrize("seed", range(12))
def test_a_channel_lost_inside_the_window(seed: int) -> None:
    """The lost decision is found over the marks: what another rank read is adopted, and nobody ends torn."""
    run = lost_in_window(seed, lag=1 + seed % 3, max_passes_ahead=seed % 3)
    run_until_over(run)
    assert len(run.cluster.living) == 3
    resolved = [event for event in run.events if event.action == "ResolveRound"]
    assert resolved
    assert len({rank.parts.runner.live_digest for rank in run.ranks}) == 1


def test_both_ways_of_resolving_are_reached() -> None:
    """Over some seeds a lost decision is once a COMMIT that is adopted and once an ABORT."""
    found = set()
    for seed in range(12):
        run = lost_in_window(seed, lag=1 + seed % 3)
        run_until_over(run)
        found |= {event.detail["decision"] for event in run.events if event.action == "ResolveRound"}
    assert found == {"COMMIT", "ABORT"}


@pytest.mark.parametrize("seed", range(4))
def test_all_ranks_give_up(seed: int) -> None:
    """When every rank loses the decision that it promised, giving up is binding on all, so they abort and serve on."""
    run = Recorded(3, seed=seed, lag=3)
    run.cluster.worker_share = 0.95
    event = run.run_until_event(has_voted_staged(0))
    for rank in run.ranks:
        rank.channel.held_from = event.round_idx
    run_until_over(run)
    votes = [e.detail["progress"] for e in run.events if e.action == "PostVote" and e.round_idx == event.round_idx]
    assert votes == [5, 5, 5], "choose a share of the worker that has all ranks staged at once"
    assert len(run.cluster.living) == 3
    assert not any(event.detail.get("decision") == "COMMIT" for event in run.events)
    assert run.outcomes() == [("ABORTED", "UNRESOLVED_VOTE")]


@pytest.mark.parametrize("seed", range(4))
def test_a_silent_rank_keeps_the_window_open(seed: int) -> None:
    """A rank that died without a word in the round leaves a promise open: who holds it stops serving and names it."""
    run = Recorded(2, seed=seed, is_lockstep=False, options=config(resolve_timeout_s=8.0))
    event = run.run_until_event(has_voted_staged(0))
    if not any(e.action == "PostVote" and e.rank == 1 and e.round_idx == event.round_idx for e in run.events):
        run.cluster.crash(1)
        run.cluster.run_until(lambda: not run.ranks[0].is_alive, ALL_OVER)
        run.check(same_outcomes=False)
        failure = run.ranks[0].failure
        assert isinstance(failure, ConsensusTimeout)
        assert failure.ranks == (1,)
    else:
        run.ranks[0].channel.held_from = event.round_idx
        run.ranks[0].board.read = lambda: [None, None]  # type: ignore[method-assign]  # its view of the store is gone
        run.cluster.run_until(lambda: not run.ranks[0].is_alive, ALL_OVER)
        assert isinstance(run.ranks[0].failure, ConsensusTimeout)


@pytest.mark.parametrize("seed", range(16))
def test_a_rank_that_dies_at_any_point(seed: int) -> None:
    """No survivor commits a chunk that the dead rank had not voted for, and survivors that serve on serve alike."""
    run = Recorded(3, seed=seed, is_lockstep=False, lag=1 + seed % 3, max_passes_ahead=seed % 2)
    run.cluster.run_until(lambda: run.ranks[0].fsm.step_idx > 29, 100_000)
    for _ in range(30 * seed + 1):
        run.cluster.act()
    run.cluster.crash(2)
    voted = {e.round_idx for e in run.events if e.rank == 2 and e.action == "PostVote" and e.detail["progress"] == 5}
    run_until_over(run)
    committed = {event.round_idx for event in run.events if event.detail.get("decision") == "COMMIT"}
    assert committed <= voted
    assert len({rank.parts.runner.live_digest for rank in run.cluster.living}) <= 1
    for rank in run.ranks:
        assert rank.is_alive or rank.rank == 2 or 2 in rank.failure.ranks  # type: ignore[union-attr]


@pytest.mark.parametrize("seed", range(12))
def test_a_rank_that_is_closed_at_any_point(seed: int) -> None:
    """When one rank is closed and serves no more, the others stop with the maps they have, and none must end."""
    run = Recorded(3, seed=seed, is_lockstep=False, lag=1 + seed % 3, options=config(staging_buffers=1 + seed % 3))
    run.cluster.run_until(lambda: run.ranks[0].fsm.step_idx > 29, 100_000)
    for _ in range(40 * seed + 1):
        run.cluster.act()
    run.cluster.close(2)
    run_until_over(run)
    assert len(run.cluster.living) == 2
    assert len({rank.parts.runner.live_digest for rank in run.cluster.living}) == 1


@pytest.mark.parametrize("seed", range(4))
def test_a_rank_that_is_closed_inside_the_window(seed: int) -> None:
    """A rank that leaves between its promise and the decision does not drag the others with it."""
    run = Recorded(3, seed=seed, is_lockstep=False, options=config(staging_buffers=3))
    run.run_until_event(has_voted_staged(2))
    run.cluster.close(2)
    run_until_over(run)
    assert len(run.cluster.living) == 2
    assert [event.detail["outcome"] for event in run.events if event.action == "Close"] == ["FAILED"]


@pytest.mark.parametrize("seed", range(4))
def test_a_rank_that_hangs_in_its_forward_pass(seed: int) -> None:
    """A rank that posts nothing more for long makes the others give up; when it comes back it follows, untorn."""
    run = Recorded(3, seed=seed, is_lockstep=False)
    run.run_until_event(is_read("START", rank=0))
    living = run.cluster.living
    run.cluster.living = living[:2]
    run.cluster.run_until(lambda: all(rank.fsm.state.value == "STOPPED" for rank in living[:2]), ALL_OVER)
    run.cluster.living = living
    run_until_over(run)
    assert len(run.cluster.living) == 3
    assert len({rank.parts.runner.live_digest for rank in run.ranks}) == 1
