"""Draw the shortest counterexample to `max(counters) + slack` as a picture, and write it as a table.

Runs TLC on the check `seed/slack2` of `spec/`, and writes `docs/assets/max-plus-slack.svg` and the table between the
marks in `docs/explanation/why-a-wait.md`. TLC searches breadth first with one worker, so the trace is always the same.

Usage: python tools/draw_counterexample.py [--check]

With `--check` nothing is written, and the exit status is 1 when the picture or the table is out of date.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works in a checkout that is not installed

from eplb_fsm.modelcheck.tlc import Step, Tlc
from eplb_fsm.modelcheck.values import parse_state

ROOT = Path(__file__).resolve().parent.parent
MODULE, CFG, SLACK = ROOT / "spec/SeedMaxPlusSlack.tla", ROOT / "spec/seed/slack2.cfg", 2
PICTURE = ROOT / "docs/assets/max-plus-slack.svg"
PAGE = ROOT / "docs/explanation/why-a-wait.md"

_TABLE = re.compile(r"(<!-- drawn: table -->\n).*?(<!-- end drawn -->)", re.DOTALL)

_ROW, _TOP, _WIDTH = 34, 70, 860
_LOOP_X, _THREAD_X = {1: 330, 2: 530}, {1: 170, 2: 690}
_GREY, _BLUE, _RED, _INK = "#8a8f98", "#c9dcf5", "#f3b8b0", "#1c1e21"


class Event(NamedTuple):
    """One step of the trace: the rank that takes it, and in which state it leaves all variables."""

    action: str
    rank: int
    after: dict[str, Any]

    @property
    def step(self) -> int:
        """Forward passes that the rank has completed."""
        return int(self.after["step"][self.rank - 1])


def read_events(trace: Sequence[Step]) -> list[Event]:
    """Return the steps after the initial state; the rank of each is the one whose variables it changes."""
    states = [parse_state(step.state) for step in trace]
    events = []
    for step, before, after in zip(trace[1:], states, states[1:], strict=False):
        ranks = {i + 1 for name, value in after.items() for i in (0, 1) if value[i] != before[name][i]}
        (rank,) = ranks
        events.append(Event(step.action.split()[0], rank, after))
    return events


# -- the table ----------------------------------------------------------------------------------------------


def describe(event: Event, is_last: bool) -> tuple[str, str]:
    """Return what the thread and what the decode loop of the rank does, one of them empty."""
    other = 3 - event.rank
    if event.action == "Send":
        return f"its plan is ready: sends counter {event.after['counter'][event.rank - 1]}", ""
    if event.action == "Hear":
        counters = ", ".join(map(str, event.after["counter"]))
        return f"has all counters: begin at max({counters}) + {SLACK} = {max(event.after['counter']) + SLACK}", ""
    if event.action == "EndPass":
        return "", f"forward pass {event.step} ends"
    if event.action == "EnterTransfer":
        return "", f"step {event.step} is here: **in the transfer, waits for rank {other}**"
    if not is_last:
        return "", f"starts forward pass {event.step + 1}"
    return "", f"knows of no step: starts forward pass {event.step + 1}, **in its all-to-all, waits for rank {other}**"


def make_table(events: Sequence[Event]) -> str:
    """Return the trace as a Markdown table, a line for each step."""
    lines = ["| | rank | its thread | its decode loop |", "| --- | --- | --- | --- |"]
    for number, event in enumerate(events, 1):
        thread, loop = describe(event, number == len(events))
        lines.append(f"| {number} | {event.rank} | {thread} | {loop} |")
    return "\n".join(lines)


# -- the picture --------------------------------------------------------------------------------------------


def draw(events: Sequence[Event]) -> str:
    """Return the trace as an SVG picture: two ranks, each with its thread and its decode loop, time downwards."""
    bottom = _y(len(events)) + 36
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {bottom + 50}" role="img" '
        'font-family="sans-serif" font-size="13">',
        "<title>The largest counter plus 2: rank 1 waits in the transfer, rank 2 in a forward pass</title>",
        f'<defs><marker id="tip" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">'
        f'<path d="M0,0 L8,4 L0,8 z" fill="{_INK}"/></marker></defs>',
        f'<rect width="{_WIDTH}" height="{bottom + 50}" fill="#ffffff"/>',
    ]
    for rank in (1, 2):
        for x, name in ((_THREAD_X[rank], "thread"), (_LOOP_X[rank], "decode loop")):
            parts.append(_text(x, 34, f"rank {rank}: {name}", weight="bold"))
            parts.append(_line(x, 46, x, bottom, _GREY))
    parts += _messages(events, bottom)
    parts += _bars(events, bottom)  # over the messages, so that their labels can be read
    parts.append(_text(_WIDTH // 2, bottom + 30, "Each waits for the other, for ever.", weight="bold"))
    return "\n".join([*parts, "</svg>", ""])


def _bars(events: Sequence[Event], bottom: int) -> list[str]:
    """Draw what each decode loop is in: forward passes, and the transfer; what never ends is red."""
    parts = []
    for rank, x in _LOOP_X.items():
        start, label = 0, ""
        for number, event in enumerate(events):
            if event.rank != rank or event.action in ("Send", "Hear"):
                continue
            if event.action == "EndPass":
                parts += _bar(x, start, _y(number), label, _BLUE)
                label = ""
            else:
                start = _y(number)
                label = "transfer" if event.action == "EnterTransfer" else f"pass {event.step + 1}"
        if label:
            parts += _bar(x, start, bottom, label, _RED)
    return parts


def _messages(events: Sequence[Event], bottom: int) -> list[str]:
    """Draw the counters on their way between the threads, and what the threads then know."""
    heard = {event.rank: number for number, event in enumerate(events) if event.action == "Hear"}
    parts = []
    for number, event in enumerate(events):
        x, other = _THREAD_X[event.rank], 3 - event.rank
        side, anchor = (-12, "end") if event.rank == 1 else (12, "start")
        if event.action == "Send":
            arrives = _y(heard[other]) if other in heard else bottom - 20
            style = "" if other in heard else ' stroke-dasharray="5 5"'
            parts.append(_line(x, _y(number), _THREAD_X[other], arrives, _INK, f'{style} marker-end="url(#tip)"'))
            parts.append(_text(x + side, _y(number) + 4, f"sends {event.after['counter'][event.rank - 1]}", anchor))
            if other not in heard:
                late = _THREAD_X[other] - side
                parts.append(_text(late, arrives + 4, "not there yet", "start" if event.rank == 1 else "end"))
        elif event.action == "Hear":
            begin = max(event.after["counter"]) + SLACK
            parts.append(_text(x + side, _y(number) + 4, f"begin at {begin}", anchor))
    return parts


def _y(number: int) -> int:
    return _TOP + number * _ROW


def _bar(x: int, top: int, end: int, label: str, fill: str) -> list[str]:
    rect = f'<rect x="{x - 36}" y="{top}" width="72" height="{end - top}" rx="4" fill="{fill}" stroke="{_INK}"/>'
    return [rect, _text(x, (top + end) // 2 + 4, label)]


def _line(x1: int, y1: int, x2: int, y2: int, colour: str, more: str = "") -> str:
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{colour}"{more}/>'


def _text(x: int, y: int, text: str, anchor: str = "middle", weight: str = "normal") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-weight="{weight}" fill="{_INK}">{escape(text)}</text>'


def main() -> int:
    """Draw, or check what is drawn; return the exit status."""
    parser = argparse.ArgumentParser(description="Draw the counterexample to max(counters) + slack.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail when something is out of date")
    check = parser.parse_args().check
    events = read_events(Tlc.find(os.environ).run(MODULE, CFG).trace)
    page = PAGE.read_text(encoding="utf-8")
    wanted = {
        PICTURE: draw(events),
        PAGE: _TABLE.sub(lambda match: f"{match[1]}{make_table(events)}\n{match[2]}", page),
    }
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        print(f"{path.relative_to(ROOT)}: {'out of date' if check else 'written'}")
        if not check:
            path.write_text(wanted[path], encoding="utf-8")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
