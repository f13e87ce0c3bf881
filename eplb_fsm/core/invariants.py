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


def same_step_commit(events: Iterable[Recorded]) -> list[str]:
    """A round that commits a chunk on one rank commits it on all that go on, at the same step, to the same map."""
    events = list(events)
    committed: dict[int, Recorded] = {}
    wrong = []
    for event in _reads(events):
        if _decision(event) != "COMMIT":
            continue
        first = committed.setdefault(event.round_idx, event)
        for word in ("step_idx", "epoch", "live_digest"):
            if getattr(first, word) != getattr(event, word):
                wrong.append(
                    f"round {event.round_idx}: commits with {word} {getattr(first, word)} on rank {first.rank} "
                    f"and {getattr(event, word)} on rank {event.rank}"
                )
    for event in events:
        # A last vote counts a round of its own, after the one whose decision is not read any more.
        passed_by = event.round_idx - 1 if event.action == "GiveUp" else event.round_idx
        missed = event.action == "GiveUp" and not _has_read(events, event.rank, passed_by)
        if passed_by in committed and (missed or (event.action in _READS and _decision(event) != "COMMIT")):
            wrong.append(f"round {passed_by}: rank {committed[passed_by].rank} committed, rank {event.rank} did not")
    return wrong


def same_decision(events: Iterable[Recorded]) -> list[str]:
    """All ranks that read a round read the same decision at the same step."""
    first: dict[int, Recorded] = {}
    wrong = []
    for event in events:
        if event.action != "ReadRound":
            continue
        other = first.setdefault(event.round_idx, event)
        if (other.step_idx, _decision(other), other.detail.get("reason")) != (
            event.step_idx,
            _decision(event),
            event.detail.get("reason"),
        ):
            wrong.append(
                f"round {event.round_idx}: rank {other.rank} read {_decision(other)} at step {other.step_idx}, "
                f"rank {event.rank} read {_decision(event)} at step {event.step_idx}"
            )
    return wrong


def same_plan(events: Iterable[Recorded]) -> list[str]:
    """All ranks that begin to transfer in an epoch hold the same plan."""
    wrong = []
    digest_of: dict[int, tuple[int, int]] = {}
    for own in _by_rank(events):
        ready: dict[int, int] = {}
        for event in own:
            if event.action == "PlanReady":
                ready[event.epoch] = event.detail["plan_digest"]
            elif _is_read(event, "BEGIN") and event.epoch in ready:
                rank, digest = digest_of.setdefault(event.epoch, (event.rank, ready[event.epoch]))
                if digest != ready[event.epoch]:
                    wrong.append(f"epoch {event.epoch}: ranks {rank} and {event.rank} begin with different plans")
    return wrong


def no_transfer_without_consensus(events: Iterable[Recorded]) -> list[str]:
    """No rank stages or commits in an epoch before it has read BEGIN, and it has a plan by then."""
    wrong = []
    for own in _by_rank(events):
        has_plan = has_begun = False
        for event in own:
            if _is_read(event, "START"):
                has_plan = has_begun = False
            elif event.action == "PlanReady":
                has_plan = True
            elif _is_read(event, "BEGIN"):
                has_begun = True
                if not has_plan:
                    wrong.append(f"rank {event.rank} begins epoch {event.epoch} without a plan")
            elif (event.action == "ChunkStaged" or _is_read(event, "COMMIT")) and not has_begun:
                wrong.append(f"rank {event.rank} moves weights in epoch {event.epoch} without a BEGIN")
    return wrong


def no_stale_receive(events: Iterable[Recorded]) -> list[str]:
    """No epoch starts in a round in which some rank still had a transfer of an earlier one under way."""
    undrained = {}
    starts = set()
    for event in events:
        if event.action == "PostVote" and not event.is_drained:
            undrained[event.round_idx] = event.rank
        if _is_read(event, "START"):
            starts.add(event.round_idx)
    early = [(idx, rank) for idx, rank in sorted(undrained.items()) if idx in starts]
    return [f"round {idx} starts an epoch, rank {rank} was not drained" for idx, rank in early]


