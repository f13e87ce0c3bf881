"""MkDocs hook: draws the state diagram on the site.

Code hosts render the mermaid text of the pages. The site would need a script of several megabytes for it,
so here the same table becomes a picture: the states below each other in the order of an epoch, ways back to
the first on the right, what may happen in any state on the left.
"""

from __future__ import annotations

import re
import sys
from html import escape
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eplb_fsm.core.states import ACTIVE_STATES, TRANSITIONS, State, Transition

_FENCE = re.compile(r"```mermaid\nstateDiagram-v2\n.*?\n```", re.DOTALL)
_BOX_WIDTH, _BOX_HEIGHT, _ROW, _SPINE, _LEFT = 190, 34, 84, 400, 110


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the mermaid text of the lifecycle by its picture."""
    return _FENCE.sub(lambda _: draw(TRANSITIONS), markdown)


def draw(transitions: tuple[Transition, ...]) -> str:
    """Return the picture as one inline SVG element.

    Raises:
        ValueError: If a transition fits none of the shapes; the picture must not leave one out.
    """
    spine = [state for state in State if state is not State.STOPPED]
    y = {state: 30 + row * _ROW for row, state in enumerate(spine)}
    stopped = 30 + 2 * _ROW + 10
    parts = [_box(_SPINE, y[state], state.value) for state in spine]
    parts.append(_box(_LEFT, stopped, State.STOPPED.value))
    lanes: dict[State, list[str]] = {}
    to_stopped: list[str] = []
    for row in transitions:
        label = row.action if row.agreed else f"{row.action} (local)"
        source = row.sources[0]
        if row.dest is State.STOPPED and set(row.sources) == set(spine):
            to_stopped.append(label)
        elif row.sources == ACTIVE_STATES and row.dest is spine[0]:
            parts += [_box(_LEFT, y[row.dest], "any active state", dashed=True)]
            parts += _line([(_LEFT + _BOX_WIDTH // 2, y[row.dest]), (_SPINE - _BOX_WIDTH // 2, y[row.dest])])
            parts.append(_text((_LEFT + _SPINE) // 2, y[row.dest] - 8, label, "middle"))
        elif len(row.sources) == 1 and row.dest is source:
            parts.append(_text(_SPINE, y[source] + 34, f"\u21ba {label}", "middle"))
        elif len(row.sources) == 1 and row.dest is spine[0]:
            lanes.setdefault(source, []).append(label)
        elif len(row.sources) == 1 and row.dest in y and y[row.dest] == y[source] + _ROW:
            parts += _line([(_SPINE, y[source] + _BOX_HEIGHT // 2), (_SPINE, y[row.dest] - _BOX_HEIGHT // 2)])
            parts.append(_text(_SPINE + 8, (y[source] + y[row.dest]) // 2 + 4, label, "start"))
        else:
            raise ValueError(f"tools/site_hooks.py does not know how to draw {row.action}")
    for number, (source, labels) in enumerate(lanes.items()):
        parts += _lane(y[source], y[spine[0]], number, ", ".join(labels))
    parts += _ways_to_stopped(y[spine[1]], stopped, to_stopped)
    height = 30 + len(spine) * _ROW
    body = "".join(parts)
    return (
        f'<svg class="states" viewBox="0 0 760 {height}" role="img" aria-label="state diagram">'
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" '
        f'orient="auto"><path d="M0,0 L8,4 L0,8 z"/></marker></defs>{body}</svg>'
    )


def _lane(y_from: int, y_to: int, number: int, label: str) -> list[str]:
    right, lane = _SPINE + _BOX_WIDTH // 2, _SPINE + _BOX_WIDTH // 2 + 60 + number * 110
    enter = y_to - 6 + number * 12
    points = [(right, y_from), (lane, y_from), (lane, enter), (right, enter)]
    return [*_line(points), _text(lane + 6, y_from - 20, label, "start")]


def _ways_to_stopped(y_box: int, y_stopped: int, labels: list[str]) -> list[str]:
    parts = [_box(_LEFT, y_box, "any state but STOPPED", dashed=True)]
    parts += _line([(_LEFT, y_box + _BOX_HEIGHT // 2), (_LEFT, y_stopped - _BOX_HEIGHT // 2)])
    return parts + [_text(_LEFT + 8, y_box + 34 + 16 * number, label, "start") for number, label in enumerate(labels)]


def _box(x: int, y: int, text: str, dashed: bool = False) -> str:
    kind = ' class="any"' if dashed else ""
    left, top = x - _BOX_WIDTH // 2, y - _BOX_HEIGHT // 2
    return f'<rect{kind} x="{left}" y="{top}" width="{_BOX_WIDTH}" height="{_BOX_HEIGHT}" rx="5"/>' + _text(
        x, y + 5, text, "middle"
    )


def _line(points: list[tuple[int, int]]) -> list[str]:
    path = " ".join(f"{x},{y}" for x, y in points)
    return [f'<polyline points="{path}" marker-end="url(#tip)"/>']


def _text(x: int, y: int, text: str, anchor: str) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>'
