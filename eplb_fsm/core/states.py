"""The states of a rank and the one table of transitions between them.

Two rules hold for this file:

* Everything that says which state follows which lives here and nowhere else. The executor
  (:mod:`eplb_fsm.core.lifecycle`), the diagram in the docs, the names in traces and metrics and the
  actions of the spec are all derived from, or compared with, :data:`TRANSITIONS`.
* An agreed transition is a pure function of the votes of one round, so all ranks take it at the same
  step. A local transition changes nothing but what the rank votes next.
"""

from __future__ import annotations

import re
from enum import Enum
from typing import NamedTuple


class State(Enum):
    """What a rank is doing; the value is the word used in traces, metrics and the spec."""

    IDLE = "IDLE"
    """Serving and counting tokens per expert."""
    COLLECTING = "COLLECTING"
    """Summing its load window with the other ranks', in the background."""
    COMPUTING = "COMPUTING"
    """Computing the plan in the background."""
    AWAITING_CONSENSUS = "AWAITING_CONSENSUS"
    """Voting that its plan is ready, or that there is nothing to gain."""
    TRANSFERRING = "TRANSFERRING"
    """Staging chunks in the background and committing each at an agreed step."""
    STOPPED = "STOPPED"
    """Closed, or rebalancing given up; the engine may go on serving."""


ACTIVE_STATES = (
    State.COLLECTING,
    State.COMPUTING,
    State.AWAITING_CONSENSUS,
    State.TRANSFERRING,
)
"""The states in which an epoch is under way."""

_RUNNING = (State.IDLE, *ACTIVE_STATES)


class Transition(NamedTuple):
    """One row of the table."""

    action: str
    """The name of the action in the spec and in traces, in PascalCase."""
    sources: tuple[State, ...]
    """The states in which it may happen; in any other it is illegal."""
    dest: State
    """The state after it."""
    agreed: bool
    """True when it is decided by a round and so happens on all ranks at the same step."""

    @property
    def trigger(self) -> str:
        """The same name in snake_case: the trigger of the executor."""
        return snake_case(self.action)


TRANSITIONS = (
    Transition("StartEpoch", (State.IDLE,), State.COLLECTING, agreed=True),
    Transition("LoadCollected", (State.COLLECTING,), State.COMPUTING, agreed=False),
    Transition("PlanReady", (State.COMPUTING,), State.AWAITING_CONSENSUS, agreed=False),
    Transition("SkipEpoch", (State.AWAITING_CONSENSUS,), State.IDLE, agreed=True),
    Transition("BeginTransfer", (State.AWAITING_CONSENSUS,), State.TRANSFERRING, agreed=True),
    Transition("CommitChunk", (State.TRANSFERRING,), State.TRANSFERRING, agreed=True),
    Transition("FinishEpoch", (State.TRANSFERRING,), State.IDLE, agreed=True),
    Transition("AbortEpoch", ACTIVE_STATES, State.IDLE, agreed=True),
    Transition("StopRebalancing", _RUNNING, State.STOPPED, agreed=True),
    # The two ways out that a rank takes alone. Both are preceded by a last STOP vote, so that the
    # others follow at the step at which they read it.
    Transition("GiveUp", _RUNNING, State.STOPPED, agreed=False),
    Transition("Close", _RUNNING, State.STOPPED, agreed=False),
)
"""Every transition there is; what is not in it is illegal."""


def snake_case(action: str) -> str:
    """Return the Python spelling of an action: ``CommitChunk`` becomes ``commit_chunk``."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", action).lower()
