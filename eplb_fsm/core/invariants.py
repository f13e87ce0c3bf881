"""What must hold in every run, as pure functions over what the ranks did: the invariants of the spec by name.

Each function takes the events of all ranks (each rank's own in the order in which it recorded them; how the ranks
are interleaved does not matter) or the forward passes, and returns a sentence for each violation. An empty list
means that the invariant holds. Simulations, property tests and recorded traces go through the same functions.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from eplb_fsm.core.states import ACTIVE_STATES

_ACTIVE = frozenset(state.value for state in ACTIVE_STATES)
_READS = ("ReadRound", "ResolveRound")


class Recorded(Protocol):
    """An event: what a rank did and its state after it (:class:`eplb_fsm.observe.events.Event`)."""

    @property
    def rank(self) -> int:
        """The rank."""
        ...

    @property
    def step_idx(self) -> int:
        """The step at which it happened."""
        ...

    @property
    def action(self) -> str:
        """The action's name in the spec."""
        ...

    @property
    def state(self) -> str:
        """The rank's state after it."""
        ...

    @property
    def epoch(self) -> int:
        """The rank's current or last epoch."""
        ...

    @property
    def round_idx(self) -> int:
        """The last round that the rank posted a vote in."""
        ...

    @property
    def is_drained(self) -> bool:
        """Whether no transfer was under way on the rank."""
        ...

    @property
    def is_frozen(self) -> bool:
        """Whether a freeze held on the rank."""
        ...

    @property
    def live_digest(self) -> int:
        """Digest of the placement that the rank served with."""
        ...

    @property
    def detail(self) -> Mapping[str, Any]:
        """What the action was about."""
        ...


class Forward(NamedTuple):
    """The map of one forward pass on one rank, as the device saw it."""

    rank: int
    pass_idx: int
    used_map: Hashable
    """Anything that is equal exactly when the maps are."""


def no_torn_forward(forwards: Iterable[Forward]) -> list[str]:
    """In no forward pass do two ranks use different maps."""
    first: dict[int, Forward] = {}
    torn = []
    for forward in forwards:
        other = first.setdefault(forward.pass_idx, forward)
        if other.used_map != forward.used_map:
            torn.append(f"pass {forward.pass_idx}: ranks {other.rank} and {forward.rank} used different maps")
    return torn


def live_equals_map(held: Sequence[Hashable], mapped: Sequence[Hashable]) -> list[str]:
    """What a slot holds is what the map says: both by slot, one entry for each slot of a layer."""
    pairs = enumerate(zip(held, mapped, strict=True))
    return [f"slot {slot} holds {has}, the map says {says}" for slot, (has, says) in pairs if has != says]


def replicas_equal(mapped: Sequence[int], contents: Sequence[Hashable]) -> list[str]:
    """All slots that the map gives to one logical expert hold the same: both by slot, -1 for an empty slot."""
    first: dict[int, tuple[int, Hashable]] = {}
    different = []
    for slot, (expert, content) in enumerate(zip(mapped, contents, strict=True)):
        other_slot, other = first.setdefault(expert, (slot, content))
        if expert >= 0 and other != content:
            different.append(f"slots {other_slot} and {slot} of expert {expert} differ")
    return different


def every_expert_reachable(mapped: Sequence[int], num_logical_experts: int) -> list[str]:
    """Every logical expert of a layer has a slot."""
    return [f"expert {expert} has no slot" for expert in range(num_logical_experts) if expert not in mapped]


