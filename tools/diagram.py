"""Pictures of the transition table, as text: what the docs and the README show is made here.

Nothing about the protocol is decided in this module; it only rewrites
:data:`~eplb_fsm.core.states.TRANSITIONS`.
"""

from __future__ import annotations

from collections.abc import Sequence

from eplb_fsm.core.states import ACTIVE_STATES, TRANSITIONS, State, Transition

_INDENT = "    "
_RUNNING = tuple(state for state in State if state is not State.STOPPED)
# A way out of every active state, or of every state but the terminal one, is drawn once, from a box that
# stands for them: drawn from each, aborting and stopping would hide the way through an epoch. (A mermaid
# composite state would say the same, but the arrows that leave it are laid out over each other.)
_BOXES = {
    ACTIVE_STATES: ("ANY_ACTIVE", "any active state"),
    _RUNNING: ("ANY_RUNNING", "any state but STOPPED"),
}


def render_mermaid(transitions: Sequence[Transition] = TRANSITIONS) -> str:
    """Return the table as a mermaid ``stateDiagram-v2``.

    Actions between the same two places share an arrow; those that a rank takes alone say so.

    Args:
        transitions: The rows to draw, in the order in which the arrows are written.

    Returns:
        The diagram, lines joined by newlines, without a fence and without a newline at its end.
    """
    boxes: list[str] = []
    arrows: dict[tuple[str, str], list[str]] = {}
    for row in transitions:
        label = row.action if row.agreed else f"{row.action} (local)"
        for place in _places(row.sources, boxes):
            arrows.setdefault((place, row.dest.value), []).append(label)
    lines = ["stateDiagram-v2", *boxes, f"[*] --> {State.IDLE.value}"]
    lines += [f"{source} --> {dest} : {'<br/>'.join(labels)}" for (source, dest), labels in arrows.items()]
    return f"\n{_INDENT}".join(lines)


def render_table(transitions: Sequence[Transition] = TRANSITIONS) -> str:
    """Return the table in Markdown: action, kind, the states it may happen in, the state after it."""
    lines = ["| action | kind | from | to |", "| --- | --- | --- | --- |"]
    for row in transitions:
        kind = "agreed" if row.agreed else "local"
        _, title = _BOXES.get(row.sources, ("", ", ".join(state.value for state in row.sources)))
        lines.append(f"| `{row.action}` | {kind} | {title} | {row.dest.value} |")
    return "\n".join(lines)


def _places(sources: tuple[State, ...], boxes: list[str]) -> list[str]:
    """Return where a row's arrows begin, and note the box that they need, if any, once."""
    if sources not in _BOXES:
        return [state.value for state in sources]
    name, title = _BOXES[sources]
    line = f'state "{title}" as {name}'
    if line not in boxes:
        boxes.append(line)
    return [name]
