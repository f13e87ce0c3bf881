"""The background worker: executes jobs, one after the other, and reports to a mailbox.

A job is a generator that yields what it waits for. Decode and worker share nothing but the mailbox and
buffers that have one owner at a time. Jobs are begun at agreed steps, so the workers of all ranks run the same
jobs in the same order, and every job is run to its end, also when its epoch was aborted: a peer may be in it.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from eplb_fsm.core.reasons import AbortReason
from eplb_fsm.errors import PlanError, TransportLost
from eplb_fsm.observe.gains import Seen
from eplb_fsm.placement.plan import Plan
from eplb_fsm.runtime.background import unobtrusive_threads
from eplb_fsm.runtime.clock import Clock, monotonic
from eplb_fsm.runtime.device import DeviceOps
from eplb_fsm.runtime.pending import Pending
from eplb_fsm.runtime.staging import CommitProgram, IntegrityError

logger = logging.getLogger(__name__)


class LoadCollected(NamedTuple):
    """The load of all ranks is summed."""

    epoch: int


class PlanReady(NamedTuple):
    """This rank holds a plan that it has validated, and new shares for the live placement, if shares are weighted."""

    epoch: int
    plan: Plan
    tables: Sequence[object]
    seen: Seen | None
    """What the window says of the last committed epoch."""


class ChunkStaged(NamedTuple):
    """A chunk is staged and verified."""

    epoch: int
    program: CommitProgram


class WorkFailed(NamedTuple):
    """A job raised; the epoch it belongs to cannot go on."""

    epoch: int
    reason: AbortReason
    detail: str


class TransportGone(NamedTuple):
    """The transfer group is broken: a receive that was given up may still write its buffer, so no epoch may follow."""

    detail: str


class SlotDamaged(NamedTuple):
    """A committed row is not what was staged: this rank must not run another forward pass."""

    detail: str


class JobDone(NamedTuple):
    """A job has ended, well or not: nothing of it is under way any more."""

    epoch: int


Message = LoadCollected | PlanReady | ChunkStaged | WorkFailed | TransportGone | SlotDamaged | JobDone
Mailbox = queue.SimpleQueue[Message]


class WorkError(Exception):
    """Raised inside a job to end it with a reason of its own."""

    def __init__(self, reason: AbortReason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(slots=True)
class Job:
    """One piece of background work.

    Attributes:
        epoch: The epoch it belongs to; every message it causes carries it.
        reason: The reason of an abort when it raises anything unexpected.
        body: Yields what it waits for.
        wait_limit_s: Longest wait for one of those.
    """

    epoch: int
    reason: AbortReason
    body: Iterator[Pending]
    wait_limit_s: float


class Worker(Protocol):
    """Who executes jobs."""

    def submit(self, job: Job) -> None:
        """Queue a job; decode thread, never blocks."""
        ...

    def run_inline(self) -> None:
        """Execute queued jobs on the calling thread, where that is the worker's way; blocks (sync mode)."""
        ...

    @property
    def is_alive(self) -> bool:
        """False when submitted jobs will never be executed."""
        ...

    def close(self) -> None:
        """Take no more jobs, and leave those that were submitted to their end for a moment: peers may be in them."""
        ...

    def join(self) -> None:
        """Wait for a moment until nothing of the worker runs; after the parts that a job waits for are closed."""
        ...


def _fail(job: Job, error: BaseException) -> WorkFailed | TransportGone:
    if isinstance(error, TransportLost):
        return TransportGone(str(error))
    if isinstance(error, WorkError):
        return WorkFailed(job.epoch, error.reason, str(error))
    if isinstance(error, IntegrityError):
        return WorkFailed(job.epoch, AbortReason.INTEGRITY, str(error))
    if isinstance(error, PlanError):
        return WorkFailed(job.epoch, AbortReason.INVALID_PLAN, str(error))
    return WorkFailed(job.epoch, job.reason, f"{type(error).__name__}: {error}")


def run_blocking(job: Job, mailbox: Mailbox, device: DeviceOps) -> None:
    """Run a job to its end on this thread. Whatever it raises becomes a message, never silence."""
    try:
        with device.worker_stream():
            for pending in job.body:
                pending.wait(job.wait_limit_s)
    except Exception as error:  # everything: the decode loop must hear of it
        mailbox.put(_fail(job, error))
    finally:
        mailbox.put(JobDone(job.epoch))


class InlineWorker:
    """Executes jobs inside ``step()``: the synchronous mode."""

    is_alive = True

    def __init__(self, mailbox: Mailbox, device: DeviceOps) -> None:
        self._mailbox = mailbox
        self._device = device
        self._jobs: list[Job] = []

    def submit(self, job: Job) -> None:
        """Queue the job for :meth:`run_inline`."""
        self._jobs.append(job)

    def run_inline(self) -> None:
        """Execute all queued jobs."""
        while self._jobs:
            run_blocking(self._jobs.pop(0), self._mailbox, self._device)

    def close(self) -> None:
        """Drop what was not begun."""
        self._jobs.clear()

    def join(self) -> None:
        """Nothing runs outside :meth:`run_inline`."""


_CLOSE_WAIT_S = 1.0
"""How long close() waits for jobs whose peers may be stopped, and then for the thread to end."""


