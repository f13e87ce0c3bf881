"""Executes the transition table with ``transitions``.

The library is asked to make a transition and never polled for one. Its traps are avoided on purpose:
no queue (with one, every trigger returns True), no automatic ``to_X`` triggers, no callbacks (an exception
in one would leave the new state in place), and an undeclared trigger raises.
"""

from __future__ import annotations

from functools import cache

from transitions import Machine

from eplb_fsm.core.states import TRANSITIONS, State

_MACHINE = Machine(
    model=None,
    states=State,
    initial=State.IDLE,
    transitions=[{"trigger": row.trigger, "source": list(row.sources), "dest": row.dest} for row in TRANSITIONS],
    auto_transitions=False,
    send_event=False,
    queued=False,
)
"""The table; it holds no state, so one serves all ranks of a process."""


class Lifecycle:
    """The current state of one rank."""

    def __init__(self, state: State = State.IDLE) -> None:
        self.state = state

    def fire(self, action: str) -> None:
        """Make the transition of an action, by its snake_case name.

        Raises:
            KeyError: If there is no such action.
            transitions.MachineError: If the table does not allow it in the current state; that is a bug.
        """
        self.state = _state_after(self.state, action)


@cache
def _state_after(state: State, action: str) -> State:
    """Ask the machine; once, since nothing but the table decides."""
    model = Lifecycle(state)
    _MACHINE.events[action].trigger(model)
    return model.state
