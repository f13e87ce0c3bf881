"""The transition table and what executes it."""

from __future__ import annotations

import pytest
from transitions import MachineError

from eplb_fsm.core.lifecycle import Lifecycle
from eplb_fsm.core.states import ACTIVE_STATES, TRANSITIONS, State, Transition, snake_case

ROWS = pytest.mark.parametrize("row", TRANSITIONS, ids=lambda row: row.action)


def in_state(state: State) -> Lifecycle:
    """A lifecycle that was brought to a state by legal transitions only."""
    paths: dict[State, list[str]] = {State.IDLE: []}
    while state not in paths:
        for row in TRANSITIONS:
            for source in row.sources:
                if source in paths and row.dest not in paths:
                    paths[row.dest] = [*paths[source], row.trigger]
    lifecycle = Lifecycle()
    for action in paths[state]:
        lifecycle.fire(action)
    assert lifecycle.state is state
    return lifecycle


@ROWS
def test_every_transition_can_happen(row: Transition) -> None:
    """Every action is reachable from the start, from each of its sources, and leads where the table says."""
    for source in row.sources:
        lifecycle = in_state(source)
        lifecycle.fire(row.trigger)
        assert lifecycle.state is row.dest


@ROWS
def test_anything_else_is_illegal(row: Transition) -> None:
    """An action in a state that the table does not name raises and changes nothing."""
    for state in set(State) - set(row.sources):
        lifecycle = in_state(state)
        with pytest.raises(MachineError):
            lifecycle.fire(row.trigger)
        assert lifecycle.state is state


def test_an_undeclared_action_raises() -> None:
    """There are no transitions but those of the table, not even the automatic ones of the library underneath."""
    with pytest.raises((KeyError, MachineError)):
        Lifecycle().fire("to_STOPPED")


def test_agreed_and_local() -> None:
    """What changes the placement or ends an epoch is agreed; a rank alone only gets ready, or leaves."""
    local = {row.action for row in TRANSITIONS if not row.agreed}
    assert local == {"LoadCollected", "PlanReady", "GiveUp", "Close"}
    assert all(row.dest in ACTIVE_STATES or row.dest is State.STOPPED for row in TRANSITIONS if not row.agreed)


def test_stopped_is_terminal() -> None:
    """No transition leaves STOPPED."""
    assert not [row for row in TRANSITIONS if State.STOPPED in row.sources]


@pytest.mark.parametrize(
    ("name", "wanted"), [("CommitChunk", "commit_chunk"), ("Close", "close"), ("GiveUp", "give_up")]
)
def test_names(name: str, wanted: str) -> None:
    """The Python name of an action is its spec name in snake case."""
    assert snake_case(name) == wanted
