"""One real core that can be put back into any state it was in, and the calls that the driver makes on it there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import astuple, dataclass
from typing import Any, NamedTuple, TypeAlias

from graphs import Table
from projections import PLAN_DIGESTS, project_core, project_decision

from eplb_fsm.config import RebalanceConfig
from eplb_fsm.core.rank import PlanTerms, RankCore
from eplb_fsm.core.reasons import AbortReason, StopReason
from eplb_fsm.core.states import State
from eplb_fsm.core.votes import Vote, decode_tally, encode_vote
from eplb_fsm.modelcheck.values import Record, Value

Calls: TypeAlias = "Iterator[tuple[str, Value, Callable[[RankCore], Vote | None]]]"
"""Actions, what they are given, and how they are made on a core; those that cast a vote return it."""


@dataclass(frozen=True, eq=False, slots=True)
class Snapshot:
    """All that one core holds, to put it back there; equal cores share one."""

    attributes: dict[str, Any]
    state: State
    canonical: int
    is_active: bool
    in_window: bool
    has_left: bool
    """It makes no step any more: it is stopped, or all that is left to do is to give up."""
    is_commit_due: bool
    is_read_due: bool
    is_post_due: bool
    """A rank with none of them due, and none that waits for messages, makes its next step."""


class Move(NamedTuple):
    """A call that was made on a core: what it was, the core after it, and the vote that it cast."""

    action: str
    argument: Value
    after: Snapshot
    vote: Vote | None


class ReplayedRank:
    """One real core that is put into any state that was reached before.

    Args:
        rank: The rank.
        setup: The constants of the spec.
        table: Numbers the canonical records.
    """

    def __init__(self, rank: int, setup: Mapping[str, Any], table: Table) -> None:
        self._setup = setup
        self._may = self._setup["allowed"][rank]
        self._plans = self._setup["plans"][rank]
        self._table = table
        self._snapshots: dict[Any, Snapshot] = {}
        self._local_moves: dict[Snapshot, list[Move]] = {}
        self._read_moves: dict[tuple[Snapshot, tuple[Vote, ...]], list[Move]] = {}
        deadline = self._setup["deadline"]
        config = RebalanceConfig(
            step_interval=0,
            idle_round_interval=self._setup["idle_interval"],
            collecting_deadline_steps=deadline["COLLECTING"],
            computing_deadline_steps=deadline["COMPUTING"],
            awaiting_consensus_deadline_steps=deadline["AWAITING_CONSENSUS"],
            drain_deadline_steps=self._setup["drain_deadline"],
            backoff_steps=self._setup["backoff"],
            max_backoff_steps=self._setup["backoff"],
        )
        self._core = RankCore(rank, config, live_digest=0, lag=self._setup["lag"])
        if rank in self._setup["asking"]:
            self._core.request_rebalance()
        self.initial = self._snapshot()

    def step(self, own: Snapshot, steps: int) -> Snapshot:
        """Return the rank some steps later; more than one where the engine's pass numbers have skipped some."""
        self._restore(own)
        self._core.step_idx += steps
        return self._snapshot()

    def local_moves(self, own: Snapshot) -> list[Move]:
        """Return the calls that need nothing from other ranks."""
        if own not in self._local_moves:
            self._local_moves[own] = [self._make(own, *call) for call in self._local_calls(own)]
        return self._local_moves[own]

    def read_moves(self, own: Snapshot, votes: tuple[Vote, ...]) -> list[Move]:
        """Return the calls that reading the votes of all ranks may lead to."""
        key = own, votes
        if key not in self._read_moves:
            self._read_moves[key] = list(self._reads(own, votes))
        return self._read_moves[key]

    # -- what the driver calls when ----------------------------------------------------------------------------

    def _local_calls(self, own: Snapshot) -> Calls:
        if own.is_commit_due:
            yield from self._commits()
        if "Close" in self._may:
            yield "Close", "CLOSED", lambda core: core.close()
        if own.attributes["is_leaving"]:
            if own.has_left:
                yield self._give_up(StopReason.TIMEOUT)
            return
        takes = own.attributes["posted"] is None and not own.is_commit_due
        if takes:
            yield from self._late_results(own)
        if own.state is State.STOPPED:
            return
        if takes:
            yield from self._results(own)
        if own.is_post_due:
            yield from self._posts(own)
        if own.is_read_due and "GiveUp" in self._may:
            yield from self._losses(own)
        yield from self._requests(own)

    def _commits(self) -> Calls:
        """What a round has decided becomes live, or cannot."""
        yield "CommitChunk", "none", lambda core: core.commit_chunk(core.live_digest + 1)
        if "CommitFailed" in self._may:
            yield "CommitFailed", "COMMIT_FAILED", lambda core: core.commit_failed("cannot write")

    def _results(self, own: Snapshot) -> Calls:
        """What the worker reports of the epoch under way."""
        if own.state is State.COLLECTING:
            yield "LoadCollected", "none", lambda core: _expect(core.load_collected(core.epoch))
        if own.state is State.COMPUTING:
            for name in self._plans:
                terms = self._terms(name)
                yield "PlanReady", name, lambda core, terms=terms: _expect(core.plan_ready(core.epoch, terms))
        if own.state is State.TRANSFERRING and own.attributes["num_staged"] < self._setup["num_chunks"]:
            yield "ChunkStaged", "none", lambda core: _expect(core.chunk_staged(core.epoch, core.num_staged))
        if own.is_active:
            for reason in AbortReason:
                if reason.name in self._may:
                    yield "WorkFailed", reason.name, lambda core, it=reason: _ignore(core.work_failed(core.epoch, it))
        if "TransportLost" in self._may:
            yield "TransportLost", "none", lambda core: core.transport_lost()

    def _late_results(self, own: Snapshot) -> Calls:
        """What the worker reports of an epoch that is over; it must be refused."""
        late = own.attributes["epoch"] - own.is_active
        if "LateResult" in self._may and late > 0:
            terms = self._terms("b")
            yield "LateResult", "LoadCollected", lambda core: _expect(not core.load_collected(late))
            yield "LateResult", "PlanReady", lambda core: _expect(not core.plan_ready(late, terms))
            yield "LateResult", "ChunkStaged", lambda core: _expect(not core.chunk_staged(late, 0))
            reason = AbortReason.WORKER_ERROR
            yield "LateResult", "WorkFailed", lambda core: _expect(not core.work_failed(late, reason))

    def _posts(self, own: Snapshot) -> Calls:
        ways = [(0, True)]
        if "Undrained" in self._may and own.attributes["epoch"] > 0 and not own.is_active:
            ways.append((0, False))
        if "OtherPass" in self._may:
            ways.append((1, True))
        for pass_id, drained in ways:
            argument = Record({"pass": pass_id, "drained": drained})
            yield "PostVote", argument, lambda core, way=(pass_id, drained): _post_vote(core, *way)

    def _losses(self, own: Snapshot) -> Calls:
        """A round that is due is lost: inside the window the store says what was decided, outside it gives up."""
        if own.in_window:
            posted: Vote = own.attributes["posted"]
            for num_chunks in range(posted.num_staged - posted.chunk_idx + 1):
                yield "ResolveRound", num_chunks, lambda core, it=num_chunks: _resolve_round(core, it)
        else:
            yield self._give_up(StopReason.TIMEOUT)
            yield self._give_up(StopReason.TRANSPORT)

    def _give_up(self, reason: StopReason) -> tuple[str, Value, Callable[[RankCore], Vote | None]]:
        return "GiveUp", reason.name, lambda core: core.give_up(reason, "lost")

    def _requests(self, own: Snapshot) -> Calls:
        asks: dict[str, Callable[[RankCore], None]] = {
            "RequestRebalance": RankCore.request_rebalance,
            "RequestFreeze": RankCore.request_freeze,
            "RequestUnfreeze": RankCore.request_unfreeze,
            "RequestAbort": RankCore.request_abort,
            "RequestStop": RankCore.request_stop,
        }
        for name, ask in asks.items():
            if name in self._may:
                yield name, "none", ask
        if "OtherPlacement" in self._may and own.attributes["live_digest"] >= 0:
            yield "OtherPlacement", "none", lambda core: setattr(core, "live_digest", -1)

    def _reads(self, own: Snapshot, votes: tuple[Vote, ...]) -> Iterator[Move]:
        tally = decode_tally([max(column) for column in zip(*map(encode_vote, votes), strict=True)])
        self._restore(own)
        decision = self._core.read_round(tally)
        yield Move("ReadRound", project_decision(decision), self._snapshot(), None)

    # -- the core ------------------------------------------------------------------------------------------------

    def _terms(self, name: str) -> PlanTerms:
        is_skip = name == "skip"
        num_chunks = 0 if is_skip else self._setup["num_chunks"]
        return PlanTerms(PLAN_DIGESTS[name], num_chunks, self._setup["deadline"]["TRANSFERRING"], is_skip)

    def _make(self, own: Snapshot, action: str, argument: Value, call: Callable[[RankCore], Vote | None]) -> Move:
        self._restore(own)
        vote = call(self._core)
        return Move(action, argument, self._snapshot(), vote)

    def _restore(self, own: Snapshot) -> None:
        vars(self._core).update(own.attributes)
        self._core.lifecycle.state = own.state

    def _snapshot(self) -> Snapshot:
        core = self._core
        attributes = {name: value for name, value in vars(core).items() if name not in ("lifecycle", "config")}
        plan = astuple(core.plan) if core.plan else None
        key = (core.state, *({**attributes, "plan": plan}.values()))
        if key not in self._snapshots:
            # As in the driver: commits come first.
            is_due = core.state is not State.STOPPED and core.step_idx >= core.next_due and not core.is_commit_due
            self._snapshots[key] = Snapshot(
                attributes=attributes,
                state=core.state,
                canonical=self._table.number(project_core(core)),
                is_active=core.is_active,
                in_window=core.in_window,
                has_left=core.state is State.STOPPED or (core.is_leaving and not core.num_decided),
                is_commit_due=core.is_commit_due,
                is_read_due=is_due and core.posted is not None,
                is_post_due=is_due and core.posted is None,
            )
        return self._snapshots[key]


def _expect(is_as_expected: bool) -> None:
    assert is_as_expected


def _ignore(_: object) -> None:
    """For a call whose result says nothing that its effect does not."""


def _post_vote(core: RankCore, pass_id: int, drained: bool) -> Vote:
    core.drained = drained
    return core.post_vote(pass_id)


def _resolve_round(core: RankCore, num_chunks: int) -> Vote:
    _, last_vote = core.resolve_round(num_chunks, StopReason.TIMEOUT)
    return last_vote
