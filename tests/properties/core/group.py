"""Bare cores in a group: what happens to which of them is data, and every round reaches all or is lost on some."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from hypothesis import strategies as st

from eplb_fsm.config import RebalanceConfig
from eplb_fsm.core.rank import PlanTerms, RankCore
from eplb_fsm.core.reasons import AbortReason, StopReason
from eplb_fsm.core.resolution import Journal, resolve
from eplb_fsm.core.states import State
from eplb_fsm.core.votes import Decision, Vote, decode_tally, encode_vote
from eplb_fsm.observe.events import Event
from eplb_fsm.observe.recorder import EventRecorder

MAX_LAG = 4
TRANSFER_DEADLINE = 4


class Setup(NamedTuple):
    """What is the same on all ranks."""

    num_ranks: int = 2
    lag: int = 2
    num_chunks: int = 2
    step_interval: int = 0
    staged_at_once: int = 1

    @property
    def config(self) -> RebalanceConfig:
        """Deadlines of a few steps, so that they pass."""
        return RebalanceConfig(
            step_interval=self.step_interval,
            idle_round_interval=2,
            collecting_deadline_steps=3,
            computing_deadline_steps=3,
            awaiting_consensus_deadline_steps=3,
            drain_deadline_steps=6,
            backoff_steps=2,
            max_backoff_steps=5,
            staging_buffers=self.num_chunks,
        )


class Rank:
    """A core and what surrounds it: a worker that does a job a step, or stages some chunks, and whatever goes wrong."""

    def __init__(self, rank: int, setup: Setup, events: list[Event]) -> None:
        self.core = RankCore(rank, setup.config, 0, lag=setup.lag)
        self.num_chunks = setup.num_chunks
        self.staged_at_once = setup.staged_at_once
        self.recorder = EventRecorder(self.core, [_Into(events)])
        self.votes: dict[int, Vote] = {}
        """By round; those of a rank that has stopped count as well."""
        self.plan_digest = 1
        self.sees_gain = True
        self.is_stuck = False
        self.delays: dict[State, int] = {}
        """Steps that it takes at least from the beginning of a state to the end of the first job in it."""
        self.loses_next = False
        self.loses_promised = False
        self.fails_next_commit = False
        self._outcome = self.core.last_outcome
        self.num_commits = 0
        """According to its outcomes."""

    @property
    def is_up(self) -> bool:
        """Whether it still votes."""
        return self.core.state is not State.STOPPED

    @property
    def is_losing(self) -> bool:
        """Whether the decision that is due does not reach it."""
        return self.loses_next or (self.loses_promised and self.core.in_window)

    def cast(self, vote: Vote) -> None:
        """Have the others see a vote."""
        self.votes[vote.round_idx] = vote

    def vote(self) -> None:
        """Vote, which has to say what the core says that it wishes."""
        vote = self.core.post_vote(0)
        wants_rebalance, wants_freeze, *words = self.core.wishes
        assert [vote.request >= wants_rebalance, vote.freeze, vote.abort, vote.stop] == [True, wants_freeze, *words]
        self.cast(vote)
        self.recorder.record_vote(vote)

    def note(self, action: str, **detail: object) -> None:
        """Record what the core has just done, with the outcome if that ended an epoch."""
        outcome = self.core.last_outcome
        is_new = outcome is not None and outcome is not self._outcome
        self._outcome = outcome
        if is_new and outcome is not None:
            self.num_commits += outcome.num_commits
        self.recorder.record(action, outcome=outcome.kind.name if is_new and outcome is not None else "", **detail)

    def carry_out(self, decision: Decision, action: str) -> None:
        """Do what a decision asks for."""
        reason = decision.reason.name if decision.reason else ""
        self.note(action, decision=decision.kind.value, reason=reason, num_chunks=decision.num_chunks)

    def commit(self) -> None:
        """Make live what is due; a rank that has found out by itself what was decided leaves when all of it is."""
        core = self.core
        while core.is_commit_due:
            if self.fails_next_commit:
                self.stop_alone(lambda: core.commit_failed("no"), "CommitFailed", text="no")
                return
            chunk = core.chunk_idx
            core.commit_chunk(core.live_digest + 1)
            self.note("CommitChunk", chunk=chunk)
        if core.is_leaving and not core.num_decided:
            self.stop_alone(lambda: core.give_up(StopReason.TIMEOUT, "lost"), "GiveUp")

    def work(self) -> None:
        """Let the worker finish the job it has, if any."""
        core = self.core
        if self.is_stuck or core.step_idx - core.state_entered_step < self.delays.get(core.state, 0):
            return
        if core.load_collected(core.epoch):
            self.note("LoadCollected")
        elif core.state is State.COMPUTING:
            digest, chunks = self.plan_digest, self.num_chunks
            core.plan_ready(core.epoch, PlanTerms(digest, chunks, TRANSFER_DEADLINE, skip=not self.sees_gain))
            self.note("PlanReady", plan_digest=digest, deadline_steps=TRANSFER_DEADLINE)
        elif core.state is State.TRANSFERRING:
            for chunk_idx in range(core.num_staged, min(core.num_staged + self.staged_at_once, self.num_chunks)):
                core.chunk_staged(core.epoch, chunk_idx)
                self.note("ChunkStaged")

    def stop_alone(self, leave: Callable[[], Vote | None], action: str, **detail: object) -> None:
        """Close or give up, with a last vote if that is not out yet."""
        was_up = self.is_up
        vote = leave()
        if vote is not None:
            self.cast(vote)
        if was_up:
            self.note(action, **detail)


class _Into:
    """An observer that keeps events."""

    def __init__(self, events: list[Event]) -> None:
        self.on_event = events.append


class Group:
    """Ranks that step together.

    Attributes:
        events: What all ranks did.
        results_of_another_epoch: How often a core took a result that was not of its epoch.
    """

    def __init__(self, setup: Setup) -> None:
        self.events: list[Event] = []
        self.ranks = [Rank(rank, setup, self.events) for rank in range(setup.num_ranks)]
        self.results_of_another_epoch = 0

    def step(self) -> None:
        """One step on every rank: commit and read what is due, take what workers have done, vote what is due."""
        up = [rank for rank in self.ranks if rank.is_up]
        for rank in up:
            rank.core.step_idx += 1
            rank.commit()
        reading = [rank for rank in up if rank.core.posted is not None and rank.core.step_idx >= rank.core.read_due]
        if reading:
            self._read(reading)
        for rank in self.ranks:
            rank.commit()
            rank.work()
            if rank.is_up and rank.core.posted is None and rank.core.step_idx >= rank.core.post_due:
                rank.vote()

    def _read(self, reading: list[Rank]) -> None:
        round_idx = reading[0].core.round_idx
        words = [encode_vote(rank.votes[round_idx]) for rank in self.ranks]
        tally = decode_tally([*map(max, *words)])
        losing = [rank for rank in reading if rank.is_losing]
        windows = [rank for rank in losing if rank.core.in_window]
        journals = [Journal(gave_up_round=round_idx) for _ in windows]
        for rank in losing:
            if rank not in windows:
                rank.stop_alone(lambda rank=rank: rank.core.give_up(StopReason.TIMEOUT, "lost"), "GiveUp")
                journals.append(Journal(round_idx, read_round=0, stopped_from_round=round_idx + 1))
        for rank in reading:
            if rank not in losing:
                decision = rank.core.read_round(tally)
                rank.carry_out(decision, "ReadRound")
                journals.append(Journal(round_idx, True, round_idx, decision.num_chunks))
        for rank in windows:
            self._resolve(rank, journals, round_idx)

    def _resolve(self, rank: Rank, journals: list[Journal], round_idx: int) -> None:
        num_chunks = resolve(journals, round_idx)
        assert num_chunks is not None  # all have said what they know
        decision, last_vote = rank.core.resolve_round(num_chunks, StopReason.TIMEOUT)
        rank.cast(last_vote)
        rank.carry_out(decision, "ResolveRound")

    def happen(self, deed: str, rank_idx: int) -> None:
        """Let something happen to a rank that still votes."""
        rank = self.ranks[rank_idx % len(self.ranks)]
        if deed in WISHES and rank.is_up:
            getattr(rank.core, deed)()
        elif deed in HAPPENS and rank.is_up:
            HAPPENS[deed](rank)
        elif deed == "results of another epoch":
            core, plan = rank.core, PlanTerms(9, 9, 9)
            taken = core.load_collected(core.epoch + 1), core.plan_ready(core.epoch - 1, plan)
            more = core.chunk_staged(core.epoch - 1, 7), core.work_failed(core.epoch + 1, AbortReason.LOAD_ERROR)
            self.results_of_another_epoch += sum((*taken, *more))


def _fail(rank: Rank) -> None:
    if rank.core.work_failed(rank.core.epoch, AbortReason.TRANSFER_ERROR):
        rank.note("WorkFailed")


def _leave_undrained(rank: Rank) -> None:
    """Only a transfer can be under way."""
    rank.core.drained &= rank.core.state is not State.TRANSFERRING


def _close(rank: Rank) -> None:
    """A rank that has promised a commit makes its leaving binding first, which is no matter of the core's."""
    if not rank.core.in_window:
        rank.stop_alone(rank.core.close, "Close")
    assert rank.is_up or rank.core.close() is None


