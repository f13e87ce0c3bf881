"""What a run shows as it goes: the events of all ranks, and what follows from their order."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from eplb_fsm.core.states import State
from eplb_fsm.observe.events import Event

_STATE_CODES = {state.value: code for code, state in enumerate(State)}
_ACTIONS = (
    *("PostVote", "ReadRound", "ResolveRound", "GiveUp", "Close", "FailStop", "LoadCollected", "PlanReady"),
    *("ChunkStaged", "WorkFailed", "TransportLost", "Init", "Request", "Freeze", "Unfreeze", "AskAbort", "AskStop"),
    *("GiveUpReading", "CommitChunk", "CommitFailed"),
)
_ACTION_CODES = {action: code for code, action in enumerate(_ACTIONS)}


@dataclass(slots=True)
class Journal:
    """Everything that a run shows; an observer of all ranks.

    Attributes:
        orders: What happened on each rank, in order, as numbers.
        voters: The ranks in the order in which their votes of a round reached the channel, by round.
        out: The round that is out on each rank, 0 for none.
        decided: Chunks on each rank that a round has decided to commit and that are not live yet.
        epochs: The epoch of each rank.
        decisions: What was read, by round.
        outcomes: Epochs that have ended on each rank, and how.
        has_ended: Whether an epoch has ended on some rank, or a rank has stopped.
    """

    num_ranks: int
    events: list[Event] = field(default_factory=list)
    states: set[int] = field(default_factory=set)
    orders: list[list[int]] = field(default_factory=list)
    voters: dict[int, list[int]] = field(default_factory=dict)
    out: list[int] = field(default_factory=list)
    decided: list[int] = field(default_factory=list)
    epochs: list[int] = field(default_factory=list)
    decisions: dict[int, str] = field(default_factory=dict)
    outcomes: list[list[tuple[int, str]]] = field(default_factory=list)
    has_ended: bool = False
    _projected: list[tuple[Hashable, ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.orders = [[] for _ in range(self.num_ranks)]
        self.outcomes = [[] for _ in range(self.num_ranks)]
        self.out = [0] * self.num_ranks
        self.decided = [0] * self.num_ranks
        self.epochs = [0] * self.num_ranks
        self._projected = [()] * self.num_ranks

    def on_event(self, event: Event) -> None:
        """Take one event."""
        rank, action = event.rank, event.action
        self.events.append(event)
        self.epochs[rank] = event.epoch
        state = _STATE_CODES[event.state]
        self._projected[rank] = (
            *(state, event.epoch, event.round_idx, event.chunk_idx, event.num_staged),
            *(event.is_drained, event.is_frozen, event.live_digest),
        )
        # Tuples of numbers only: their hash does not depend on the process.
        self.states.add(hash(tuple(self._projected)))
        self.orders[rank].append(hash((_ACTION_CODES[action], event.step_idx, self._projected[rank])))
        if action == "PostVote":
            self.voters.setdefault(event.round_idx, []).append(rank)
            self.out[rank] = event.round_idx
        elif action in ("ReadRound", "ResolveRound"):
            self.decisions[event.round_idx] = event.detail["decision"]
            self.decided[rank] = event.detail["num_chunks"]
            self.out[rank] = 0
        elif action == "CommitChunk":
            self.decided[rank] -= 1
        if event.detail.get("outcome"):
            self.outcomes[rank].append((event.epoch, event.detail["outcome"]))
        if event.state == "STOPPED" or self.outcomes[rank]:
            self.has_ended = True

    def interleaving(self) -> int:
        """Return the hash of the order on each rank and on the channel of each round."""
        return hash((tuple(map(tuple, self.orders)), tuple(map(tuple, self.voters.values()))))
