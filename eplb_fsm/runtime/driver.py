"""Does what a step has due: reads and posts rounds, takes what the worker reports, carries decisions out."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import NoReturn

from eplb_fsm.core.rank import Outcome, RankCore
from eplb_fsm.core.reasons import AbortReason, StopReason
from eplb_fsm.core.states import State
from eplb_fsm.core.votes import Decision, DecisionKind, Tally, Vote
from eplb_fsm.errors import ConsensusTimeout, EplbError, FailStop, UsageError
from eplb_fsm.observe.recorder import EventRecorder
from eplb_fsm.runtime import worker as messages
from eplb_fsm.runtime.parts import Parts
from eplb_fsm.runtime.rounds import Lost, Resolved, Unresolved, Wait

logger = logging.getLogger(__name__)

_LATE_RATIO_LIMIT = 0.01
_LATE_RATIO_ROUNDS = 100
_MAX_AUTO_LAG = 16
_NUM_KEPT_OUTCOMES = 64


class Driver:
    """The slow path of one rank's ``step()``; decode thread only.

    Attributes:
        core: The protocol state.
        outcomes: How the last epochs ended, oldest first.
        num_outcomes: Epochs by outcome since the start.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._runner = parts.runner
        self._rounds = parts.rounds
        self.core = RankCore(
            parts.domain.rank,
            parts.config,
            parts.runner.live_digest,
            lag=parts.lag,
            generation=parts.domain.generation,
        )
        self._recorder = EventRecorder(self.core, parts.observers)
        self._requests: deque[tuple[str, Callable[[], None]]] = deque()
        self._is_sync = parts.config.mode == "sync"
        self._last_rotate_step = 0
        self._bucket_steps = parts.config.window_size / parts.load_source.num_buckets
        self._late_mark = (0, 0)
        self._fatal: EplbError | None = None
        self._lost: Lost | None = None
        """Why a round was resolved over the store, until this rank has left."""
        self.outcomes: list[Outcome] = []
        self.num_outcomes = {"COMMITTED": 0, "SKIPPED": 0, "ABORTED": 0, "FAILED": 0}

    def run(self, step_idx: int, pass_id: int, now: float) -> Wait | None:
        """Commit what is due, read, take what the worker reports, vote; in sync mode (lag 0) as often as it takes.

        Returns:
            None when the step is done, else what it waits for; then call it again.
        """
        self.core.step_idx = step_idx
        if self._fatal is not None:  # an engine that swallowed the exception must not get past it
            self._fail_stop(self._fatal)
        self._runner.begin_step()
        try:
            return self._run(step_idx, pass_id, now)
        finally:
            self._runner.end_step()  # also if this rank fails: other ranks are in those jobs

    def _run(self, step_idx: int, pass_id: int, now: float) -> Wait | None:
        core = self.core
        while True:
            while core.is_commit_due:
                self._commit()
            if core.posted is not None and step_idx >= core.read_due:
                wait = self._read(core.posted.round_idx, now)
                if wait is not None:
                    return wait
                continue
            if core.is_leaving and not core.num_decided:
                self._give_up_resolved()
            if core.state is not State.STOPPED or not self._runner.is_drained:
                self._take_messages()
                if core.posted is None and step_idx >= core.post_due:
                    self._post(pass_id, now)
            if step_idx < core.next_due:
                return None

    @property
    def failure(self) -> str:
        """Why this rank was fail-stopped, empty if it was not; any thread."""
        return str(self._fatal or "")

    @property
    def is_frozen(self) -> bool:
        """Agreed by a freeze; a rank that is stopped and drained stays as it is, too."""
        return self.core.is_frozen or (self.core.state is State.STOPPED and self._runner.is_drained)

    @property
    def next_due(self) -> int:
        """The next step at which there is anything to do; after a stop, until what was under way has ended."""
        if self.core.state is State.STOPPED and not self._runner.is_drained:
            return self.core.step_idx + self._parts.config.idle_round_interval
        return self.core.next_due

    def arm(self) -> None:
        """Record what the agreed step 0 begins with."""
        self._recorder.record_init(self._parts.domain.world_size)

    def ask(self, action: str, request: Callable[[], None]) -> None:
        """Have the core asked for something before its next vote; any thread.

        Args:
            action: Its name in the spec.
            request: The method of the core.
        """
        if self.core.state is not State.STOPPED:
            self._requests.append((action, request))

    def ask_now(self, action: str, request: Callable[[], None]) -> None:
        """Ask the core for something; recorded if that changes what it will vote."""
        wishes = self.core.wishes
        request()
        if self.core.wishes != wishes:
            self._recorder.record(action)

    def close(self, step_idx: int, *, is_armed: bool) -> None:
        """Stop on this rank and post a last vote."""
        self.core.step_idx = step_idx
        if self.core.in_window:
            self._rounds.give_up_reading(self.core.round_idx)
        vote = self.core.close()
        if vote is not None and is_armed:
            self._recorder.record("Close", outcome=self._note_outcome())
            self._rounds.post_last(vote)

    def _take_requests(self) -> None:
        while self._requests:
            self.ask_now(*self._requests.popleft())
        if self.core.is_interval_due:
            self.ask_now("Request", self.core.request_rebalance)

    def _post(self, pass_id: int, now: float) -> None:
        self._take_requests()
        self._rotate_window()
        if not self._runner.is_worker_alive:
            self._work_failed(self.core.epoch, AbortReason.WORKER_DIED, "the worker thread is gone")
        self.core.drained = self._runner.is_drained
        vote = self.core.post_vote(pass_id)
        if self._recorder:  # first, so that the trace of a rank that dies has every vote that others read
            self._recorder.record_vote(vote)
        self._rounds.post(vote)
        self._parts.gauge.note(self.core.step_idx, now, is_transferring=self.core.state is State.TRANSFERRING)

    def _read(self, round_idx: int, now: float) -> Wait | None:
        gave_up_round = self._rounds.journal.gave_up_round
        result = self._rounds.read(round_idx, now, in_window=self.core.in_window, counts_late=not self._is_sync)
        if self._rounds.journal.gave_up_round != gave_up_round:
            self._recorder.record("GiveUpReading")
        if isinstance(result, Wait):
            return result
        if isinstance(result, Tally):
            self._decide(round_idx, result)
        elif isinstance(result, Lost):
            self._give_up(result)
        elif isinstance(result, Resolved):
            decision, last_vote = self.core.resolve_round(result.num_chunks, result.lost.reason)
            self._rounds.note_decision(round_idx, result.num_chunks)
            self._rounds.post_last(last_vote)
            self._lost = result.lost
            self._carry_out(decision, "ResolveRound", result.lost.reason.name)
        else:
            self._fail_unresolved(result)
        return None

    def _decide(self, round_idx: int, tally: Tally) -> None:
        decision = self.core.read_round(tally)
        self._rounds.note_decision(round_idx, decision.num_chunks)
        if self.core.state is State.STOPPED:
            self._rounds.stop_from(round_idx + 1)
        self._carry_out(decision, "ReadRound")
        self._parts.is_suspended = self.core.is_frozen
        if not self.core.is_active:
            self._raise_lag()

    def _carry_out(self, decision: Decision, action: str, lost: str = "") -> None:
        if decision.kind is not DecisionKind.NONE:
            self._act(decision)
        elif not self._recorder:  # most rounds decide nothing, and nobody listens
            return
        self._recorder.record(
            action,
            decision=decision.kind.value,
            reason=decision.reason.name if decision.reason else "",
            num_chunks=decision.num_chunks,
            outcome=self._note_outcome(),
            earliest_next_step=self.core.earliest_next_step,
            lost=lost,
        )

    def _act(self, decision: Decision) -> None:
        kind = decision.kind
        if kind is DecisionKind.START:
            self._parts.gauge.start()
            self._runner.start(self.core.epoch, self._parts.gauge.measured)
        elif kind is DecisionKind.BEGIN:
            self._runner.begin()
            self._parts.gauge.begin(self.core.step_idx, self._parts.clock())
        elif kind in (DecisionKind.ABORT, DecisionKind.STOP):
            self._log(decision)
        if not self.core.is_active:
            self._runner.drop()

    def _commit(self) -> None:
        """Make the next decided chunk live. It was promised; if it cannot be done, no forward pass may follow."""
        core = self.core
        try:
            if core.step_idx > core.commit_due:  # the engine's pass numbers have skipped one
                raise UsageError("the engine left out the step() of the pass at which it was due")
            self._runner.commit()
        except Exception as error:
            detail = f"a promised commit failed: {error}"
            if core.in_window:
                self._rounds.give_up_reading(core.round_idx)
            vote = core.commit_failed(detail)
            self._recorder.record("CommitFailed", text=detail, outcome=self._note_outcome())
            self._post_last(vote)
            self._fail_stop(FailStop(detail, [core.rank]))
        chunk = core.chunk_idx
        core.commit_chunk(self._runner.live_digest)
        if not core.is_active:
            self._end_transfer()
        outcome = self._note_outcome()
        self._recorder.record("CommitChunk", chunk=chunk, outcome=outcome, earliest_next_step=core.earliest_next_step)

    def _post_last(self, vote: Vote | None) -> None:
        if vote is not None:  # else it is out, since a resolution
            self._rounds.post_last(vote)

    def _end_transfer(self) -> None:
        """The last chunk is live: keep what moving them took."""
        assert self._runner.plan is not None
        self._parts.gauge.end(self.core.step_idx, self._parts.clock(), self._runner.plan.peer_bytes)
        self._runner.drop()

    def _give_up_resolved(self) -> None:
        """All that the resolved round decided is live."""
        assert self._lost is not None
        self._give_up(self._lost)
        self._lost = None

    def _give_up(self, lost: Lost) -> None:
        # Only after the vote timeout have all live ranks surely shown that they posted; before, nobody is named here
        # and the watchdog names who shows no life.
        waited = lost.reason is StopReason.TIMEOUT
        missing = self._parts.missing_ranks(self.core.round_idx) if waited else ()
        detail = f"{lost.detail}; missing ranks: {list(missing) or 'not known yet, see health().peers'}"
        self._parts.watch_closely()
        vote = self.core.give_up(lost.reason, detail)
        self._recorder.record("GiveUp", reason=lost.reason.name, outcome=self._note_outcome())
        self._post_last(vote)
        self._runner.drop()
        logger.error("rank %d: rebalancing stopped (%s): %s", self.core.rank, lost.reason.name, detail)

    def _fail_unresolved(self, unresolved: Unresolved) -> None:
        ranks = unresolved.silent_ranks
        self._recorder.record("FailStop", cause="UNRESOLVED")
        self._fail_stop(
            ConsensusTimeout(
                f"rank {self.core.rank} voted to commit a chunk and the decision was lost "
                f"({unresolved.lost.detail}); within resolve_timeout_s "
                f"{f'ranks {list(ranks)} did not say' if ranks else 'the store did not say'} "
                "whether it was committed, so serving on could tear the expert map",
                ranks,
            )
        )

    def _fail_stop(self, error: EplbError) -> NoReturn:
        self._fatal = self._fatal or error
        self._parts.fail_stop(error)
        raise error  # it must not return; if it did, an exception is what is left

    # -- what the worker reports ----------------------------------------------------------------------------

    def _take_messages(self) -> None:
        if self._is_sync:
            self._runner.run_inline()
        mailbox = self._parts.mailbox
        while not mailbox.empty():
            self._take(mailbox.get_nowait())

    def _take(self, message: messages.Message) -> None:
        core = self.core
        if isinstance(message, messages.LoadCollected):
            if core.load_collected(message.epoch):
                self._recorder.record("LoadCollected")
        elif isinstance(message, messages.PlanReady):
            if message.epoch == core.epoch and core.state is State.COMPUTING:
                self._take_plan(message)
        elif isinstance(message, messages.ChunkStaged):
            if core.chunk_staged(message.epoch, message.program.chunk_idx):
                self._runner.keep_staged(message.program)
                self._recorder.record("ChunkStaged", digest=message.program.digest)
        elif isinstance(message, messages.JobDone):
            self._runner.job_done()
        else:
            self._take_failure(message)

    def _take_plan(self, message: messages.PlanReady) -> None:
        terms = self._runner.accept_plan(message.plan, message.seen, self.core.lag)
        self.core.plan_ready(message.epoch, terms)
        self._recorder.record(
            "PlanReady",
            plan_digest=terms.digest,
            skip=terms.skip,
            num_chunks=terms.num_chunks,
            deadline_steps=terms.deadline_steps,
        )
        try:
            self._runner.write_tables(message.tables)
        except Exception as error:  # half-written tables may name slots that hold another expert
            self._recorder.record("FailStop", cause="TABLES_DAMAGED")
            self._fail_stop(FailStop(f"rank {self.core.rank}: tables could not be written: {error}", [self.core.rank]))

    def _take_failure(self, message: messages.WorkFailed | messages.TransportGone | messages.SlotDamaged) -> None:
        if isinstance(message, messages.WorkFailed):
            self._work_failed(message.epoch, message.reason, message.detail)
        elif isinstance(message, messages.TransportGone):
            self._transport_lost(message.detail)
        else:
            self._recorder.record("FailStop", cause="SLOT_DAMAGED")
            self._fail_stop(FailStop(f"rank {self.core.rank}: {message.detail}", [self.core.rank]))

    def _work_failed(self, epoch: int, reason: AbortReason, detail: str) -> None:
        if self.core.work_failed(epoch, reason):
            logger.warning("rank %d epoch %d: %s: %s; voting to abort", self.core.rank, epoch, reason.name, detail)
            self._recorder.record("WorkFailed", reason=reason.name, text=detail)

    def _transport_lost(self, detail: str) -> None:
        if self.core.state is not State.STOPPED:
            logger.error("rank %d: %s; voting to stop", self.core.rank, detail)
            self.core.transport_lost()
            self._recorder.record("TransportLost", text=detail)

    # -- housekeeping ---------------------------------------------------------------------------------------

    def _rotate_window(self) -> None:
        """Close a bucket of the load window once enough steps have passed; the same step on all ranks."""
        if self.core.step_idx - self._last_rotate_step >= self._bucket_steps:
            self._last_rotate_step = self.core.step_idx
            self._runner.rotate_window()

    def _raise_lag(self) -> None:
        """Ask for more lag when more than 1 % of the last rounds were late (``lag="auto"``)."""
        num_read, num_late = self._late_mark
        if self._parts.config.lag != "auto" or self._rounds.num_read - num_read < _LATE_RATIO_ROUNDS:
            return
        late_ratio = (self._rounds.num_late - num_late) / (self._rounds.num_read - num_read)
        self._late_mark = (self._rounds.num_read, self._rounds.num_late)
        if late_ratio > _LATE_RATIO_LIMIT and self.core.wanted_lag < _MAX_AUTO_LAG:
            self.core.wanted_lag += 1
            logger.info(
                "rank %d: %.1f %% of rounds were late; asking for lag %d",
                self.core.rank,
                100 * late_ratio,
                self.core.wanted_lag,
            )

    def _note_outcome(self) -> str:
        """Keep the outcome of an epoch that has just ended, and return its name; else the empty string."""
        outcome = self.core.last_outcome
        if outcome is None or (self.outcomes and self.outcomes[-1] is outcome):
            return ""
        self.outcomes = [*self.outcomes[1 - _NUM_KEPT_OUTCOMES :], outcome]
        self.num_outcomes[outcome.kind.name] += 1
        if self.core.rank == 0:  # agreed, so one rank is enough
            logger.info(
                "epoch %d: %s%s, %d chunks live, steps %d to %d",
                outcome.epoch,
                outcome.kind.name,
                f"({outcome.reason.name})" if outcome.reason else "",
                outcome.num_commits,
                outcome.start_step,
                outcome.end_step,
            )
        return outcome.kind.name

    def _log(self, decision: Decision) -> None:
        logger.warning(
            "rank %d epoch %d: %s(%s) %s",
            self.core.rank,
            self.core.epoch,
            decision.kind.value,
            decision.reason.name if decision.reason else "",
            decision.detail or (f"asked for by rank {decision.rank}" if decision.rank >= 0 else ""),
        )
