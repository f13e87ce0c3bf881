"""A group of bare cores, whatever happens to them: the invariants hold, and records say what was done."""

from __future__ import annotations

from group import MAX_LAG, SCRIPTS, SETUPS, Group, Setup, play
from hypothesis import example, given
from hypothesis import strategies as st

from eplb_fsm.core.deadlines import epoch_bound_steps
from eplb_fsm.core.invariants import Forward, find_violations, no_torn_forward
from eplb_fsm.core.reasons import OutcomeKind, StopReason
from eplb_fsm.core.states import State

Script = list[tuple[str, tuple[int, ...], int]]


def broken_in(group: Group, setup: Setup, lag: int = MAX_LAG) -> list[str]:
    """What the events of a group break, where the bound of an epoch is that for the largest lag it may have."""
    return find_violations(group.events, lambda deadline: epoch_bound_steps(setup.config, lag, deadline))


@given(setup=SETUPS, script=SCRIPTS)
def test_invariants_hold_whatever_happens(setup: Setup, script: Script) -> None:
    """No script of wishes, failures, hanging work, lost rounds and closed ranks breaks an invariant over events."""
    group = play(setup, script)
    assert broken_in(group, setup) == []
    assert group.results_of_another_epoch == 0


@given(setup=SETUPS, script=SCRIPTS)
def test_outcomes_count_what_is_live(setup: Setup, script: Script) -> None:
    """The chunks that a rank made live are those that its outcomes count and those of the epoch under way."""
    for rank in play(setup, script).ranks:
        under_way = rank.core.chunk_idx if rank.core.is_active else 0
        assert rank.core.live_digest == rank.num_commits + under_way


@given(setup=SETUPS, script=SCRIPTS)
def test_ranks_that_still_vote_serve_the_same(setup: Setup, script: Script) -> None:
    """At the end all ranks that have not stopped serve one placement, in one epoch, and are due at the same step."""
    up = [rank.core for rank in play(setup, script).ranks if rank.is_up]
    assert no_torn_forward([Forward(core.rank, core.step_idx, core.live_digest) for core in up]) == []
    assert len({(core.epoch, core.round_idx, core.next_due, core.is_frozen) for core in up}) <= 1


@given(setup=SETUPS, script=SCRIPTS)
def test_one_rank_that_stops_stops_all(setup: Setup, script: Script) -> None:
    """Some steps after whatever has happened either all ranks have stopped, each with a reason, or none has."""
    cores = [rank.core for rank in play(setup, script).ranks]
    assert len({core.stop_reason is None for core in cores}) == 1


@given(setup=SETUPS, failing=st.integers(0, 2), num_before=st.integers(0, 2))
def test_a_commit_that_fails_ends_as_failed(setup: Setup, failing: int, num_before: int) -> None:
    """The outcome of a rank whose commit raises is FAILED and does not count that chunk, also if it was the last."""
    setup = setup._replace(num_chunks=max(setup.num_chunks, num_before + 1))
    group = Group(setup)
    rank = group.ranks[failing % setup.num_ranks]
    rank.core.request_rebalance()
    for _ in range(40):
        rank.fails_next_commit = rank.core.live_digest == num_before
        group.step()
    outcome = rank.core.last_outcome
    assert outcome is not None
    assert (outcome.kind, outcome.reason) == (OutcomeKind.FAILED, StopReason.COMMIT_FAILED)
    assert rank.num_commits == rank.core.live_digest == num_before
    assert broken_in(group, setup) == [f"commit_cannot_fail: rank {rank.core.rank} step {outcome.end_step}: no"]


DELAYS = st.lists(st.tuples(*[st.integers(0, 16)] * 3), min_size=3, max_size=3)
"""Of the three jobs of an epoch, by rank."""


@example(lag=3, delays=[(6, 5, 10), (6, 5, 7), (0, 0, 0)])  # the longest that is known for this lag
@given(lag=st.integers(1, 6), delays=DELAYS)
def test_an_epoch_ends_in_its_bound(lag: int, delays: list[tuple[int, ...]]) -> None:
    """However long each job of each rank takes, the first epoch ends within its bound, with one outcome on all."""
    setup = Setup(3, lag, num_chunks=1)
    group = Group(setup)
    for rank, its in zip(group.ranks, delays, strict=True):
        rank.delays = dict(zip((State.COLLECTING, State.COMPUTING, State.TRANSFERRING), its, strict=True))
    group.happen("request_rebalance", 0)
    for _ in range(80):
        group.step()
    assert broken_in(group, setup, lag) == []
    assert len({rank.core.last_outcome for rank in group.ranks}) == 1
