"""The protocol with one thing wrong: every mutant of the spec, planted in the code, under the same name.

A mutant is a function that patches the library for as long as a test lasts; its docstring says what is wrong. What the
spec says in `spec/Mutants.tla` about a core or a tally is said here about the class or the function that
stands for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from runs import ANY, NO_FAULTS, Aim
from staging_mutants import (
    believe_the_plan,
    buffer_not_free,
    commit_overtaken,
    count_incomplete,
    ignore_commit_event,
    no_hash,
    rows_in_conflict,
    sources_in_first_placement,
)

from eplb_fsm.core import rank as core_rank
from eplb_fsm.core import votes
from eplb_fsm.core.rank import Outcome, PlanTerms, RankCore
from eplb_fsm.core.reasons import AbortReason, OutcomeKind, StopReason
from eplb_fsm.core.states import State
from eplb_fsm.core.votes import Decision, DecisionKind, Progress, Tally, Vote
from eplb_fsm.fsm import RebalanceFSM
from eplb_fsm.runtime.epoch import EpochRunner
from eplb_fsm.runtime.rounds import Rounds, Wait
from eplb_fsm.runtime.staging import enqueue_commit
from eplb_fsm.simulate.scenario import FaultKind

Patch = pytest.MonkeyPatch


# -- waiting and reading ------------------------------------------------------------------------------------------


def pass_without_result(patch: Patch) -> None:
    """A late round is not waited for: it is read at some later step, while the rank goes on."""
    poll_step = RebalanceFSM.poll_step

    def poll_or_go_on(self: RebalanceFSM, pass_id: int | None, now: float) -> Wait | None:
        wait = poll_step(self, pass_id, now)
        if wait is None or wait.is_resolving:
            return wait
        self._is_in_step = False
        self._core.read_due = self._next_due = self._step_idx + 1
        return None

    patch.setattr(RebalanceFSM, "poll_step", poll_or_go_on)


def give_up_in_window(patch: Patch) -> None:
    """A rank that loses the decision that it promised to follow stops, and serves on with the map it has."""
    patch.setattr(RankCore, "in_window", property(lambda self: False))


def giving_up_not_binding(patch: Patch) -> None:
    """A rank that said that it gave up reading a round reads it after all when it comes."""
    read = Rounds.read

    def read_again(self: Rounds, round_idx: int, now: float, **how: bool) -> Any:
        tally = self._channel.poll(round_idx) if self.journal.gave_up_round == round_idx else None
        return read(self, round_idx, now, **how) if tally is None else tally

    patch.setattr(Rounds, "read", read_again)


def stop_in_silence(patch: Patch) -> None:
    """A rank that gives up posts no last vote."""

    def show_only(self: Rounds, vote: Vote) -> None:
        self.journal = self.journal._replace(stopped_from_round=vote.round_idx)

    patch.setattr(Rounds, "post_last", show_only)


def pause_from_own_plan(patch: Patch) -> None:
    """A rank whose plan is there counts the wait of its epoch from then on, so its rounds are not the others'."""
    plan_ready = RankCore.plan_ready

    def count_anew(self: RankCore, epoch: int, plan: PlanTerms) -> bool:
        is_new = plan_ready(self, epoch, plan)
        if is_new:
            self.progressed_step = self.step_idx
        return is_new

    patch.setattr(RankCore, "plan_ready", count_anew)


# -- deciding -----------------------------------------------------------------------------------------------------


def no_digest(patch: Patch) -> None:
    """The vote carries no digest of the plan."""
    make_vote = RankCore._make_vote
    patch.setattr(RankCore, "_make_vote", lambda self, pass_id: make_vote(self, pass_id)._replace(plan_digest=0))


def begin_on_progress(patch: Patch) -> None:
    """BEGIN compares progress only."""

    def decide_plan(tally: Tally) -> Decision:
        return Decision(DecisionKind.SKIP if tally.largest.progress == Progress.SKIP else DecisionKind.BEGIN)

    patch.setattr(votes, "_decide_plan", decide_plan)


def commit_on_progress(patch: Patch) -> None:
    """COMMIT compares progress only, and comes first."""

    def decide(tally: Tally) -> Decision:
        if tally.smallest.progress == Progress.STAGED:
            return Decision(DecisionKind.COMMIT, num_chunks=1)
        return votes.decide(tally)

    patch.setattr(core_rank, "decide", decide)


