"""The live display, drawn with rich a few times a second."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from eplb_fsm.engines.demo.progress import RunView, Views
from eplb_fsm.engines.reference.run import Started

_COLOURS = {
    "IDLE": "green",
    "COLLECTING": "cyan",
    "COMPUTING": "blue",
    "AWAITING_CONSENSUS": "magenta",
    "TRANSFERRING": "yellow",
    "STOPPED": "red",
}
_MOST_RANKS = 16
_WIDE = 100
"""From so many columns on there is room for a longer curve."""


class LiveScreen:
    """Shows all runs and the state of every rank, in place.

    It draws when a message has come and not by a clock of its own: the launcher shares the cores with the ranks.

    Args:
        title: First line.
        names: The runs.
        steps: Steps of each.
        console: The terminal.
    """

    def __init__(self, title: str, names: Sequence[str], steps: int, console: Console) -> None:
        self._title, self._console = title, console
        self._views = Views(names, steps)
        self._num_up = 0
        self._live = Live(self._draw(), console=console, auto_refresh=False, transient=True)

    def on_message(self, rank: int, message: Any) -> None:
        """Note it; draw when a rank is up, and when the first one has told of a further step."""
        self._num_up += isinstance(message, Started)
        if self._views.take(rank, message) and rank:
            return
        self._live.update(self._draw(), refresh=True)

    def __enter__(self) -> LiveScreen:
        """Start drawing."""
        self._live.start(refresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        """Wipe the display."""
        self._live.stop()

    def _draw(self) -> Group:
        now = self._views.now
        parts: list[Any] = [Text(self._title, style="bold"), Text(), self._runs(), Text()]
        if now is None:
            up = f"{self._num_up} are up" if self._num_up else "this takes some seconds"
            parts.append(Text(f"starting the ranks: {up}", style="dim"))
        elif now.name == "none":
            parts.append(Text("no rebalancing: the placement stays as it was", style="dim"))
        else:
            parts.append(_rank_states(now, self._console.width))
        return Group(*parts)

    def _runs(self) -> Table:
        curve_width = 40 if self._console.width >= _WIDE else 14
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for head, justify in (("run", "left"), ("", "left"), ("step", "right"), ("ms/token", "right")):
            table.add_column(head, justify=justify, no_wrap=True)  # type: ignore[arg-type]
        table.add_column("balancedness", no_wrap=True, width=curve_width + 5)
        table.add_column("epochs", no_wrap=True)
        for view in self._views.runs.values():
            table.add_row(*_run_row(view, curve_width, is_now=view is self._views.now))
        return table


def _run_row(view: RunView, curve_width: int, *, is_now: bool) -> list[Any]:
    name = Text(view.name, style="bold" if is_now else "" if view.step else "dim")
    bar = ProgressBar(total=view.steps, completed=view.step, width=12)
    if not view.step:
        return [name, bar, Text("-"), Text("-"), Text(""), Text("")]
    balance = Text(f"{view.curve[-1]:.2f} ") + Text(view.drawn(curve_width), style="cyan")
    return [name, bar, Text(str(view.step)), Text(f"{view.itl_ms:.1f}"), balance, Text(view.epochs)]


def _rank_states(view: RunView, width: int) -> Table | Text:
    """Return the state of each rank, or how many are in which where they are too many."""
    if len(view.states) > _MOST_RANKS:
        counts = Counter(view.states.values())
        return Text(", ".join(f"{count} ranks {state}" for state, count in sorted(counts.items())))
    columns = max(1, width // 27)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    for _ in range(columns):
        table.add_column(no_wrap=True, min_width=25)  # the longest state; columns must not move about
    cells = [
        Text(f"rank {rank} ") + Text(state, style=_COLOURS.get(state, ""))
        for rank, state in sorted(view.states.items())
    ]
    for first in range(0, len(cells), columns):
        table.add_row(*cells[first : first + columns])
    return table
