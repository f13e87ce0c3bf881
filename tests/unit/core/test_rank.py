"""The actions of one rank: deadlines vote, stale results are dropped, back-off, START, lag, the window."""

from __future__ import annotations

import pytest
from cores import PLAN, commit, core, decide_commits, run_to, run_until, skip_epoch, transferring

from eplb_fsm.core.deadlines import epoch_bound_steps
from eplb_fsm.core.rank import NEVER, PlanTerms, RankCore
from eplb_fsm.core.reasons import AbortReason, OutcomeKind, StopReason, decode_reason, encode_reason
from eplb_fsm.core.states import State
from eplb_fsm.core.votes import DecisionKind, tally_votes


def test_a_whole_epoch() -> None:
    """START, BEGIN and one COMMIT for each chunk, each read ``lag`` steps after it was voted, end in COMMITTED."""
    it = transferring(core())
    commit(it, PLAN.num_chunks)
    outcome = it.last_outcome
    assert outcome is not None
    assert (outcome.kind, outcome.num_commits, outcome.epoch) == (OutcomeKind.COMMITTED, 2, 1)
    assert it.state is State.IDLE


@pytest.mark.parametrize("lag", [1, 2, 3])
@pytest.mark.parametrize("slower", [False, True])
def test_one_round_commits_what_all_have_staged(lag: int, slower: bool) -> None:
    """One chunk becomes live at each step after the reading, and no more than the slowest rank has staged."""
    it = transferring(core(lag=lag), num_chunks=5)
    for chunk_idx in range(4):
        it.chunk_staged(1, chunk_idx)
    num_chunks = 3 if slower else 4
    decision = run_until(it, DecisionKind.COMMIT, *([{"num_staged": 3}] if slower else []))
    assert decision.num_chunks == num_chunks
    read_step = it.step_idx
    posted = it.posted
    for n in range(num_chunks):
        assert (it.chunk_idx, it.live_digest) == (n, 5 + n)
        read = run_to(it, read_step + n + 1, *([{"progress": 4}] if slower else []))
        assert not read or n == num_chunks - 1  # all is live when the next round is read
        posted = posted or it.posted
    assert (it.chunk_idx, it.live_digest, it.num_decided) == (num_chunks, 5 + num_chunks, 0)
    assert posted is not None
    assert posted.step_idx == read_step + max(0, num_chunks - lag)
    assert (posted.chunk_idx, posted.num_staged, posted.progress) == (num_chunks, 4, 5 if slower else 4)


def test_no_round_follows_when_the_last_chunk_is_decided() -> None:
    """Once all chunks are decided the next round is one of an idle rank, after the last of them is live."""
    it = transferring(core(lag=3))
    decide_commits(it, 2)
    for _ in range(2):
        assert (it.posted, it.post_due, it.next_due) == (None, NEVER, it.step_idx + 1)
        run_to(it, it.step_idx + 1)
    assert it.state is State.IDLE
    assert (it.last_outcome.num_commits if it.last_outcome else 0) == 2
    assert it.post_due in range(it.step_idx, it.step_idx + it.idle_interval)


def test_in_the_synchronous_mode_all_become_live_at_once() -> None:
    """Without lag no forward pass lies between two commits of a round."""
    it = transferring(core(lag=0), num_chunks=3)
    decide_commits(it, 2)
    step_idx = it.step_idx
    assert it.post_due == NEVER
    while it.is_commit_due:
        it.commit_chunk(it.live_digest + 1)
    assert (it.chunk_idx, it.post_due) == (2, step_idx)


@pytest.mark.parametrize("lag", [1, 2, 5])
@pytest.mark.parametrize("state", ["COLLECTING", "COMPUTING", "AWAITING_CONSENSUS", "TRANSFERRING"])
def test_a_deadline_votes_and_does_not_act(lag: int, state: str) -> None:
    """Past its deadline a rank only votes to abort; the epoch ends when that is read, within the written bound."""
    it = core(lag=lag)
    it.request_rebalance()
    start = run_until(it, DecisionKind.START)
    assert start.kind is DecisionKind.START
    if state in ("COMPUTING", "AWAITING_CONSENSUS", "TRANSFERRING"):
        it.load_collected(1)
    if state in ("AWAITING_CONSENSUS", "TRANSFERRING"):
        it.plan_ready(1, PLAN)
    peers: list[dict[str, int]] = []
    if state == "AWAITING_CONSENSUS":
        peers = [{"progress": 1}]  # one that is never ready
    elif state == "TRANSFERRING":
        run_until(it, DecisionKind.BEGIN)
    while it.posted is None or not it.posted.abort:
        run_to(it, it.step_idx + 1, *peers)
    assert it.state.value == state
    assert decode_reason(it.posted.abort) == (AbortReason[f"DEADLINE_{state}"], 0)
    run_until(it, DecisionKind.ABORT, *peers, within=lag)
    outcome = it.last_outcome
    assert outcome is not None
    assert outcome.end_step - outcome.start_step <= epoch_bound_steps(it.config, lag, PLAN.deadline_steps)


