"""Executes the transition table with ``transitions``.

The library is asked to make a transition and never polled for one. Its traps are avoided on purpose:
no queue (with one, every trigger returns True), no automatic ``to_X`` triggers, no callbacks (an exception
in one would leave the new state in place), and an undeclared trigger raises.
"""

from __future__ import annotations

from transitions import Machine

from eplb_fsm.core.states import TRANSITIONS, State


class Lifecycle:
    """The current state of one rank."""

    state: State

    def __init__(self) -> None:
        self._machine = Machine(
            model=self,
            states=State,
            initial=State.IDLE,
            transitions=[
                {"trigger": row.trigger, "source": list(row.sources), "dest": row.dest} for row in TRANSITIONS
            ],
            auto_transitions=False,
        )

    def fire(self, action: str) -> None:
        """Make the transition of an action, by its snake_case name.

        Raises:
            transitions.MachineError: If the table does not allow it in the current state; that is a bug.
        """
        self.trigger(action)  # type: ignore[attr-defined]  # added by Machine
