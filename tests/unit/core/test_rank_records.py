"""What a core holds, votes and records: at the start, between rounds, and when an epoch or rebalancing ends."""

from __future__ import annotations

import pytest
from cores import PLAN, commit, core, decide_commits, run_to, run_until, skip_epoch, transferring, vote

from eplb_fsm.core.deadlines import epoch_bound_steps
from eplb_fsm.core.rank import NEVER, Outcome, PlanTerms, RankCore
from eplb_fsm.core.reasons import AbortReason, OutcomeKind, StopReason, encode_reason
from eplb_fsm.core.states import State
from eplb_fsm.core.votes import DecisionKind

NO_WISHES = (False, False, 0, 0)


def held_of_an_epoch(it: RankCore) -> tuple[object, ...]:
    """What a core holds of the epoch that is under way."""
    return it.plan, it.chunk_idx, it.num_staged, it.posted


def test_a_new_core() -> None:
    """A new core is idle, drained and not frozen, knows no epoch, wants nothing and has nothing to report."""
    it = core()
    assert (it.state, it.drained, it.is_frozen, it.wishes) == (State.IDLE, True, False, NO_WISHES)
    assert (it.step_idx, it.round_idx, it.epoch, it.generation) == (0, 0, 0, 0)
    assert (it.epoch_start_step, it.state_entered_step, it.earliest_next_step) == (0, 0, 0)
    assert held_of_an_epoch(it) == (None, 0, 0, None)
    assert (it.last_outcome, it.stop_reason, it.stop_detail) == (None, None, "")
    assert (it.next_due, it.read_due) == (4, NEVER)


def test_a_vote_without_a_plan() -> None:
    """The vote of an idle rank says where the rank stands, and has no plan."""
    it = core(rank=3)
    it.step_idx = 4
    assert it.post_vote(9) == vote(config_fingerprint=it.fingerprint, round_idx=1, step_idx=4, pass_id=9, live_digest=5)


def test_a_vote_with_a_plan() -> None:
    """The vote of a rank that transfers has the epoch, the next chunk and the plan, and says whether it is staged."""
    it = transferring(core())
    words = {"config_fingerprint": it.fingerprint, "epoch": 1, "num_chunks": 2, "plan_digest": 77}
    place = {"step_idx": it.step_idx, "round_idx": it.round_idx}
    assert it.posted == vote(progress=4, live_digest=5, **words, **place)
    decide_commits(it, 1)
    place = {"step_idx": it.step_idx, "round_idx": it.round_idx}
    assert it.posted == vote(progress=4, live_digest=5, chunk_idx=1, num_staged=1, **words, **place)
    run_to(it, it.commit_due)
    assert it.chunk_staged(1, 1)
    assert it.num_staged == 2
    assert it.post_vote(0).progress == 5


@pytest.mark.parametrize(
    ("lag", "steps"), [(1, [4, 8, 12]), (3, [4, 8, 12]), (4, [4, 8, 12]), (5, [4, 12, 20]), (6, [4, 12, 20])]
)
def test_idle_rounds_are_posted_at_multiples_of_the_interval(lag: int, steps: list[int]) -> None:
    """The next idle round is posted at the first multiple of the interval that is not before the last was read."""
    it = core(lag=lag)
    posted = {}
    while len(posted) < len(steps) or it.posted is None:
        run_to(it, it.step_idx + 1)
        if it.posted is not None:
            posted[it.posted.round_idx] = it.posted.step_idx
    assert posted == dict(enumerate(steps, 1))


def test_the_interval_counts_from_one_start_to_the_next() -> None:
    """A request that starts an epoch early does not leave the interval as it was, and is over with that START."""
    it = core(step_interval=50)
    it.request_rebalance()
    skip_epoch(it)
    assert it.wishes == NO_WISHES
    first = it.epoch_start_step
    skip_epoch(it)
    assert it.epoch == 2
    assert first < 10
    assert 50 <= it.epoch_start_step - first <= 50 + 4 + it.lag


def test_without_an_interval_only_a_request_starts_an_epoch() -> None:
    """After an epoch that was asked for no other follows, where the interval is 0."""
    it = core()
    it.request_rebalance()
    skip_epoch(it)
    assert {decision.kind for decision in run_to(it, it.step_idx + 100)} == {DecisionKind.NONE}