def start_undrained(patch: Patch) -> None:
    """An epoch starts before the transfers of the last one have ended."""
    decide_idle = votes._decide_idle

    def ignore_drained(tally: Tally) -> Decision:
        if tally.largest.freeze:
            return decide_idle(tally)
        return decide_idle(Tally(tally.largest, tally.smallest._replace(drained=1)))

    patch.setattr(votes, "_decide_idle", ignore_drained)


def freeze_undrained(patch: Patch) -> None:
    """A freeze does not wait for transfers."""
    decide_idle = votes._decide_idle

    def ignore_drained(tally: Tally) -> Decision:
        return Decision(DecisionKind.FREEZE) if tally.largest.freeze else decide_idle(tally)

    patch.setattr(votes, "_decide_idle", ignore_drained)


def stale_vote(patch: Patch) -> None:
    """A vote of another membership counts, because the generation is not compared."""
    patch.setattr(votes, "_EQUAL_WORDS", tuple(word for word in votes._EQUAL_WORDS if word != "generation"))


# -- acting alone -------------------------------------------------------------------------------------------------


def commit_alone(patch: Patch) -> None:
    """A rank commits a chunk that it has staged, whatever the others vote."""
    read_round = RankCore.read_round

    def read_own(self: RankCore, tally: Tally) -> Decision:
        own = self.posted
        return read_round(self, Tally(own, own) if own is not None and own.promises_commit else tally)

    patch.setattr(RankCore, "read_round", read_own)


def commit_own_staged(patch: Patch) -> None:
    """A rank commits all that it has staged itself, whatever the others have."""
    decide_commits = RankCore._decide_commits

    def decide_own(self: RankCore, num_chunks: int) -> None:
        decide_commits(self, self.num_staged - self.chunk_idx)

    patch.setattr(RankCore, "_decide_commits", decide_own)


def commit_at_once(patch: Patch) -> None:
    """A rank that has resolved a round makes all of it live at once."""
    commit_chunk = RankCore.commit_chunk

    def commit_without_pass(self: RankCore, live_digest: int) -> None:
        commit_chunk(self, live_digest)
        if self.is_leaving and self.num_decided:
            self.commit_due = self.step_idx

    patch.setattr(RankCore, "commit_chunk", commit_without_pass)


def leave_early(patch: Patch) -> None:
    """A rank that has resolved a round leaves before all of it is live."""
    resolve_round = RankCore.resolve_round

    def resolve_to_one(self: RankCore, num_chunks: int, reason: StopReason) -> tuple[Decision, Vote]:
        return resolve_round(self, min(num_chunks, 1), reason)

    patch.setattr(RankCore, "resolve_round", resolve_to_one)


def begin_alone(patch: Patch) -> None:
    """A rank begins to transfer as soon as its own plan is there."""
    accept_plan, plan_ready = EpochRunner.accept_plan, RankCore.plan_ready

    def accept_and_stage(self: EpochRunner, plan: Any, *further: Any) -> PlanTerms:
        terms = accept_plan(self, plan, *further)
        self.begin()
        return terms

    def enter(self: RankCore, epoch: int, plan: PlanTerms) -> bool:
        is_new = plan_ready(self, epoch, plan)
        if is_new and not plan.skip:
            self._enter("begin_transfer")
        return is_new

    patch.setattr(EpochRunner, "accept_plan", accept_and_stage)
    patch.setattr(RankCore, "plan_ready", enter)


def withdraw(patch: Patch) -> None:
    """A rank that is asked to abort takes back what it has staged, also while its promise is out."""
    request_abort = RebalanceFSM.request_abort

    def drop_too(self: RebalanceFSM) -> None:
        request_abort(self)
        self._parts.runner.drop()

    patch.setattr(RebalanceFSM, "request_abort", drop_too)


def deadline_acts(patch: Patch) -> None:
    """A deadline acts on one rank, also while its promise is out, instead of voting."""
    poll_step = RebalanceFSM.poll_step

    def abort_in_time(self: RebalanceFSM, pass_id: int | None, now: float) -> Wait | None:
        core, step_idx = self._core, self._step_idx + 1
        is_first = core.rank == 0 and not self._is_in_step
        if is_first and core.in_window and step_idx - core.state_entered_step >= 2:
            core.step_idx = step_idx
            core.posted = None
            core._abort(Decision(DecisionKind.ABORT, AbortReason.DEADLINE_TRANSFERRING))
            self._parts.runner.drop()
            core.post_due = self._next_due = step_idx + 2
        return poll_step(self, pass_id, now)

    patch.setattr(RebalanceFSM, "poll_step", abort_in_time)


