"""Virtual time."""

from __future__ import annotations


class VirtualClock:
    """Seconds that pass only when the scheduler says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """Return the virtual time in seconds."""
        return self.now

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds
