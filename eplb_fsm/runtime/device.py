"""Where weights live: streams and events, reduced to what a rebalance needs.

A host enqueues work and may be several forward passes ahead of its device. The library therefore never
writes a live row directly: it enqueues the write behind everything enqueued so far, and whoever needs it to
have happened waits on an event. On a CPU the two moments are one; :class:`SimulatedDevice` keeps them apart,
so that the order is tested without an accelerator.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

from eplb_fsm.runtime.pending import Done, Pending


class DeviceOps(Protocol):
    """The stream on which the engine enqueues forward passes."""

    @property
    def max_passes_ahead(self) -> int:
        """Forward passes by which the host may be ahead of the device."""
        ...

    def enqueue(self, operation: Callable[[], object]) -> None:
        """Run ``operation`` after everything enqueued so far; decode thread, never blocks."""
        ...

    def record_event(self) -> Pending:
        """Return an event that is done once everything enqueued so far has run; decode thread."""
        ...


class CpuDevice:
    """The host itself: what is enqueued has run when :meth:`enqueue` returns."""

    max_passes_ahead = 0

    def enqueue(self, operation: Callable[[], object]) -> None:
        """Run ``operation`` now."""
        operation()

    def record_event(self) -> Pending:
        """Return an event that is done."""
        return _DONE


_DONE = Done()


class SimulatedDevice:
    """A device that runs up to ``max_passes_ahead`` forward passes behind the host, for tests.

    Everything enqueued (forward passes too) waits in one queue, as on a stream. Not for several threads.
    """

    def __init__(self, max_passes_ahead: int) -> None:
        self.max_passes_ahead = max_passes_ahead
        self._queue: deque[Callable[[], object]] = deque()
        self._num_enqueued = 0
        self._num_executed = 0

    def enqueue(self, operation: Callable[[], object]) -> None:
        """Put ``operation`` behind everything enqueued so far."""
        self._queue.append(operation)
        self._num_enqueued += 1

    def record_event(self) -> Pending:
        """Return an event for the queue as it stands."""
        return _SimulatedEvent(self, self._num_enqueued)

    @property
    def num_pending(self) -> int:
        """Operations enqueued and not executed."""
        return len(self._queue)

    def execute_one(self) -> bool:
        """Run the oldest operation; False when there is none."""
        if not self._queue:
            return False
        operation = self._queue.popleft()
        operation()
        self._num_executed += 1
        return True

    def has_executed(self, position: int) -> bool:
        """True once ``position`` operations have run."""
        return self._num_executed >= position


class _SimulatedEvent:
    def __init__(self, device: SimulatedDevice, position: int) -> None:
        self._device = device
        self._position = position

    def poll(self) -> bool:
        return self._device.has_executed(self._position)

    def wait(self, timeout_s: float) -> None:
        while not self.poll():
            self._device.execute_one()