class _History(list[Recorded]):
    """The events of all ranks, sorted once for all invariants."""

    def __init__(self, events: Iterable[Recorded]) -> None:
        super().__init__(events)
        self.by_rank: dict[int, list[Recorded]] = {}
        """Each rank's own."""
        self.votes: list[Recorded] = []
        self.reads: list[tuple[Recorded, str]] = []
        """Rounds that were read, and what they decided."""
        self.commits: list[Recorded] = []
        """Chunks that became live."""
        self.others: list[Recorded] = []
        for event in self:
            self.by_rank.setdefault(event.rank, []).append(event)
            action = event.action
            if action == "PostVote":
                self.votes.append(event)
            elif action in _READS:
                self.reads.append((event, str(event.detail.get("decision", ""))))
            elif action == "CommitChunk":
                self.commits.append(event)
            else:
                self.others.append(event)

    @classmethod
    def of(cls, events: Iterable[Recorded]) -> _History:
        """Return the events as they are if they were sorted before."""
        return events if isinstance(events, cls) else cls(events)

    def read(self, decision: str) -> list[Recorded]:
        """Return the rounds that were read and decided this."""
        return [event for event, decided in self.reads if decided == decision]


def same_step_commit(events: Iterable[Recorded]) -> list[str]:
    """What a round commits on one rank it commits on all that go on, each chunk at the same step, to the same map."""
    history = _History.of(events)
    wrong = []
    first_of: dict[tuple[int, int], Recorded] = {}
    for event in history.commits:
        chunk = event.detail["chunk"]
        first = first_of.setdefault((event.epoch, chunk), event)
        for word in ("step_idx", "live_digest"):
            if getattr(first, word) != getattr(event, word):
                wrong.append(
                    f"epoch {event.epoch}: commits chunk {chunk} with {word} {getattr(first, word)} on rank "
                    f"{first.rank} and {getattr(event, word)} on rank {event.rank}"
                )
    committed = {event.round_idx: event for event in reversed(history.read("COMMIT"))}
    has_read = {(event.rank, event.round_idx) for event, _ in history.reads}
    passed_by = [(event, event.round_idx) for event, decision in history.reads if decision != "COMMIT"]
    for event in history.others:
        # A last vote counts a round of its own, after the one whose decision is not read any more.
        if event.action == "GiveUp" and (event.rank, event.round_idx - 1) not in has_read:
            passed_by.append((event, event.round_idx - 1))
    for event, idx in passed_by:
        if idx in committed:
            wrong.append(f"round {idx}: rank {committed[idx].rank} committed, rank {event.rank} did not")
    return wrong


def same_decision(events: Iterable[Recorded]) -> list[str]:
    """All ranks that read a round read the same decision at the same step."""
    first: dict[int, Recorded] = {}
    wrong = []
    for event, _ in _History.of(events).reads:
        if event.action != "ReadRound":
            continue
        other = first.setdefault(event.round_idx, event)
        if _what_was_read(other) != _what_was_read(event):
            wrong.append(
                f"round {event.round_idx}: rank {other.rank} read {_name_of_read(other)} at step {other.step_idx}, "
                f"rank {event.rank} read {_name_of_read(event)} at step {event.step_idx}"
            )
    return wrong


def same_plan(events: Iterable[Recorded]) -> list[str]:
    """All ranks that begin to transfer in an epoch hold the same plan."""
    wrong = []
    digest_of: dict[int, tuple[int, int]] = {}
    for own in _History.of(events).by_rank.values():
        ready: dict[int, int] = {}
        for event in own:
            if event.action == "PlanReady":
                ready[event.epoch] = event.detail["plan_digest"]
            elif ready and _is_read(event, "BEGIN") and event.epoch in ready:
                rank, digest = digest_of.setdefault(event.epoch, (event.rank, ready[event.epoch]))
                if digest != ready[event.epoch]:
                    wrong.append(f"epoch {event.epoch}: ranks {rank} and {event.rank} begin with different plans")
    return wrong