@pytest.mark.parametrize("lag", range(1, 9))
def test_late_phases_never_pass_the_bound(lag: int) -> None:
    """Phases that each take as long as they may stay within the written bound, and come close to it."""
    it = core(lag=lag)
    it.request_rebalance()
    run_until(it, DecisionKind.START)
    run_past(it, it.config.collecting_deadline_steps)
    it.load_collected(1)
    it.post_vote(0)
    run_past(it, it.config.computing_deadline_steps)
    it.plan_ready(1, PLAN)
    it.post_vote(0)
    gap = lag + it.idle_interval
    while it.step_idx - it.state_entered_step < it.config.awaiting_consensus_deadline_steps - gap:
        run_to(it, it.step_idx + 1, {"progress": 1})
    run_until(it, DecisionKind.BEGIN)
    run_until(it, DecisionKind.ABORT)
    outcome = it.last_outcome
    assert outcome is not None
    bound = epoch_bound_steps(it.config, lag, PLAN.deadline_steps)
    assert bound - 6 * gap - it.config.staging_buffers <= outcome.end_step - outcome.start_step <= bound


@pytest.mark.parametrize("buffers", [1, 2, 4, 7])
@pytest.mark.parametrize("lag", [1, 2, 3])
def test_commits_put_an_abort_off_by_no_more_than_buffers(lag: int, buffers: int) -> None:
    """An epoch whose rounds commit a chunk for each buffer stays within its bound, whatever its deadline."""
    for deadline in range(12):
        it = core(lag=lag, staging_buffers=buffers, collecting_deadline_steps=1, computing_deadline_steps=1)
        it.request_rebalance()
        run_until(it, DecisionKind.START)
        it.load_collected(1)
        it.plan_ready(1, PlanTerms(77, num_chunks=1000, deadline_steps=deadline))
        run_until(it, DecisionKind.BEGIN)
        begin = it.step_idx
        while it.is_active:
            it.chunk_staged(1, it.chunk_idx + it.num_decided + buffers - 1)
            run_to(it, it.step_idx + 1)
        outcome = it.last_outcome
        assert outcome is not None
        assert outcome.reason is AbortReason.DEADLINE_TRANSFERRING
        assert outcome.end_step - begin <= deadline + 2 * lag + buffers - 1


def run_past(it: RankCore, deadline: int) -> None:
    """Step to the first posting past the deadline, where a result of the worker is taken before the vote is made."""
    while True:
        it.step_idx += 1
        if it.posted is not None and it.step_idx >= it.read_due:
            it.read_round(tally_votes([it.posted]))
        if it.posted is None and it.step_idx >= it.post_due:
            if it.step_idx - it.state_entered_step > deadline:
                return
            it.post_vote(0)


