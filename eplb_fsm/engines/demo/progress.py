"""What the ranks have told so far, and how it is shown: live where rich and a terminal are there, else in lines."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TextIO

from eplb_fsm.engines.reference.run import Progress, Started

_BARS = "▁▂▃▄▅▆▇█"
_LEAST_BALANCEDNESS = 0.4
"""Bottom of the drawn curve; the top is 1.0."""


@dataclass
class RunView:
    """What is known of one run.

    Attributes:
        curve: Balancedness at each message of the first rank.
        states: State of each rank.
        num_epochs: Epochs that have ended, by outcome.
    """

    name: str
    steps: int
    step: int = 0
    itl_ms: float = 0.0
    curve: list[float] = field(default_factory=list)
    states: dict[int, str] = field(default_factory=dict)
    num_epochs: dict[str, int] = field(default_factory=dict)

    def take(self, rank: int, message: Progress) -> None:
        """Note what a rank sent."""
        self.states[rank] = message.state
        if rank:
            return
        self.step, self.itl_ms = message.step, message.itl_ms
        self.curve.append(message.balancedness)
        self.num_epochs = message.epochs

    @property
    def epochs(self) -> str:
        """Epochs that have ended, in words."""
        if self.name == "none":
            return "-"
        return ", ".join(f"{count} {outcome}" for outcome, count in self.num_epochs.items()) or "0"

    def drawn(self, width: int) -> str:
        """Return the last `width` values of the curve as block characters."""
        span = 1.0 - _LEAST_BALANCEDNESS
        levels = [(value - _LEAST_BALANCEDNESS) / span * len(_BARS) for value in self.curve[-width:]]
        return "".join(_BARS[min(len(_BARS) - 1, max(0, int(level)))] for level in levels)


class Screen(Protocol):
    """Shows progress while the ranks run."""

    def on_message(self, rank: int, message: Any) -> None:
        """Take what a rank sent; on the launcher's thread."""
        ...

    def __enter__(self) -> Screen:
        """Start showing."""
        ...

    def __exit__(self, *_: object) -> None:
        """Stop, and leave the terminal as it was."""
        ...


class Views:
    """All runs, and the one that is going on."""

    def __init__(self, names: Sequence[str], steps: int) -> None:
        self.runs = {name: RunView(name, steps) for name in names}
        self.now: RunView | None = None

    def take(self, rank: int, message: Any) -> bool:
        """Note a message; return whether it was one that moves the display."""
        if not isinstance(message, Progress):
            return False
        self.now = self.runs[message.run]
        self.now.take(rank, message)
        return True


class SilentScreen:
    """Shows nothing."""

    def on_message(self, rank: int, message: Any) -> None:
        """Drop it."""

    def __enter__(self) -> SilentScreen:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to do."""


class LineScreen:
    """Writes a line every few seconds: for logs, pipes and terminals without rich.

    Args:
        names: The runs.
        steps: Steps of each.
        stream: Where to.
        every_s: Seconds between two lines of a run.
    """

    def __init__(self, names: Sequence[str], steps: int, stream: TextIO, every_s: float = 5.0) -> None:
        self._views, self._stream, self._every_s = Views(names, steps), stream, every_s
        self._told = 0.0

    def on_message(self, rank: int, message: Any) -> None:
        """Write a line when the last one is old enough, and at the end of a run."""
        if isinstance(message, Started):
            self._stream.write(f"rank {rank} is process {message.pid}\n")
            self._stream.flush()
        if not self._views.take(rank, message) or rank:
            return
        view = self._views.runs[message.run]
        now = time.monotonic()
        if now < self._told + self._every_s and view.step < view.steps:
            return
        self._told = now
        states = f", {_states_in_words(view)}" if view.name != "none" else ""
        self._stream.write(
            f"{view.name:>6}: step {view.step} of {view.steps}, {view.itl_ms:.1f} ms a token, "
            f"balancedness {view.curve[-1]:.2f}, epochs {view.epochs}{states}\n"
        )
        self._stream.flush()

    def __enter__(self) -> LineScreen:
        """Say that it starts."""
        self._stream.write("starting the ranks ...\n")
        self._stream.flush()
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to do."""


def _states_in_words(view: RunView) -> str:
    """Return `ranks IDLE`, or the state of each when they differ."""
    states = set(view.states.values())
    if len(states) == 1:
        return f"all ranks {states.pop()}"
    return ", ".join(f"rank {rank} {state}" for rank, state in sorted(view.states.items()))