def dead_worker_without_deadline(patch: Patch) -> None:
    """Work that never ends is never given up: nobody votes on a deadline."""
    patch.setattr(RankCore, "_vote_on_deadlines", lambda self: None)


def commit_after_stop(patch: Patch) -> None:
    """A stopped rank makes live what it had staged."""
    drop = EpochRunner.drop
    poll_step = RebalanceFSM.poll_step

    def keep_programs(self: EpochRunner) -> None:
        kept = dict(self._programs)
        drop(self)
        self._programs.update(kept)

    def poll_and_commit(self: RebalanceFSM, pass_id: int | None, now: float) -> Wait | None:
        wait, runner = poll_step(self, pass_id, now), self._parts.runner
        outcome = self._core.last_outcome
        if self.state is State.STOPPED and outcome is not None and outcome.kind is OutcomeKind.FAILED:
            for _, program in sorted(runner._programs.items()):
                enqueue_commit(program, runner._device)
            runner._programs.clear()
        return wait

    patch.setattr(EpochRunner, "drop", keep_programs)
    patch.setattr(RebalanceFSM, "poll_step", poll_and_commit)


def abort_in_silence(patch: Patch) -> None:
    """An abort leaves no outcome."""
    _forget_outcome(patch, OutcomeKind.ABORTED)


def _forget_outcome(patch: Patch, forgotten: OutcomeKind) -> None:
    end_epoch = RankCore._end_epoch

    def end_and_forget(self: RankCore, action: str, kind: OutcomeKind, *why: Any) -> None:
        before: Outcome | None = self.last_outcome
        end_epoch(self, action, kind, *why)
        if kind is forgotten:
            self.last_outcome = before

    patch.setattr(RankCore, "_end_epoch", end_and_forget)


def skip_in_silence(patch: Patch) -> None:
    """An epoch without gain leaves no outcome."""
    _forget_outcome(patch, OutcomeKind.SKIPPED)


def stop_taken_back(patch: Patch) -> None:
    """A stopped rank calls itself idle again."""
    poll_step = RebalanceFSM.poll_step

    def poll_and_wake_up(self: RebalanceFSM, pass_id: int | None, now: float) -> Wait | None:
        wait, core = poll_step(self, pass_id, now), self._core
        if self.state is State.STOPPED:
            core.lifecycle.state = State.IDLE
            core.post_due = self._next_due = self._step_idx + 1
        return wait

    patch.setattr(RebalanceFSM, "poll_step", poll_and_wake_up)


def freeze_in_window(patch: Patch) -> None:
    """A freeze is granted on one rank while its promise is out."""
    request_freeze = RebalanceFSM.request_freeze

    def freeze_at_once(self: RebalanceFSM) -> None:
        request_freeze(self)
        core = self._core
        if core.in_window:
            core.posted = None
            core._abort(Decision(DecisionKind.ABORT, AbortReason.FROZEN))
            core.is_frozen = True
            self._parts.runner.drop()
            core.post_due = self._next_due = core.step_idx + 2

    patch.setattr(RebalanceFSM, "request_freeze", freeze_at_once)


# -- an engine that does not call step() once after every pass ----------------------------------------------------


def double_step_without_pass_ids(patch: Patch) -> None:
    """The engine calls step() twice after one pass, and gives no numbers of its passes."""
    poll_step = RebalanceFSM.poll_step
    patch.setattr(RebalanceFSM, "poll_step", lambda self, pass_id, now: poll_step(self, None, now))


def step_counted_twice(patch: Patch) -> None:
    """A forward pass is counted as two steps on one rank while a commit is decided."""
    poll_step = RebalanceFSM.poll_step

    def count_twice(self: RebalanceFSM, pass_id: int | None, now: float) -> Wait | None:
        if self._core.rank == 0 and self._core.num_decided and not self._is_in_step:
            self._step_idx += 1
        return poll_step(self, None, now)

    patch.setattr(RebalanceFSM, "poll_step", count_twice)


def skipped_step(patch: Patch) -> None:
    """The engine leaves step() out after one pass; its numbers of the passes save all but that one."""


# -- all of them --------------------------------------------------------------------------------------------------


class Mutant(NamedTuple):
    """One thing wrong.

    Attributes:
        plant: Patches the library; its name is the mutant's in `spec/mutants/`, its docstring what is wrong.
        breaks: The invariant that a run must break.
        aim: The faults that its runs are drawn from.
        is_strict: Also a pass counts that the library cannot save.
        has_stale_rank: One rank votes for another membership.
    """

    plant: Callable[[Patch], None]
    breaks: str
    aim: Aim = ANY
    is_strict: bool = False
    has_stale_rank: bool = False

    @property
    def name(self) -> str:
        """The name."""
        return self.plant.__name__

    @property
    def is_wrong_how(self) -> str:
        """What is wrong, in a sentence."""
        return " ".join((self.plant.__doc__ or "").split())