@pytest.mark.parametrize("lag", [1, 2, 5])
def test_rounds_follow_the_later_the_longer_an_epoch_waits(lag: int) -> None:
    """A quarter of the wait lies between two rounds, at most the interval of idle ones; what all ranks do ends it."""
    it = core(lag=lag, idle_round_interval=9, collecting_deadline_steps=500)
    it.request_rebalance()
    run_until(it, DecisionKind.START)
    begin, waits = it.step_idx, []
    while it.step_idx < begin + 200:
        read = it.read_due
        run_to(it, read)
        waits.append((read - begin, it.post_due - read))
        run_to(it, it.post_due)
    assert [pause for _, pause in waits] == [min(waited // 4, 9) for waited, _ in waits]
    it.load_collected(1)
    it.plan_ready(1, PLAN)
    run_until(it, DecisionKind.BEGIN)
    assert it.posted is not None  # at once
    run_to(it, it.step_idx + 20)
    decide_commits(it, 1)
    run_to(it, it.commit_due)
    assert (it.chunk_idx, it.posted is not None) == (1, True)


def test_results_of_another_epoch_are_dropped() -> None:
    """What the worker reports for an epoch that is over, or in another state, changes nothing."""
    it = transferring(core())
    assert not it.load_collected(it.epoch)
    assert not it.plan_ready(it.epoch, PLAN)
    for epoch in (it.epoch - 1, it.epoch + 1):
        assert not it.chunk_staged(epoch, 0)
        assert not it.work_failed(epoch, AbortReason.INTEGRITY)
    assert (it.num_staged, it.state) == (0, State.TRANSFERRING)
    it.request_abort()
    run_until(it, DecisionKind.ABORT)
    assert not it.chunk_staged(it.epoch, 0)
    assert not it.work_failed(it.epoch, AbortReason.INTEGRITY)


def test_the_first_reason_stays() -> None:
    """Of several reasons to abort the first is voted, and only it is reported."""
    it = transferring(core())
    assert it.work_failed(it.epoch, AbortReason.INTEGRITY)
    assert not it.work_failed(it.epoch, AbortReason.TRANSFER_ERROR)
    it.request_abort()
    assert run_until(it, DecisionKind.ABORT).reason is AbortReason.INTEGRITY


@pytest.mark.parametrize(("step_interval", "start_step"), [(10, 12), (500, 602)])
def test_an_epoch_starts_when_its_interval_is_over_however_rare_idle_rounds_are(
    step_interval: int, start_step: int
) -> None:
    """Idle rounds come at least every step_interval steps, so that a smaller one is kept."""
    it = core(lag=2, idle_round_interval=300, step_interval=step_interval)
    run_until(it, DecisionKind.START, within=1000)
    assert it.step_idx == start_step


@pytest.mark.parametrize("step_interval", [10, 300, 450])
def test_epochs_start_an_interval_apart(step_interval: int) -> None:
    """Or at the first idle round after it; reading the round that starts one takes steps that do not add up."""
    it = core(lag=2, idle_round_interval=300, step_interval=step_interval)
    starts = []
    for _ in range(3):
        skip_epoch(it, within=1000)
        starts.append(it.epoch_start_step - it.lag)
    apart = 600 if step_interval == 450 else step_interval
    assert starts == [apart, 2 * apart, 3 * apart]


def test_back_off_doubles_up_to_its_bound() -> None:
    """Aborts in a row keep the next START away for twice as long each, up to the bound; a success resets that."""
    it = core(lag=1, idle_round_interval=1)
    pauses = []
    it.request_rebalance()
    for _ in range(6):
        run_until(it, DecisionKind.START)
        it.work_failed(it.epoch, AbortReason.POLICY_ERROR)
        run_until(it, DecisionKind.ABORT)
        pauses.append(it.earliest_next_step - it.step_idx)
    assert pauses == [5, 10, 20, 40, 40, 40]
    skip_epoch(it)
    it.request_rebalance()
    run_until(it, DecisionKind.START)
    it.request_abort()
    run_until(it, DecisionKind.ABORT)
    assert it.earliest_next_step - it.step_idx == 5


@pytest.mark.parametrize("cooldown", [0, 70])
def test_a_cool_down_keeps_the_next_start_away_from_the_last_commit(cooldown: int) -> None:
    """A request that comes earlier waits; without a cool-down it is heard in the next round."""
    it = core(lag=1, idle_round_interval=1, cooldown_steps=cooldown)
    commit(transferring(it), 2)
    committed_step = it.step_idx
    assert it.earliest_next_step == (committed_step + 70 if cooldown else 0)
    it.request_rebalance()
    run_until(it, DecisionKind.START)
    assert it.step_idx - committed_step == (cooldown or 1) + 1


@pytest.mark.parametrize("word", [{"drained": 0}, {"freeze": 1}, {"earliest_next_step": 10_000}])
def test_a_start_needs_every_rank(word: dict[str, int]) -> None:
    """One rank that is not drained, wants a freeze or backs off keeps all ranks in IDLE."""
    it = core()
    it.request_rebalance()
    decisions = run_to(it, 40, word)
    assert decisions
    assert DecisionKind.START not in {decision.kind for decision in decisions}
    run_until(it, DecisionKind.START)


def test_an_interval_starts_epochs() -> None:
    """With ``step_interval`` the first START comes at the first round from that step on; with 0 none comes."""
    it = core(step_interval=30)
    run_until(it, DecisionKind.START)
    assert 30 <= it.step_idx <= 30 + 4 + it.lag
    never = core()
    assert {decision.kind for decision in run_to(never, 200)} == {DecisionKind.NONE}


def test_lag_is_adopted_only_while_idle() -> None:
    """More lag that a rank asks for holds from an idle round on, and never while an epoch is under way."""
    it = transferring(core())
    run_to(it, it.step_idx + 10, {"lag": 6})
    assert it.lag == 2
    it.request_abort()
    run_until(it, DecisionKind.ABORT, {"lag": 6})
    assert it.lag == 2
    run_to(it, it.step_idx + 10, {"lag": 6})
    assert (it.lag, it.wanted_lag) == (6, 6)


def test_a_freeze_needs_all_drained_and_holds() -> None:
    """A freeze is true once all are drained, ends the epoch if one is under way, and ends when nobody asks any more."""
    it = transferring(core())
    it.request_freeze()
    assert run_until(it, DecisionKind.ABORT).reason is AbortReason.FROZEN
    run_to(it, it.step_idx + 12, {"drained": 0})
    assert not it.is_frozen
    run_until(it, DecisionKind.FREEZE)
    assert it.is_frozen
    it.request_unfreeze()
    run_to(it, it.step_idx + 8)
    assert not it.is_frozen


def test_a_rank_that_does_not_drain_votes_to_stop() -> None:
    """A rank that is not drained within its deadline asks all to stop; before that it waits."""
    it = core()
    it.drained = False
    run_to(it, it.config.drain_deadline_steps)
    assert it.state is State.IDLE
    assert run_until(it, DecisionKind.STOP).reason is StopReason.TRANSPORT
    assert it.state is State.STOPPED


@pytest.mark.parametrize("word", ["abort", "freeze", "stop"])
def test_a_staged_vote_that_refuses_is_no_promise(word: str) -> None:
    """The window is open after a staged vote, and not when that vote itself rules a COMMIT out."""
    it = transferring(core())
    it.chunk_staged(it.epoch, 0)
    run_to(it, it.post_due if it.posted is None else it.read_due)
    assert it.in_window
    {"abort": it.request_abort, "freeze": it.request_freeze, "stop": it.request_stop}[word]()
    run_to(it, it.read_due, {"progress": 4})
    run_to(it, it.post_due)
    assert it.posted is not None
    assert it.posted.progress == 5
    assert not it.in_window


@pytest.mark.parametrize("num_chunks", [0, 1, 2])
def test_a_resolved_round(num_chunks: int) -> None:
    """A decision found over the store is applied like one that was read; a last STOP vote goes out with it."""
    it = transferring(core(), num_chunks=3)
    it.chunk_staged(it.epoch, 0)
    it.chunk_staged(it.epoch, 1)
    run_to(it, it.read_due)
    it.step_idx = it.read_due
    round_idx = it.round_idx
    decision, last = it.resolve_round(num_chunks, StopReason.TIMEOUT)
    assert (last.round_idx, last.stop) == (round_idx + 1, encode_reason(StopReason.TIMEOUT, 0))
    assert decision.kind is (DecisionKind.COMMIT if num_chunks else DecisionKind.ABORT)
    for left in range(num_chunks, 0, -1):
        it.step_idx += 1
        assert it.num_decided == left
        with pytest.raises(AssertionError):  # before all of it is live it must not leave
            it.give_up(StopReason.TIMEOUT, "late")
        assert it.is_commit_due
        it.commit_chunk(it.live_digest + 1)
        assert not it.is_commit_due
        assert it.post_due == NEVER
    assert it.give_up(StopReason.TIMEOUT, "late") is None  # its last vote is out
    assert (it.state, it.round_idx) == (State.STOPPED, round_idx + 1)
    outcome = it.last_outcome
    assert outcome is not None
    assert outcome.kind is (OutcomeKind.FAILED if num_chunks else OutcomeKind.ABORTED)
    assert outcome.num_commits == num_chunks


def test_giving_up_inside_the_window_is_a_bug() -> None:
    """A rank that promised must not stop alone before the round is resolved."""
    it = transferring(core())
    it.chunk_staged(it.epoch, 0)
    run_to(it, it.read_due)
    with pytest.raises(AssertionError):
        it.give_up(StopReason.TIMEOUT, "late")


def test_a_stopped_rank_posts_nothing_more() -> None:
    """After STOP there is no further round to post or to read, and closing has nothing to say."""
    it = core()
    it.request_stop()
    run_until(it, DecisionKind.STOP)
    assert it.next_due > 1 << 60
    assert it.close() is None
