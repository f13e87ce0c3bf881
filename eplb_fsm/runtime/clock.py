"""The one clock of the library; injected everywhere, so that a simulation can bring its own."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Wall-clock seconds from an arbitrary origin, never going back."""

    def __call__(self) -> float:
        """Return the time in seconds."""
        ...


monotonic: Clock = time.monotonic