def test_nothing_is_left_of_an_epoch() -> None:
    """When an epoch has ended, and when the next one starts, a rank holds no plan, no chunk and no wish to abort."""
    it = transferring(core())
    commit(it, 1)
    it.work_failed(1, AbortReason.INTEGRITY)
    run_until(it, DecisionKind.ABORT)
    assert (it.plan, it.chunk_idx, it.num_staged) == (None, 0, 0)
    assert it.wishes == (True, False, 0, 0)
    run_until(it, DecisionKind.START)
    assert (it.plan, it.chunk_idx, it.num_staged) == (None, 0, 0)
    assert it.wishes == NO_WISHES


def test_the_outcome_of_a_skipped_epoch() -> None:
    """An epoch with nothing to gain ends as SKIPPED, without a reason."""
    it = core()
    it.request_rebalance()
    skip_epoch(it)
    start = it.epoch_start_step
    assert it.last_outcome == Outcome(1, OutcomeKind.SKIPPED, None, "", start, it.step_idx, 0)


def test_the_outcome_of_an_aborted_epoch() -> None:
    """An epoch that is aborted keeps the reason, the detail, and the chunks that were committed."""
    it = transferring(core())
    start = it.epoch_start_step
    commit(it, 1)
    it.work_failed(1, AbortReason.INTEGRITY)
    run_until(it, DecisionKind.ABORT)
    assert it.last_outcome == Outcome(1, OutcomeKind.ABORTED, AbortReason.INTEGRITY, "", start, it.step_idx, 1)


def test_a_mismatch_is_told_in_the_outcome() -> None:
    """What the decision says of plans that differ stands in the outcome."""
    it = core()
    it.request_rebalance()
    run_until(it, DecisionKind.START)
    it.load_collected(1)
    it.plan_ready(1, PLAN)
    decision = run_until(it, DecisionKind.ABORT, {"plan_digest": 78})
    assert it.last_outcome is not None
    assert it.last_outcome.detail == decision.detail == "plan_digest is 77 on one rank and 78 on another"


def test_what_an_agreed_stop_leaves() -> None:
    """Ranks that stop because placements differ keep the reason and the detail, in idle and in the outcome."""
    detail = "live_digest is 5 on one rank and 6 on another"
    for it in (core(), transferring(core())):
        was_active = it.is_active
        run_until(it, DecisionKind.STOP, {"live_digest": 6})
        assert (it.state, it.stop_reason, it.stop_detail) == (State.STOPPED, StopReason.DIVERGED, detail)
        assert (it.posted, it.post_due, it.read_due) == (None, NEVER, NEVER)
        if was_active:
            outcome = Outcome(1, OutcomeKind.FAILED, StopReason.DIVERGED, detail, it.epoch_start_step, it.step_idx, 0)
            assert it.last_outcome == outcome
        else:
            assert it.last_outcome is None


@pytest.mark.parametrize(
    ("way", "reason", "detail"),
    [("give_up", StopReason.TIMEOUT, "late"), ("close", StopReason.CLOSED, "closed")],
)
@pytest.mark.parametrize("is_active", [False, True])
def test_who_leaves_casts_a_last_vote(way: str, reason: StopReason, detail: str, is_active: bool) -> None:
    """Giving up and closing stop a rank at once, with a STOP vote of its next round, and end an epoch as FAILED."""
    it = core(rank=3)
    if is_active:
        transferring(it)
    round_idx = it.round_idx
    last = it.close() if way == "close" else it.give_up(reason, detail)
    assert last is not None
    assert (last.stop, last.round_idx, last.pass_id) == (encode_reason(reason, 3), round_idx + 1, 0)
    assert (last.progress, last.num_chunks) == ((4, 2) if is_active else (0, 0))
    assert (it.state, it.stop_reason, it.stop_detail) == (State.STOPPED, reason, detail)
    assert (it.posted, it.post_due, it.read_due) == (None, NEVER, NEVER)
    failed = Outcome(1, OutcomeKind.FAILED, reason, detail, it.epoch_start_step, it.step_idx, 0)
    assert it.last_outcome == (failed if is_active else None)


