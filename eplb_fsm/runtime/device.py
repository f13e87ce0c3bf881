"""Where weights live: streams and events, reduced to what a rebalance needs.

A host enqueues work and may be several forward passes ahead of its device. The library therefore never
writes a live row directly: it enqueues the write behind everything enqueued so far, and whoever needs it to
have happened waits on an event. On a CPU the two moments are one; :class:`SimulatedDevice` keeps them apart,
so that the order is tested without an accelerator.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch

from eplb_fsm.errors import TransferError
from eplb_fsm.runtime.pending import Done, Pending

_EVENT_POLL_S = 0.0002
_CLOSE_WAIT_S = 5.0


class DeviceOps(Protocol):
    """The stream on which the engine enqueues forward passes, and one of the worker's beside it."""

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

    def worker_stream(self) -> AbstractContextManager[object]:
        """Have what this thread enqueues by itself run beside the engine's stream while the context is open."""
        ...

    def worker_event(self) -> Pending:
        """Return an event that is done once everything that was enqueued in that context has run."""
        ...

    def close(self) -> None:
        """Wait for a moment until what was enqueued has run: its memory is given back then."""
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

    def worker_stream(self) -> AbstractContextManager[object]:
        """Return a context that changes nothing."""
        return nullcontext()

    def worker_event(self) -> Pending:
        """Return an event that is done."""
        return _DONE

    def close(self) -> None:
        """Nothing to wait for."""


_DONE = Done()


class AcceleratorDevice:
    """An accelerator of torch: events on the stream that is current where ``step()`` is called.

    The worker's copies run on a stream of their own. It never waits for the engine's stream there, nor the engine's
    for it: the worker thread waits for the event of a commit before it reads what was written, and for its own copies
    before the rank votes for a commit that reads them.

    Args:
        device: The accelerator, as the expert tensors name it.
        max_passes_ahead: Forward passes by which the host may be ahead of it.
    """

    def __init__(self, device: torch.device, max_passes_ahead: int = 2) -> None:
        self.max_passes_ahead = max_passes_ahead
        self._device = device
        self._worker_stream = torch.Stream(device)
        self._running: deque[tuple[_AcceleratorEvent, Callable[[], object]]] = deque()
        """What was enqueued, kept until it has run: its tensors were made on the worker's stream, whose allocator would
        give their memory to the next ones there as soon as they are dropped."""

    def enqueue(self, operation: Callable[[], object]) -> None:
        """Call ``operation``, which enqueues on the current stream, behind what was enqueued on another one before."""
        while self._running and self._running[0][0].poll():
            self._running.popleft()
        if self._running:
            self._running[-1][0].hold(torch.accelerator.current_stream(self._device))
        operation()
        self._running.append((self.record_event(), operation))

    def record_event(self) -> _AcceleratorEvent:
        """Return an event of the current stream."""
        return _AcceleratorEvent(self._device)

    @contextmanager
    def worker_stream(self) -> Iterator[None]:
        """Make the worker's stream the current one of this thread."""
        before = torch.accelerator.current_stream(self._device)
        torch.accelerator.set_stream(self._worker_stream)
        try:
            yield
        finally:
            torch.accelerator.set_stream(before)

    def worker_event(self) -> Pending:
        """Return an event of the current stream, which is the worker's."""
        return _AcceleratorEvent(self._device)

    def close(self) -> None:
        """Wait until commits have run."""
        if self._running:
            self._running[-1][0].wait(_CLOSE_WAIT_S)
        self._running.clear()


class _AcceleratorEvent:
    """An event of the stream that is current where it is made."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.Event(device)
        self._event.record(torch.accelerator.current_stream(device))

    def hold(self, stream: torch.Stream) -> None:
        """Have what is enqueued on a stream from here on run after this event."""
        self._event.wait(stream)

    def poll(self) -> bool:
        return self._event.query()

    def wait(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not self.poll():
            if time.monotonic() > deadline:
                raise TransferError(f"the device has not run what was enqueued in {timeout_s} s")
            time.sleep(_EVENT_POLL_S)


def operations_on(device: torch.device) -> DeviceOps:
    """Return the operations of the host or of an accelerator."""
    return CpuDevice() if device.type == "cpu" else AcceleratorDevice(device)


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

    def worker_stream(self) -> AbstractContextManager[object]:
        """Return a context that changes nothing: the worker's copies are the host's."""
        return nullcontext()

    def worker_event(self) -> Pending:
        """Return an event that is done."""
        return _DONE

    def close(self) -> None:
        """Nothing: the scheduler says what runs."""

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
