"""What one rank knows of the protocol; one method is one action of the spec.

The core counts steps, holds the lifecycle, says what to vote and when, and applies decisions. It never
does anything: :class:`eplb_fsm.fsm.RebalanceFSM` carries out what a decision asks for, and tells the core
what the background worker reports.
"""

from __future__ import annotations

from dataclasses import dataclass

from eplb_fsm.config import RebalanceConfig
from eplb_fsm.core.deadlines import deadline_steps, pause_steps
from eplb_fsm.core.lifecycle import Lifecycle
from eplb_fsm.core.reasons import AbortReason, OutcomeKind, StopReason, encode_reason
from eplb_fsm.core.states import ACTIVE_STATES, State
from eplb_fsm.core.votes import PROTOCOL_VERSION, Decision, DecisionKind, Progress, Tally, Vote, decide

NEVER = 1 << 62
"""A step that is never reached."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one epoch ended."""

    epoch: int
    kind: OutcomeKind
    reason: AbortReason | StopReason | None
    detail: str
    start_step: int
    end_step: int
    num_commits: int
    """Chunks that became live; they stay, whatever the kind."""


@dataclass(slots=True)
class PlanTerms:
    """What the core needs to know of a plan."""

    digest: int
    num_chunks: int
    deadline_steps: int
    """Of TRANSFERRING; part of the plan, so equal on all ranks."""
    skip: bool = False