@pytest.mark.parametrize("num_before", [0, 1])
def test_a_commit_that_fails_stops_the_rank(num_before: int) -> None:
    """A chunk that did not become live does not count: neither in the middle of a plan nor as its last."""
    it = transferring(core(rank=3))
    start = it.epoch_start_step
    commit(it, num_before)
    decide_commits(it, 1)
    it.step_idx = it.commit_due
    assert it.is_commit_due
    round_idx = it.round_idx
    last = it.commit_failed("cannot write")
    reason = StopReason.COMMIT_FAILED
    assert (last.stop, last.round_idx, last.pass_id) == (encode_reason(reason, 3), round_idx + 1, 0)
    assert (it.state, it.stop_reason, it.stop_detail) == (State.STOPPED, reason, "cannot write")
    assert it.last_outcome == Outcome(1, OutcomeKind.FAILED, reason, "cannot write", start, it.step_idx, num_before)


@pytest.mark.parametrize("num_before", range(4))
def test_a_commit_that_fails_in_a_long_plan(num_before: int) -> None:
    """The chunks before the one that failed count, however many there were."""
    it = core()
    it.request_rebalance()
    run_until(it, DecisionKind.START)
    it.load_collected(1)
    it.plan_ready(1, PlanTerms(digest=77, num_chunks=4, deadline_steps=40))
    run_until(it, DecisionKind.BEGIN)
    commit(it, num_before)
    decide_commits(it, 1)
    it.commit_failed("cannot write")
    assert (it.num_decided, it.is_commit_due) == (0, False)
    assert it.last_outcome is not None
    assert it.last_outcome.num_commits == num_before


def test_a_lost_transport_is_voted() -> None:
    """A rank whose transport is gone votes to stop, and all stop for its sake."""
    it = transferring(core(rank=3))
    it.transport_lost()
    assert it.wishes == (False, False, 0, encode_reason(StopReason.TRANSPORT, 3))
    decision = run_until(it, DecisionKind.STOP)
    assert (decision.reason, decision.rank) == (StopReason.TRANSPORT, 3)


def test_what_is_due_next() -> None:
    """A rank with a round out has next to read it, ``lag`` steps after it was posted; one without has next to post."""
    it = core(lag=3)
    assert it.next_due == 4
    run_to(it, 4)
    assert it.next_due == 7
    run_to(it, 7)
    assert it.next_due == 8


@pytest.mark.parametrize("committed", [True, False])
def test_a_resolved_round_leaves_a_wish_to_stop(committed: bool) -> None:
    """After a lost decision was found, whatever it was, the rank wants to stop; an ABORT is called unresolved."""
    it = transferring(core(rank=3))
    it.chunk_staged(1, 0)
    run_to(it, it.read_due)
    decision, _ = it.resolve_round(int(committed), StopReason.TIMEOUT)
    assert it.posted is None
    assert it.wishes[3] == encode_reason(StopReason.TIMEOUT, 3)
    assert decision.reason == (None if committed else AbortReason.UNRESOLVED_VOTE)
    if not committed:
        assert it.last_outcome is not None
        assert it.last_outcome.reason is AbortReason.UNRESOLVED_VOTE


def test_a_rank_may_drain_until_its_deadline() -> None:
    """At the step of its deadline an undrained rank only waits, and one step later it votes to stop."""
    it = core()
    it.drained = False
    it.step_idx = it.config.drain_deadline_steps
    assert it.post_vote(0).stop == 0
    it.step_idx += 1
    assert it.post_vote(0).stop == encode_reason(StopReason.TRANSPORT, 0)


def test_the_bound_of_an_epoch() -> None:
    """Each phase ends at a vote past its deadline, as late as the lag and the pause allow, and commits put one off."""
    collecting, computing, awaiting, transferring = 10 + 3 + 3, 20 + 3 + 4, 30 + 3, 40 + 3 + 4
    bound = collecting + computing + awaiting + transferring + (5 - 1) + 3
    assert epoch_bound_steps(core(staging_buffers=5).config, 3, 40) == bound
    rare = core(awaiting_consensus_deadline_steps=3000, idle_round_interval=1000)
    assert epoch_bound_steps(rare.config, 100, 0) == (10 + 100 + 27) + (20 + 100 + 64) + (3000 + 100 + 855) + 100