WISHES = (
    "request_rebalance",
    "request_abort",
    "request_freeze",
    "request_unfreeze",
    "request_stop",
    "transport_lost",
)
HAPPENS: dict[str, Callable[[Rank], object]] = {
    "its worker stops": lambda it: setattr(it, "is_stuck", True),
    "its worker goes on": lambda it: setattr(it, "is_stuck", False),
    "its work fails": _fail,
    "a transfer hangs": _leave_undrained,
    "the transfer ends": lambda it: setattr(it.core, "drained", True),
    "it has another plan": lambda it: setattr(it, "plan_digest", 2),
    "it sees no gain": lambda it: setattr(it, "sees_gain", False),
    "it loses a round": lambda it: setattr(it, "loses_next", True),
    "it loses a promised round": lambda it: setattr(it, "loses_promised", True),
    "it asks for more lag": lambda it: setattr(it.core, "wanted_lag", min(it.core.wanted_lag + 1, MAX_LAG)),
    "it is closed": _close,
}
DEEDS = (*WISHES, *HAPPENS, "results of another epoch")

SETUPS = st.builds(
    Setup,
    num_ranks=st.integers(2, 3),
    lag=st.integers(1, 3),
    num_chunks=st.integers(1, 4),
    step_interval=st.sampled_from((0, 6)),
    staged_at_once=st.integers(1, 3),
)
SCRIPTS = st.lists(
    st.tuples(
        st.sampled_from(DEEDS),
        st.sampled_from(((0,), (1,), (0, 1, 2))),
        st.sampled_from((0, 1, 2, 4, 9, 20)),
    ),
    max_size=12,
)
"""What happens, to which ranks, and how many steps they make after it."""


def play(setup: Setup, script: list[tuple[str, tuple[int, ...], int]]) -> Group:
    """A group that wants a rebalance, and what comes of it."""
    group = Group(setup)
    group.happen("request_rebalance", 0)
    for deed, ranks, num_steps in script:
        for rank in ranks[: setup.num_ranks]:
            group.happen(deed, rank)
        for _ in range(num_steps):
            group.step()
    for _ in range(30):
        group.step()
    return group