def no_commit_after_abort(events: Iterable[Recorded]) -> list[str]:
    """No round commits in which some rank voted to abort or to stop, nor any later one of an epoch that ended."""
    events = list(events)
    refused = {e.round_idx: e.rank for e in events if e.action == "PostVote" and _refuses(e)}
    wrong = []
    for event in _reads(events):
        if _decision(event) == "COMMIT" and event.round_idx in refused:
            other = refused[event.round_idx]
            wrong.append(f"round {event.round_idx} commits on rank {event.rank}, rank {other} refused")
    ended: dict[int, Recorded] = {}
    for event in events:
        if event.detail.get("outcome") in ("ABORTED", "SKIPPED"):
            first = ended.setdefault(event.epoch, event)
            ended[event.epoch] = min(first, event, key=lambda e: e.round_idx)
    for event in _reads(events):
        end = ended.get(event.epoch)
        if _decision(event) == "COMMIT" and end is not None and event.round_idx > end.round_idx:
            wrong.append(f"epoch {event.epoch} ended on rank {end.rank} and commits later on rank {event.rank}")
    return wrong


def commit_cannot_fail(events: Iterable[Recorded]) -> list[str]:
    """No promised commit raises."""
    return [
        f"rank {event.rank} step {event.step_idx}: {event.detail.get('text')}"
        for event in events
        if event.action == "CommitFailed"
    ]


def stopped_harmless(events: Iterable[Recorded]) -> list[str]:
    """A stopped rank does nothing any more: its map stays."""
    wrong = []
    for own in _by_rank(events):
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
    for own in _by_rank(events):
        current: int | None = None
        for event in own:
            outcome = event.detail.get("outcome")
            if current is not None and event.state not in _ACTIVE and not outcome:
                wrong.append(f"rank {event.rank}: epoch {current} ended at step {event.step_idx} without an outcome")
            if outcome and current is None:
                wrong.append(f"rank {event.rank}: outcome {outcome} at step {event.step_idx} with no epoch under way")
            current = event.epoch if event.state in _ACTIVE else None
    return wrong


def epoch_bounded(events: Iterable[Recorded], bound_steps: Callable[[int], int]) -> list[str]:
    """No epoch is under way for more steps than its bound.

    Args:
        events: The events.
        bound_steps: The bound, from the deadline of TRANSFERRING (0 for an epoch without a plan); see
            :func:`eplb_fsm.core.deadlines.epoch_bound_steps`.
    """
    wrong = []
    for own in _by_rank(events):
        start: int | None = None
        deadline = 0
        for event in own:
            if _is_read(event, "START"):
                start, deadline = event.step_idx, 0
            elif event.action == "PlanReady":
                deadline = event.detail["deadline_steps"]
            if start is not None and event.step_idx - start > bound_steps(deadline):
                wrong.append(f"rank {event.rank}: epoch {event.epoch} takes more than {bound_steps(deadline)} steps")
                start = None
            if event.state not in _ACTIVE:
                start = None
    return wrong


EVENT_INVARIANTS: tuple[Callable[[Iterable[Recorded]], list[str]], ...] = (
    same_step_commit,
    same_decision,
    same_plan,
    no_transfer_without_consensus,
    no_stale_receive,
    no_commit_after_abort,
    commit_cannot_fail,
    stopped_harmless,
    outcome_recorded,
)
"""All that need nothing but events."""


def find_violations(events: Iterable[Recorded], bound_steps: Callable[[int], int]) -> list[str]:
    """Return the violations of all invariants over events, each with the name of its invariant before it."""
    events = list(events)
    found = [f"{invariant.__name__}: {text}" for invariant in EVENT_INVARIANTS for text in invariant(events)]
    return found + [f"epoch_bounded: {text}" for text in epoch_bounded(events, bound_steps)]


def _by_rank(events: Iterable[Recorded]) -> list[list[Recorded]]:
    own: dict[int, list[Recorded]] = {}
    for event in events:
        own.setdefault(event.rank, []).append(event)
    return list(own.values())


def _decision(event: Recorded) -> object:
    return event.detail.get("decision")


def _is_read(event: Recorded, decision: str) -> bool:
    return event.action in _READS and _decision(event) == decision


def _reads(events: Iterable[Recorded]) -> list[Recorded]:
    return [event for event in events if event.action in _READS]


def _has_read(events: Iterable[Recorded], rank: int, round_idx: int) -> bool:
    return any(event.rank == rank and event.round_idx == round_idx for event in _reads(events))


def _refuses(event: Recorded) -> bool:
    return bool(event.detail.get("abort") or event.detail.get("stop"))