PLANNING = (State.IDLE, State.COLLECTING)
MOVING = (State.TRANSFERRING,)
LOST = Aim((FaultKind.ROUNDS_HELD, FaultKind.CHANNEL_LOST), is_at_promise=True)


MUTANTS = (
    Mutant(pass_without_result, "same_decision", Aim((FaultKind.ROUNDS_HELD,), MOVING)),
    Mutant(pause_from_own_plan, "same_decision", NO_FAULTS),
    Mutant(no_digest, "same_plan", Aim((FaultKind.OTHER_PLAN,), PLANNING)),
    Mutant(begin_on_progress, "same_plan", Aim((FaultKind.OTHER_PLAN,), PLANNING)),
    Mutant(
        commit_on_progress, "no_commit_after_abort", Aim((FaultKind.ABORT, FaultKind.FREEZE, FaultKind.STOP), MOVING)
    ),
    Mutant(commit_alone, "no_torn_forward", NO_FAULTS),
    Mutant(commit_own_staged, "no_torn_forward", NO_FAULTS),
    Mutant(commit_at_once, "no_torn_forward", LOST),
    Mutant(leave_early, "no_torn_forward", LOST),
    Mutant(begin_alone, "no_transfer_without_consensus", NO_FAULTS),
    Mutant(start_undrained, "no_stale_receive", Aim((FaultKind.ABORT, FaultKind.WORKER_STUCK), MOVING)),
    Mutant(freeze_undrained, "frozen_is_quiet", Aim((FaultKind.FREEZE, FaultKind.WORKER_STUCK), MOVING)),
    Mutant(buffer_not_free, "live_equals_map", NO_FAULTS),
    Mutant(rows_in_conflict, "live_equals_map", NO_FAULTS),
    Mutant(ignore_commit_event, "live_equals_map", NO_FAULTS),
    Mutant(sources_in_first_placement, "live_equals_map", NO_FAULTS),
    Mutant(withdraw, "commit_cannot_fail", Aim((FaultKind.ABORT,), is_at_promise=True)),
    Mutant(give_up_in_window, "no_torn_forward", LOST),
    Mutant(giving_up_not_binding, "no_torn_forward", Aim((FaultKind.ROUNDS_HELD,), is_at_promise=True)),
    Mutant(stop_in_silence, "no_silent_stop", Aim((FaultKind.ROUNDS_HELD, FaultKind.CLOSE))),
    Mutant(count_incomplete, "live_equals_map", NO_FAULTS),
    Mutant(no_hash, "live_equals_map", Aim((FaultKind.ROW_DAMAGED,))),
    Mutant(dead_worker_without_deadline, "epoch_bounded", Aim((FaultKind.WORKER_STUCK, FaultKind.PLANNER_STUCK))),
    Mutant(deadline_acts, "no_torn_forward", NO_FAULTS),
    Mutant(
        believe_the_plan, "live_equals_map", Aim((FaultKind.ABORT,), (State.AWAITING_CONSENSUS, State.TRANSFERRING))
    ),
    Mutant(abort_in_silence, "outcome_recorded", Aim((FaultKind.ABORT,))),
    Mutant(commit_after_stop, "stopped_harmless", Aim((FaultKind.STOP, FaultKind.CLOSE), is_at_promise=True)),
    Mutant(double_step_without_pass_ids, "no_torn_forward", Aim((FaultKind.STEP_DOUBLED,), is_at_promise=True)),
    Mutant(skipped_step, "no_torn_forward", Aim((FaultKind.STEP_SKIPPED,), is_at_promise=True), is_strict=True),
    Mutant(stale_vote, "same_membership", has_stale_rank=True),
    Mutant(commit_overtaken, "no_torn_forward", NO_FAULTS),
    Mutant(step_counted_twice, "commit_cannot_fail", NO_FAULTS),
    Mutant(stop_taken_back, "stopped_harmless", Aim((FaultKind.STOP, FaultKind.CLOSE))),
    Mutant(skip_in_silence, "outcome_recorded", Aim((), moves_nothing=True)),
    Mutant(freeze_in_window, "no_torn_forward", Aim((FaultKind.FREEZE,), is_at_promise=True)),
)