def no_transfer_without_consensus(events: Iterable[Recorded]) -> list[str]:
    """No rank stages or commits in an epoch before it has read BEGIN, and it has a plan by then."""
    wrong = []
    for own in _History.of(events).by_rank.values():
        has_plan = has_begun = False
        for event in own:
            action = event.action
            if action == "PostVote":
                continue
            decision = _decision(event) if action in _READS else ""
            if decision == "START":
                has_plan = has_begun = False
            elif action == "PlanReady":
                has_plan = True
            elif decision == "BEGIN":
                has_begun = True
                if not has_plan:
                    wrong.append(f"rank {event.rank} begins epoch {event.epoch} without a plan")
            elif action in ("ChunkStaged", "CommitChunk") and not has_begun:
                wrong.append(f"rank {event.rank} moves weights in epoch {event.epoch} without a BEGIN")
    return wrong


def commit_is_decided(events: Iterable[Recorded]) -> list[str]:
    """No rank commits a chunk that no round has decided, nor reads another round or stops alone while one is left."""
    wrong = []
    for own in _History.of(events).by_rank.values():
        num_left = 0
        for event in own:
            if event.action in _READS:
                if num_left > 0:
                    wrong.append(f"rank {event.rank} reads round {event.round_idx} before {num_left} decided commits")
                num_left = event.detail.get("num_chunks", 0)
            elif event.action == "CommitChunk":
                num_left -= 1
                if num_left < 0:
                    wrong.append(f"rank {event.rank} commits a chunk in epoch {event.epoch} that no round decided")
            elif event.action == "GiveUp" and num_left > 0:
                wrong.append(f"rank {event.rank} stops before {num_left} decided commits")
    return wrong


def no_stale_receive(events: Iterable[Recorded]) -> list[str]:
    """No epoch starts in a round in which some rank still had a transfer of an earlier one under way."""
    history = _History.of(events)
    undrained = {event.round_idx: event.rank for event in history.votes if not event.is_drained}
    starts = {event.round_idx for event in history.read("START")}
    early = [(idx, rank) for idx, rank in sorted(undrained.items()) if idx in starts]
    return [f"round {idx} starts an epoch, rank {rank} was not drained" for idx, rank in early]


def no_commit_after_abort(events: Iterable[Recorded]) -> list[str]:
    """No round commits in which some rank voted to abort or to stop, nor any later one of an epoch that ended."""
    history = _History.of(events)
    commits = history.read("COMMIT")
    if not commits:
        return []
    refused = {event.round_idx: event.rank for event in history.votes if _refuses(event)}
    wrong = [
        f"round {event.round_idx} commits on rank {event.rank}, rank {refused[event.round_idx]} refused"
        for event in commits
        if event.round_idx in refused
    ]
    ended: dict[int, Recorded] = {}
    for event in history:
        if event.detail.get("outcome") in ("ABORTED", "SKIPPED"):
            first = ended.setdefault(event.epoch, event)
            ended[event.epoch] = min(first, event, key=lambda e: e.round_idx)
    for event in commits:
        end = ended.get(event.epoch)
        if end is not None and event.round_idx > end.round_idx:
            wrong.append(f"epoch {event.epoch} ended on rank {end.rank} and commits later on rank {event.rank}")
    return wrong


def commit_cannot_fail(events: Iterable[Recorded]) -> list[str]:
    """No promised commit raises."""
    return [
        f"rank {event.rank} step {event.step_idx}: {event.detail.get('text')}"
        for event in _History.of(events).others
        if event.action == "CommitFailed"
    ]


def stopped_harmless(events: Iterable[Recorded]) -> list[str]:
    """A stopped rank does nothing any more: its map stays."""
    wrong = []
    for own in _History.of(events).by_rank.values():
        stopped: Recorded | None = None
        for event in own:
            if stopped is not None and event.action != "Close":
                wrong.append(f"rank {event.rank}: {event.action} at step {event.step_idx} after it had stopped")
            if stopped is not None and event.live_digest != stopped.live_digest:
                wrong.append(f"rank {event.rank}: the map changed at step {event.step_idx} after it had stopped")
            if event.state == "STOPPED":
                stopped = stopped or event
    return wrong