class ThreadWorker:
    """Executes jobs in one daemon thread.

    Attributes:
        is_alive: Whether the thread still runs; a plain attribute, since every idle round asks.
    """

    def __init__(self, mailbox: Mailbox, device: DeviceOps, name: str) -> None:
        self._mailbox = mailbox
        self._device = device
        self.is_alive = True
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        with unobtrusive_threads():
            self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue the job for the thread."""
        self._jobs.put(job)

    def run_inline(self) -> None:
        """Nothing: the thread runs by itself."""

    def close(self) -> None:
        """End the thread after the last job: ranks that close at the same step have submitted the same ones."""
        self._jobs.put(None)
        self.join()

    def join(self) -> None:
        """Wait for the thread's end: one that is inside gloo when the interpreter is finalized aborts the process."""
        self._thread.join(_CLOSE_WAIT_S)

    def _run(self) -> None:
        try:
            while (job := self._jobs.get()) is not None:
                run_blocking(job, self._mailbox, self._device)
        finally:
            self.is_alive = False


class CooperativeWorker:
    """Executes jobs piece by piece, when a scheduler says so: simulation and interleaving tests."""

    is_alive = True

    def __init__(self, mailbox: Mailbox) -> None:
        self._mailbox = mailbox
        self._jobs: list[Job] = []
        self._waiting_for: Pending | None = None

    @property
    def is_idle(self) -> bool:
        """Whether no job waits or is under way."""
        return not self._jobs

    def submit(self, job: Job) -> None:
        """Queue the job."""
        self._jobs.append(job)

    def run_inline(self) -> None:
        """Nothing: the scheduler advances the jobs."""

    def close(self) -> None:
        """Drop everything."""
        self._jobs.clear()

    def join(self) -> None:
        """Nothing runs outside :meth:`advance`."""

    def advance(self) -> bool:
        """Run the current job up to its next wait; False when there is nothing that can go on."""
        if not self._jobs:
            return False
        job = self._jobs[0]
        try:
            if self._waiting_for is not None and not self._waiting_for.poll():
                return False
            self._waiting_for = next(job.body)
        except StopIteration:
            self._end(job)
        except Exception as error:
            self._mailbox.put(_fail(job, error))
            self._end(job)
        return True

    def _end(self, job: Job) -> None:
        self._waiting_for = None
        self._jobs.pop(0)
        self._mailbox.put(JobDone(job.epoch))


_LOOK_S = 0.0002
"""From one look whether a step has ended to the next: a part of the time that a step takes."""


class Pace:
    """Slows the worker: sends by a token bucket, and by pauses while a step is under way or steps take longer.

    The decode thread writes two floats and a flag and says when to close, the worker reads them; no more is shared.

    Args:
        max_mb_s: Most megabytes (10**6 bytes) a second, 0 for no limit.
        clock: Seconds.

    Attributes:
        is_in_step: Whether a step is under way that has something to do, and the worker no part in it; decode thread.
    """

    max_pause_s = 0.05
    """Bound of the pause before one chunk, so that a slow loop delays an epoch and never stops it."""

    def __init__(self, max_mb_s: float, clock: Clock = monotonic) -> None:
        self._clock = clock
        self._bytes_per_s = max_mb_s * 1e6
        self._free_at = 0.0
        self._pause_s = 0.0
        self._breath_s = 0.0
        self.is_in_step = False
        self._closing = threading.Event()

    def close(self) -> None:
        """End all waiting, now and later; decode thread."""
        self._closing.set()

    def slow_down(self) -> None:
        """Double the pause before the next chunk; decode thread."""
        self._pause_s = min(self.max_pause_s, max(0.002, self._pause_s * 2))

    def speed_up(self) -> None:
        """Halve the pause; decode thread."""
        self._pause_s = self._pause_s / 2 if self._pause_s > 0.001 else 0.0

    def set_breath(self, step_s: float) -> None:
        """Say how long a step of the decode loop takes; decode thread."""
        self._breath_s = step_s

    def let_step_end(self) -> None:
        """Wait while a step is under way, so that it keeps its core and the interpreter; worker thread."""
        while self.is_in_step and not self._closing.wait(_LOOK_S):
            pass

    def breathe(self) -> Pending:
        """Return what to wait for between two pieces of a job, so that no one step pays for both; worker thread."""
        return _Delay(self._clock() + self._breath_s, self._clock, self._closing)

    def wait_for(self, num_bytes: int) -> Pending:
        """Return what to wait for before sending ``num_bytes``; worker thread."""
        now = self._clock()
        delay = max(self._pause_s, self._free_at - now)
        if self._bytes_per_s:
            self._free_at = max(now, self._free_at) + num_bytes / self._bytes_per_s
        return _Delay(now + delay, self._clock, self._closing)


class _Delay:
    def __init__(self, until: float, clock: Clock, closing: threading.Event) -> None:
        self._until = until
        self._clock = clock
        self._closing = closing

    def poll(self) -> bool:
        return self._clock() >= self._until or self._closing.is_set()

    def wait(self, timeout_s: float) -> None:
        remaining = self._until - self._clock()
        if remaining > 0:
            self._closing.wait(remaining)
