"""The state graph of real cores: every order in which ranks can make the calls that the driver makes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from typing import Any, NamedTuple

from eplb_fsm.config import RebalanceConfig
from eplb_fsm.core.rank import NEVER, Outcome, PlanTerms, RankCore
from eplb_fsm.core.reasons import AbortReason, StopReason, decode_reason
from eplb_fsm.core.states import State
from eplb_fsm.core.votes import Decision, DecisionKind, Vote, decode_tally, encode_vote
from eplb_fsm.modelcheck.values import Record, Value

VOTE_WORDS = {
    "generation": "generation",
    "round": "round_idx",
    "step": "step_idx",
    "pass": "pass_id",
    "epoch": "epoch",
    "live": "live_digest",
    "progress": "progress",
    "chunk": "chunk_idx",
    "num_chunks": "num_chunks",
    "plan": "plan_digest",
    "abort": "abort",
    "stop": "stop",
    "request": "request",
    "drained": "drained",
    "freeze": "freeze",
    "earliest": "earliest_next_step",
}
"""The fields of the spec's vote, and the words of the code's that they stand for."""

SPEC_NEVER = 1_000_000
NO_VOTE = Record(round=0)
_DIGESTS = {"none": 0, "a": 1, "b": 2, "skip": 3}
_PLAN_NAMES = {digest: name for name, digest in _DIGESTS.items()}
_NUM_KEPT_VOTES = 3


class Call(NamedTuple):
    """One call of a core: an action of the spec, the rank that takes it, and what it is given or returns."""

    action: str
    rank: int
    argument: Value


class Graph:
    """Edges between canonical states, in the order in which they were found.

    A canonical state is what the spec's `core` and `cast` are: for each rank the record of its core and its votes.
    Values are numbered in a table that the graphs to be compared share.
    """

    def __init__(self, table: Table) -> None:
        self.table = table
        self.initial = -1
        self.edges: dict[tuple[int, int, int], None] = {}

    def values(self, edge: tuple[int, int, int]) -> tuple[list[Value], Call, list[Value]]:
        """Return the records of both states of an edge, and the call between them."""
        source, call, target = (self.table.value(number) for number in edge)
        return [self.table.value(n) for n in source], call, [self.table.value(n) for n in target]


class Table:
    """Numbers values: equal ones get the same number."""

    def __init__(self) -> None:
        self._numbers: dict[Any, int] = {}
        self._values: list[Any] = []

    def number(self, value: Any) -> int:
        """Return the number of a value."""
        number = self._numbers.setdefault(value, len(self._values))
        if number == len(self._values):
            self._values.append(value)
        return number

    def value(self, number: int) -> Any:
        """Return the value of a number."""
        return self._values[number]


# -- projections: what of the code the spec speaks of --------------------------------------------------------------


def project_core(core: RankCore) -> Record:
    """Return the record that the spec keeps of a core."""
    return Record(
        state=core.state.value,
        step=core.step_idx,
        epoch=core.epoch,
        round=core.round_idx,
        posted=project_vote(core.posted),
        read_due=SPEC_NEVER if core.posted is None else core.read_due,
        post_due=SPEC_NEVER if core.post_due == NEVER else core.post_due,
        plan=_PLAN_NAMES[core.plan.digest if core.plan else 0],
        chunk=core.chunk_idx,
        staged=core.num_staged,
        abort=decode_reason(core._abort_word)[0],
        stop=decode_reason(core._stop_word)[0],
        request=core._wants_rebalance,
        freeze=core._wants_freeze,
        frozen=core.is_frozen,
        drained=core.drained,
        earliest=core._earliest_next_step,
        entered=core.state_entered_step,
        epoch_start=core.epoch_start_step,
        live=core.live_digest,
        outcome=_project_outcome(core.last_outcome),
    )


def project_vote(vote: Vote | None) -> Record:
    """Return the record that the spec keeps of a vote."""
    if vote is None:
        return NO_VOTE
    record = Record({field: getattr(vote, word) for field, word in VOTE_WORDS.items()})
    record["plan"] = _PLAN_NAMES[vote.plan_digest]
    record["abort"], _ = decode_reason(vote.abort)
    record["stop"], _ = decode_reason(vote.stop)
    for field in ("request", "drained", "freeze"):
        record[field] = record[field] == 1
    return record


def _project_outcome(outcome: Outcome | None) -> Record:
    if outcome is None:
        return Record(epoch=0, kind="none", reason="none", commits=0)
    reason = outcome.reason.name if outcome.reason else "none"
    return Record(epoch=outcome.epoch, kind=outcome.kind.name, reason=reason, commits=outcome.num_commits)


def project_decision(decision: Decision) -> Record:
    """Return the record that the spec keeps of a decision."""
    return Record(kind=decision.kind.value, reason=decision.reason.name if decision.reason else "none")


# -- one rank ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, slots=True)
class Snapshot:
    """All that one core holds, to put it back there; equal cores share one."""

    attributes: dict[str, Any]
    state: State
    is_resolved: bool
    """Its lost decision was resolved over the store: what the driver does next is to give up."""
    canonical: int
    is_active: bool
    in_window: bool
    is_read_due: bool
    is_post_due: bool
    """A rank with neither due, and none that waits for messages, makes its next step."""


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

    def __init__(self, rank: int, setup: Record, table: Table) -> None:
        self._setup: Any = setup
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
        self.initial = self._snapshot(is_resolved=False)

    def step(self, own: Snapshot) -> Snapshot:
        """Return the rank one step later."""
        self._restore(own)
        self._core.step_idx += 1
        return self._snapshot(is_resolved=False)

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

    def _local_calls(self, own: Snapshot) -> Iterator[tuple[str, Value, Callable[[RankCore], Vote | None]]]:
        if own.is_resolved:
            yield self._give_up(StopReason.TIMEOUT)
            return
        if own.attributes["posted"] is None:
            yield from self._late_results(own)
        if own.state is State.STOPPED:
            return
        if own.attributes["posted"] is None:
            yield from self._results(own)
        if own.is_post_due:
            yield from self._posts(own)
        if own.is_read_due and "GiveUp" in self._may:
            yield from self._losses(own)
        yield from self._requests(own)

    def _results(self, own: Snapshot) -> Iterator[tuple[str, Value, Callable[[RankCore], Vote | None]]]:
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

    def _late_results(self, own: Snapshot) -> Iterator[tuple[str, Value, Callable[[RankCore], Vote | None]]]:
        """What the worker reports of an epoch that is over; it must be refused."""
        late = own.attributes["epoch"] - own.is_active
        if "LateResult" in self._may and late > 0:
            terms = self._terms("b")
            yield "LateResult", "LoadCollected", lambda core: _expect(not core.load_collected(late))
            yield "LateResult", "PlanReady", lambda core: _expect(not core.plan_ready(late, terms))
            yield "LateResult", "ChunkStaged", lambda core: _expect(not core.chunk_staged(late, 0))
            reason = AbortReason.WORKER_ERROR
            yield "LateResult", "WorkFailed", lambda core: _expect(not core.work_failed(late, reason))

    def _posts(self, own: Snapshot) -> Iterator[tuple[str, Value, Callable[[RankCore], Vote | None]]]:
        ways = [(0, True)]
        if "Undrained" in self._may and own.attributes["epoch"] > 0:
            ways.append((0, False))
        if "OtherPass" in self._may:
            ways.append((1, True))
        for pass_id, drained in ways:
            argument = Record({"pass": pass_id, "drained": drained})
            yield "PostVote", argument, lambda core, way=(pass_id, drained): _post_vote(core, *way)

    def _losses(self, own: Snapshot) -> Iterator[tuple[str, Value, Callable[[RankCore], Vote | None]]]:
        """A round that is due is lost: inside the window the store says what was decided, outside it gives up."""
        if own.in_window:
            for committed in (False, True):
                yield "ResolveRound", committed, lambda core, it=committed: _resolve_round(core, committed=it)
        else:
            yield self._give_up(StopReason.TIMEOUT)
            yield self._give_up(StopReason.TRANSPORT)

    def _give_up(self, reason: StopReason) -> tuple[str, Value, Callable[[RankCore], Vote | None]]:
        return "GiveUp", reason.name, lambda core: core.give_up(reason, "lost")

    def _requests(self, own: Snapshot) -> Iterator[tuple[str, Value, Callable[[RankCore], Vote | None]]]:
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
        if "Close" in self._may:
            yield "Close", "CLOSED", lambda core: core.close()
        if "OtherPlacement" in self._may and own.attributes["live_digest"] >= 0:
            yield "OtherPlacement", "none", lambda core: setattr(core, "live_digest", -1)

    def _reads(self, own: Snapshot, votes: tuple[Vote, ...]) -> Iterator[Move]:
        tally = decode_tally([max(column) for column in zip(*map(encode_vote, votes), strict=True)])
        self._restore(own)
        decision = self._core.read_round(tally)
        is_commit = decision.kind is DecisionKind.COMMIT
        self._core.live_digest += is_commit
        yield Move("ReadRound", project_decision(decision), self._snapshot(is_resolved=False), None)
        if is_commit and "CommitFailed" in self._may:
            self._restore(own)
            self._core.read_round(tally)
            vote = self._core.commit_failed("cannot write")
            yield Move("CommitFailed", "COMMIT_FAILED", self._snapshot(is_resolved=False), vote)

    # -- the core ------------------------------------------------------------------------------------------------

    def _terms(self, name: str) -> PlanTerms:
        is_skip = name == "skip"
        num_chunks = 0 if is_skip else self._setup["num_chunks"]
        return PlanTerms(_DIGESTS[name], num_chunks, self._setup["deadline"]["TRANSFERRING"], is_skip)

    def _make(self, own: Snapshot, action: str, argument: Value, call: Callable[[RankCore], Vote | None]) -> Move:
        self._restore(own)
        vote = call(self._core)
        return Move(action, argument, self._snapshot(is_resolved=action == "ResolveRound"), vote)

    def _restore(self, own: Snapshot) -> None:
        vars(self._core).update(own.attributes)
        self._core.lifecycle.state = own.state

    def _snapshot(self, *, is_resolved: bool) -> Snapshot:
        core = self._core
        attributes = {name: value for name, value in vars(core).items() if name not in ("lifecycle", "config")}
        plan = astuple(core.plan) if core.plan else None
        key = (core.state, is_resolved, *({**attributes, "plan": plan}.values()))
        if key not in self._snapshots:
            is_due = core.state is not State.STOPPED and core.step_idx >= core.next_due
            self._snapshots[key] = Snapshot(
                attributes=attributes,
                state=core.state,
                is_resolved=is_resolved,
                canonical=self._table.number(project_core(core)),
                is_active=core.is_active,
                in_window=core.in_window,
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


def _resolve_round(core: RankCore, *, committed: bool) -> None:
    decision = core.resolve_round(committed=committed, reason=StopReason.TIMEOUT)
    core.live_digest += decision.kind is DecisionKind.COMMIT


# -- all ranks -----------------------------------------------------------------------------------------------------


class _State(NamedTuple):
    ranks: tuple[Snapshot, ...]
    cast: tuple[tuple[Vote | None, ...], ...]


class Explorer:
    """Breadth-first search over the cores of all ranks.

    Args:
        setup: The constants of the spec, as TLC prints them.
        table: Numbers what the graph is made of.
    """

    def __init__(self, setup: Record, table: Table) -> None:
        self._setup: Any = setup
        self._ranks = [ReplayedRank(rank, setup, table) for rank in range(self._setup["num_ranks"])]
        self._table = table
        self._casts: dict[tuple[Vote | None, ...], int] = {}

    def explore(self) -> Graph:
        """Return the graph of all that can be reached."""
        graph = Graph(self._table)
        no_votes = (None,) * _NUM_KEPT_VOTES
        first = _State(tuple(rank.initial for rank in self._ranks), (no_votes,) * len(self._ranks))
        graph.initial = self._canonical(first)
        seen = {first}
        queue = deque(seen)
        while queue:
            state = queue.popleft()
            source = self._canonical(state)
            for call, target in self._moves(state):
                if any(own.attributes["epoch"] > self._setup["max_epochs"] for own in target.ranks):
                    continue
                graph.edges[source, self._table.number(call), self._canonical(target)] = None
                if target not in seen:
                    seen.add(target)
                    queue.append(target)
        return graph

    def _moves(self, state: _State) -> Iterator[tuple[Call, _State]]:
        for rank, own in enumerate(state.ranks):
            for move in self._rank_moves(state, rank, own):
                ranks = (*state.ranks[:rank], move.after, *state.ranks[rank + 1 :])
                cast = state.cast
                if move.vote is not None:
                    votes = (move.vote, *cast[rank][: _NUM_KEPT_VOTES - 1])
                    cast = (*cast[:rank], votes, *cast[rank + 1 :])
                yield Call(move.action, rank, move.argument), _State(ranks, cast)

    def _rank_moves(self, state: _State, rank: int, own: Snapshot) -> Iterator[Move]:
        yield from self._ranks[rank].local_moves(own)
        if own.is_resolved or own.state is State.STOPPED:
            return
        if own.is_read_due:
            votes = self._votes_of(state, own.attributes["round_idx"])
            if votes is not None:
                yield from self._ranks[rank].read_moves(own, votes)
        elif not own.is_post_due and self._may_step(state, own):
            yield Move("Step", "none", self._ranks[rank].step(own), None)

    def _may_step(self, state: _State, own: Snapshot) -> bool:
        """In lockstep nobody is a forward pass behind, but who has left."""
        step_idx = own.attributes["step_idx"]
        in_pass = all(it.state is State.STOPPED or it.attributes["step_idx"] >= step_idx for it in state.ranks)
        return in_pass and step_idx < self._setup["max_steps"]

    def _votes_of(self, state: _State, round_idx: int) -> tuple[Vote, ...] | None:
        """The votes of a round, None while one is missing."""
        votes = [vote for cast in state.cast for vote in cast if vote is not None and vote.round_idx == round_idx]
        return tuple(votes) if len(votes) == len(state.cast) else None

    def _canonical(self, state: _State) -> int:
        casts = [self._cast_number(cast) for cast in state.cast]
        return self._table.number((*(own.canonical for own in state.ranks), *casts))

    def _cast_number(self, cast: tuple[Vote | None, ...]) -> int:
        if cast not in self._casts:
            self._casts[cast] = self._table.number(tuple(project_vote(vote) for vote in cast))
        return self._casts[cast]