def outcome_recorded(events: Iterable[Recorded]) -> list[str]:
    """Every epoch that a rank leaves has exactly one outcome, recorded by the event that ends it."""
    wrong = []
    for own in _History.of(events).by_rank.values():
        current: int | None = None
        for event in own:
            is_active = event.state in _ACTIVE
            outcome = event.detail.get("outcome")
            if current is not None and not is_active and not outcome:
                wrong.append(f"rank {event.rank}: epoch {current} ended at step {event.step_idx} without an outcome")
            if outcome and current is None:
                wrong.append(f"rank {event.rank}: outcome {outcome} at step {event.step_idx} with no epoch under way")
            current = event.epoch if is_active else None
    return wrong


def frozen_is_quiet(events: Iterable[Recorded]) -> list[str]:
    """While a freeze holds on a rank, nothing is under way there and its map stays."""
    wrong = []
    for own in _History.of(events).by_rank.values():
        before: Recorded | None = None
        for event in own:
            if event.is_frozen and not event.is_drained:
                wrong.append(f"rank {event.rank}: frozen at step {event.step_idx} with a transfer under way")
            if event.is_frozen and before is not None and before.is_frozen and before.live_digest != event.live_digest:
                wrong.append(f"rank {event.rank}: the map changed at step {event.step_idx} while frozen")
            before = event
    return wrong


def epoch_bounded(events: Iterable[Recorded], bound_steps: Callable[[int], int]) -> list[str]:
    """No epoch is under way for more steps than its bound.

    Args:
        events: The events.
        bound_steps: The bound, from the deadline of TRANSFERRING (0 for an epoch without a plan); see
            :func:`eplb_fsm.core.deadlines.epoch_bound_steps`.
    """
    wrong = []
    for own in _History.of(events).by_rank.values():
        last_step: int | None = None  # of the epoch that is under way, None while none is
        start = bound = 0
        for event in own:
            if _is_read(event, "START"):
                start, bound = event.step_idx, bound_steps(0)
                last_step = start + bound
            elif event.action == "PlanReady" and last_step is not None:
                bound = bound_steps(event.detail.get("deadline_steps", 0))
                last_step = start + bound
            if last_step is not None and event.step_idx > last_step:
                wrong.append(f"rank {event.rank}: epoch {event.epoch} takes more than {bound} steps")
                last_step = None
            if event.state not in _ACTIVE:
                last_step = None
    return wrong


EVENT_INVARIANTS: tuple[Callable[[Iterable[Recorded]], list[str]], ...] = (
    same_step_commit,
    same_decision,
    same_plan,
    no_transfer_without_consensus,
    commit_is_decided,
    no_stale_receive,
    no_commit_after_abort,
    commit_cannot_fail,
    stopped_harmless,
    outcome_recorded,
    frozen_is_quiet,
)
"""All that need nothing but events."""


def find_violations(events: Iterable[Recorded], bound_steps: Callable[[int], int]) -> list[str]:
    """Return the violations of all invariants over events, each with the name of its invariant before it."""
    history = _History(events)
    found = [f"{invariant.__name__}: {text}" for invariant in EVENT_INVARIANTS for text in invariant(history)]
    return found + [f"epoch_bounded: {text}" for text in epoch_bounded(history, bound_steps)]


def _decision(event: Recorded) -> object:
    return event.detail.get("decision")


def _what_was_read(event: Recorded) -> tuple[object, ...]:
    words = ("decision", "reason", "num_chunks")
    return event.step_idx, *(event.detail.get(word) for word in words)


def _name_of_read(event: Recorded) -> str:
    decision, num_chunks = event.detail.get("decision", ""), event.detail.get("num_chunks")
    return f"{decision} of {num_chunks} chunks" if num_chunks else f"{decision}"


def _is_read(event: Recorded, decision: str) -> bool:
    return event.action in _READS and _decision(event) == decision


def _refuses(event: Recorded) -> bool:
    return bool(event.detail.get("abort") or event.detail.get("stop"))
