"""Events: one for each action of the spec that a rank takes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Event:
    """One action of one rank, with the rank's whole projected state after it.

    Attributes:
        seq: Counts the events of the rank from 1.
        rank: The rank.
        step_idx: The shared logical clock.
        action: The action's name in the spec.
        state: The rank's state after the action, by name.
        detail: What the action was about: digests, reasons, chunk.
    """

    seq: int
    rank: int
    step_idx: int
    action: str
    state: str
    epoch: int
    round_idx: int
    chunk_idx: int
    num_staged: int
    is_drained: bool
    is_frozen: bool
    live_digest: int
    detail: Mapping[str, Any]


class Observer(Protocol):
    """Anything that wants events. Called on the decode thread, so it must be quick and must not block."""

    def on_event(self, event: Event) -> None:
        """Take one event."""
        ...


class Observers:
    """Hands events to observers; one that raises is removed and logged, so that it cannot hurt serving."""

    def __init__(self, observers: tuple[Observer, ...]) -> None:
        self._observers = list(observers)

    def __bool__(self) -> bool:
        """False when nobody listens: then no event is made at all."""
        return bool(self._observers)

    def on_event(self, event: Event) -> None:
        """Hand the event to all."""
        for observer in tuple(self._observers):
            try:
                observer.on_event(event)
            except Exception:
                logger.exception("rank %d: an observer raised and was removed", event.rank)
                self._observers.remove(observer)