class RankCore:
    """The protocol state of one rank. Not thread-safe: the decode thread owns it.

    Attributes:
        step_idx: Steps made so far; the shared logical clock.
        epoch: Number of the current or last epoch, 0 before the first.
        round_idx: Number of the last round posted.
        lag: Steps between posting and reading.
        live_digest: Digest of the placement that this rank serves with.
    """

    def __init__(self, rank: int, config: RebalanceConfig, live_digest: int, *, lag: int, generation: int = 0) -> None:
        self.rank = rank
        self.config = config
        self.lifecycle = Lifecycle()
        self.generation = generation
        self.fingerprint = config.fingerprint
        self.live_digest = live_digest
        self.lag = lag
        self.wanted_lag = lag
        self.step_idx = 0
        self.round_idx = 0
        self.epoch = 0
        self.epoch_start_step = 0
        self.state_entered_step = 0
        self.progressed_step = 0
        """The last step of the epoch at which all ranks got further: a decision, or a commit."""
        self.posted: Vote | None = None
        """The vote of a round that was posted and not read yet."""
        self.idle_interval = min(config.idle_round_interval, config.step_interval or NEVER)
        """Steps between two rounds in IDLE."""
        self.post_due = self.idle_interval
        self.read_due = NEVER
        self.plan: PlanTerms | None = None
        self.chunk_idx = 0
        """The next chunk to commit: chunks of the epoch that are live."""
        self.num_staged = 0
        self.num_decided = 0
        """Chunks that a round has decided to commit and that are not live yet: one becomes live at each step."""
        self.commit_due = NEVER
        """The step at which the first of them is due."""
        self.is_leaving = False
        """Its last round was resolved over the store and its last vote cast: it stops once what was decided is live."""
        self.drained = True
        self.is_frozen = False
        self.last_outcome: Outcome | None = None
        self.stop_reason: StopReason | None = None
        self.stop_detail = ""
        self._wants_freeze = False
        self._wants_rebalance = False
        self._abort_word = 0
        self._stop_word = 0
        self._backoff_steps = config.backoff_steps
        self.earliest_next_step = 0
        """No epoch starts in a round posted before this step: back-off after an abort, cool-down after a commit."""
        self._interval_due = config.step_interval or NEVER

    # -- what the engine asks for; any step, any rank ---------------------------------------------------

    def request_rebalance(self) -> None:
        """Vote for a START in the next round."""
        self._wants_rebalance = True

    def request_freeze(self) -> None:
        """Vote for a freeze until :meth:`request_unfreeze`; it holds from an agreed step on."""
        self._wants_freeze = True

    def request_unfreeze(self) -> None:
        """Take this rank's wish to freeze back."""
        self._wants_freeze = False

    def request_abort(self) -> None:
        """Vote to abort the epoch that is under way, if any."""
        if self.is_active:
            self._set_abort(AbortReason.REQUESTED)

    def request_stop(self) -> None:
        """Vote to stop rebalancing on all ranks."""
        self._stop_word = encode_reason(StopReason.CLOSED, self.rank)

    # -- local actions: they change nothing but the next vote ------------------------------------------

    def load_collected(self, epoch: int) -> bool:
        """Spec: LoadCollected. Returns False for a result of an epoch that is over."""
        if epoch != self.epoch or self.state is not State.COLLECTING:
            return False
        self._enter("load_collected")
        return True

    def plan_ready(self, epoch: int, plan: PlanTerms) -> bool:
        """Spec: PlanReady. Returns False for a result of an epoch that is over."""
        if epoch != self.epoch or self.state is not State.COMPUTING:
            return False
        self.plan = plan
        self._enter("plan_ready")
        return True

    def chunk_staged(self, epoch: int, chunk_idx: int) -> bool:
        """Spec: ChunkStaged. From the next vote on this is a promise: the commit cannot fail."""
        if epoch != self.epoch or self.state is not State.TRANSFERRING:
            return False
        self.num_staged = chunk_idx + 1
        return True

    def work_failed(self, epoch: int, reason: AbortReason) -> bool:
        """Spec: WorkFailed. The next vote asks to abort; the first reason stays, and only that returns True."""
        if epoch != self.epoch or not self.is_active or self._abort_word:
            return False
        self._set_abort(reason)
        return True

    def transport_lost(self) -> None:
        """Spec: TransportLost. The next vote says STOP: what was under way can never be shown to be drained."""
        self._stop_word = encode_reason(StopReason.TRANSPORT, self.rank)

    def _set_abort(self, reason: AbortReason) -> None:
        if not self._abort_word:
            self._abort_word = encode_reason(reason, self.rank)

    # -- rounds -----------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """The state of this rank."""
        return self.lifecycle.state

    @property
    def is_active(self) -> bool:
        """True while an epoch is under way."""
        return self.state in ACTIVE_STATES

    @property
    def is_interval_due(self) -> bool:
        """True once the interval between two epochs is over: a request of its own."""
        return self.step_idx >= self._interval_due

    @property
    def wishes(self) -> tuple[bool, bool, int, int]:
        """What the next vote asks for: a rebalance, a freeze, an abort, a stop (the words of the latter two)."""
        return self._wants_rebalance, self._wants_freeze, self._abort_word, self._stop_word

    @property
    def next_due(self) -> int:
        """The next step at which there is anything to do; before it a step costs one comparison."""
        return min(self.commit_due, self.post_due if self.posted is None else self.read_due)

    @property
    def in_window(self) -> bool:
        """True while a decision is out that could commit chunks without this rank knowing."""
        return self.posted is not None and self.posted.promises_commit

    def post_vote(self, pass_id: int) -> Vote:
        """Spec: PostVote. Returns the vote of the next round; it is read ``lag`` steps later."""
        self._vote_on_deadlines()
        self.round_idx += 1
        self.posted = self._make_vote(pass_id)
        self.read_due = self.step_idx + self.lag
        return self.posted

    def read_round(self, tally: Tally) -> Decision:
        """Spec: ReadRound. Applies what the round decided, and returns it to be carried out."""
        assert self.posted is not None
        assert not self.num_decided
        decision = decide(tally)
        self.posted = None
        self._apply(decision, tally)
        self._schedule_next()
        return decision

    def resolve_round(self, num_chunks: int, reason: StopReason) -> tuple[Decision, Vote]:
        """Spec: ResolveRound. Applies the decision that was found over the store; this rank gives up once it is live.

        Returns the decision, to be carried out, and the last vote, which says STOP, to be posted at once: the others
        may read it as soon as what was decided is live.

        Args:
            num_chunks: How many chunks the round committed, 0 for none.
            reason: Why this rank could not read it.
        """
        self.posted = None
        self.is_leaving = True
        self._stop_word = encode_reason(reason, self.rank)
        if num_chunks:
            decision = Decision(DecisionKind.COMMIT, num_chunks=num_chunks)
            self._decide_commits(num_chunks)
        else:
            decision = Decision(DecisionKind.ABORT, AbortReason.UNRESOLVED_VOTE)
            self._abort(decision)
        self._schedule_next()
        return decision, self._make_vote(0)._replace(round_idx=self.round_idx + 1)

    # -- commits that a round has decided -------------------------------------------------------------------

    @property
    def is_commit_due(self) -> bool:
        """True when the next decided chunk becomes live at this step, before the next forward pass."""
        return self.step_idx >= self.commit_due

    def commit_chunk(self, live_digest: int) -> None:
        """Spec: CommitChunk, and FinishEpoch after the last one. The chunk is live: call it once that is done.

        Args:
            live_digest: Digest of the placement that this rank serves with from now on.
        """
        assert self.plan is not None
        assert self.is_commit_due
        self.lifecycle.fire("commit_chunk")
        self.live_digest = live_digest
        self.chunk_idx += 1
        self.num_decided -= 1
        self.progressed_step = self.step_idx
        self.commit_due = self.step_idx + self._steps_per_commit if self.num_decided else NEVER
        if self.chunk_idx == self.plan.num_chunks:
            cooldown = self.config.cooldown_steps
            self.earliest_next_step = self.step_idx + cooldown if cooldown else self.earliest_next_step
            self._finish("finish_epoch", OutcomeKind.COMMITTED)
        if self.posted is None:
            self._schedule_next()

    def commit_failed(self, detail: str) -> Vote | None:
        """Spec: CommitFailed. A chunk that a round decided to commit is not live here, so no forward pass may follow.

        Returns the last vote, which says STOP, to be posted at once; None if it was posted before.
        """
        return self._last_vote("give_up", StopReason.COMMIT_FAILED, detail)

    def give_up(self, reason: StopReason, detail: str) -> Vote | None:
        """Spec: GiveUp. Stops alone; returns the last vote, which says STOP, to be posted at once.

        None after a resolution, which has cast it.
        Legal only outside the uncertainty window, or after the round in it was resolved and what that decided is live.
        """
        assert not self.in_window
        assert not self.num_decided
        return self._last_vote("give_up", reason, detail)

    def close(self) -> Vote | None:
        """Spec: Close. Returns the last vote, which says STOP, to be posted at once; None if it was posted before.

        A round that is out is not read any more; inside the window the caller must have made that binding first.
        """
        if self.state is State.STOPPED:
            return None
        return self._last_vote("close", StopReason.CLOSED, "closed")

    def _last_vote(self, action: str, reason: StopReason, detail: str) -> Vote | None:
        self._stop_word = encode_reason(reason, self.rank)
        self.round_idx += 1
        vote = None if self.is_leaving else self._make_vote(0)
        self._stop(action, reason, detail)
        return vote

    # -- deciding what to vote --------------------------------------------------------------------------

    def _vote_on_deadlines(self) -> None:
        """Spec: DeadlinePassed. A deadline votes; it never acts."""
        waited = self.step_idx - self.state_entered_step
        if self.is_active:
            if waited > deadline_steps(self.config, self.state, self.plan.deadline_steps if self.plan else 0):
                self._set_abort(AbortReason[f"DEADLINE_{self.state.value}"])
        elif not self.drained and waited > self.config.drain_deadline_steps:
            self._stop_word = encode_reason(StopReason.TRANSPORT, self.rank)

    def _make_vote(self, pass_id: int) -> Vote:
        plan = self.plan
        return Vote(
            protocol_version=PROTOCOL_VERSION,
            generation=self.generation,
            config_fingerprint=self.fingerprint,
            round_idx=self.round_idx,
            step_idx=self.step_idx,
            pass_id=pass_id,
            epoch=self.epoch,
            live_digest=self.live_digest,
            progress=self._progress(),
            chunk_idx=self._next_chunk,
            num_staged=self.num_staged,
            num_chunks=plan.num_chunks if plan else 0,
            plan_digest=plan.digest if plan else 0,
            abort=self._abort_word,
            stop=self._stop_word,
            request=int(self._wants_rebalance or self.is_interval_due),
            drained=int(self.drained),
            freeze=int(self._wants_freeze),
            earliest_next_step=self.earliest_next_step,
            lag=self.wanted_lag,
        )

    def _progress(self) -> Progress:
        if not self.is_active:
            return Progress.IDLE
        if self.state is State.TRANSFERRING:
            return Progress.STAGED if self.num_staged > self._next_chunk else Progress.STAGING
        if self.state is State.AWAITING_CONSENSUS:
            assert self.plan is not None
            return Progress.SKIP if self.plan.skip else Progress.READY
        return Progress.BUSY

    # -- applying a decision ------------------------------------------------------------------------------

    def _apply(self, decision: Decision, tally: Tally) -> None:
        kind = decision.kind
        if kind is DecisionKind.STOP:
            assert isinstance(decision.reason, StopReason)
            self._stop("stop_rebalancing", decision.reason, decision.detail)
            return
        if not self.is_active:
            self.lag = tally.largest.lag
            self.wanted_lag = max(self.wanted_lag, self.lag)
            self.is_frozen = kind is DecisionKind.FREEZE
        if kind is DecisionKind.START:
            self._start(tally.largest.step_idx)
        elif kind is DecisionKind.SKIP:
            self._finish("skip_epoch", OutcomeKind.SKIPPED)
        elif kind is DecisionKind.BEGIN:
            self._enter("begin_transfer")
            self.progressed_step = self.step_idx
        elif kind is DecisionKind.COMMIT:
            self._decide_commits(decision.num_chunks)
        elif kind is DecisionKind.ABORT:
            self._abort(decision)

    @property
    def _next_chunk(self) -> int:
        """The first chunk that no round has decided to commit."""
        return self.chunk_idx + self.num_decided

    @property
    def _may_post_next(self) -> bool:
        """Whether a round posted now has something to decide, and finds what was decided before it live."""
        if not self.num_decided or self.is_leaving:
            return not self.is_leaving
        assert self.plan is not None
        return self._next_chunk < self.plan.num_chunks and self.num_decided <= self.lag

    def _schedule_next(self) -> None:
        """While active rounds are the rarer the longer ranks wait, while idle at the multiples of the interval."""
        if self.state is State.STOPPED or not self._may_post_next:
            self.post_due = NEVER
        elif self.is_active:
            self.post_due = self.step_idx + pause_steps(self.step_idx - self.progressed_step, self.idle_interval)
        else:
            last = self.step_idx - 1 if self.lag else self.step_idx
            self.post_due = (last // self.idle_interval + 1) * self.idle_interval

    def _start(self, posted_at: int) -> None:
        self.epoch += 1
        self.epoch_start_step = self.progressed_step = self.step_idx
        self.chunk_idx = self.num_staged = 0
        self.plan = None
        self._abort_word = 0
        self._wants_rebalance = False
        # From then, not from now: idle rounds are posted at multiples of a small interval, when the next epoch is due.
        self._interval_due = posted_at + self.config.step_interval if self.config.step_interval else NEVER
        self._enter("start_epoch")

    @property
    def _steps_per_commit(self) -> int:
        """A step that commits does nothing else if it can; in the synchronous mode there is only one step."""
        return min(self.lag, 1)

    def _decide_commits(self, num_chunks: int) -> None:
        self.num_decided = num_chunks
        self.progressed_step = self.step_idx
        self.commit_due = self.read_due + self._steps_per_commit

    def _abort(self, decision: Decision) -> None:
        self.earliest_next_step = self.step_idx + self._backoff_steps
        self._backoff_steps = min(2 * self._backoff_steps, self.config.max_backoff_steps)
        self._wants_rebalance = True
        self._end_epoch("abort_epoch", OutcomeKind.ABORTED, decision.reason, decision.detail)

    def _finish(self, action: str, kind: OutcomeKind) -> None:
        self._backoff_steps = self.config.backoff_steps
        self._end_epoch(action, kind, None, "")

    def _stop(self, action: str, reason: StopReason, detail: str) -> None:
        self.stop_reason = reason
        self.stop_detail = detail
        self.post_due = self.read_due = NEVER
        self.posted = None
        self.is_leaving = False
        if self.is_active:
            self._end_epoch(action, OutcomeKind.FAILED, reason, detail)
        else:
            self._enter(action)

    def _end_epoch(self, action: str, kind: OutcomeKind, reason: AbortReason | StopReason | None, detail: str) -> None:
        self.last_outcome = Outcome(
            self.epoch, kind, reason, detail, self.epoch_start_step, end_step=self.step_idx, num_commits=self.chunk_idx
        )
        self.plan = None
        self.chunk_idx = self.num_staged = self.num_decided = 0
        self.commit_due = NEVER
        self._abort_word = 0
        self._enter(action)

    def _enter(self, action: str) -> None:
        self.lifecycle.fire(action)
        self.state_entered_step = self.step_idx
