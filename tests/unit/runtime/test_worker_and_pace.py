"""The worker ends with the job under way, and what slows it never holds close() up."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator

import pytest

from eplb_fsm.core.reasons import AbortReason
from eplb_fsm.errors import PlanError
from eplb_fsm.runtime.device import CpuDevice
from eplb_fsm.runtime.gauge import StepGauge
from eplb_fsm.runtime.pending import Done, Pending
from eplb_fsm.runtime.staging import IntegrityError
from eplb_fsm.runtime.worker import InlineWorker, Job, JobDone, Mailbox, Pace, ThreadWorker, WorkError, WorkFailed


def _messages(mailbox: Mailbox) -> list[object]:
    found = []
    while not mailbox.empty():
        found.append(mailbox.get_nowait())
    return found


def _raising(error: BaseException) -> Iterator[Pending]:
    yield Done()
    raise error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("x"), AbortReason.TRANSFER_ERROR),
        (WorkError(AbortReason.POLICY_ERROR, "x"), AbortReason.POLICY_ERROR),
        (IntegrityError("x"), AbortReason.INTEGRITY),
        (PlanError("x"), AbortReason.INVALID_PLAN),
    ],
)
def test_whatever_a_job_raises_becomes_one_message_and_its_end_another(error: Exception, reason: AbortReason) -> None:
    """A job that raises is reported with its reason and as done, and the worker goes on."""
    mailbox = Mailbox()
    worker = InlineWorker(mailbox, CpuDevice())
    worker.submit(Job(3, AbortReason.TRANSFER_ERROR, _raising(error), 1.0))
    worker.submit(Job(4, AbortReason.TRANSFER_ERROR, iter([Done()]), 1.0))
    worker.run_inline()
    failed, done, next_done = _messages(mailbox)
    assert isinstance(failed, WorkFailed)
    assert (failed.epoch, failed.reason) == (3, reason)
    assert (done, next_done) == (JobDone(3), JobDone(4))


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="a policy of Linux")
def test_the_worker_interrupts_no_step_when_it_wakes() -> None:
    """Its thread has the scheduler's policy for work that can wait, and so has a thread that it starts."""
    policies: list[int] = []

    def look() -> Iterator[Pending]:
        policies.append(os.sched_getscheduler(0))
        other = threading.Thread(target=lambda: policies.append(os.sched_getscheduler(0)))
        other.start()
        other.join()
        yield Done()

    worker = ThreadWorker(Mailbox(), CpuDevice(), "eplb-fsm-worker-test")
    worker.submit(Job(1, AbortReason.TRANSFER_ERROR, look(), 1.0))
    worker.close()
    assert policies == [os.SCHED_BATCH] * 2
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="a policy of Linux")
def test_a_sandbox_that_forbids_the_policy_prevents_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system call is refused, threads start all the same."""

    def refuse(*args: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    ThreadWorker(Mailbox(), CpuDevice(), "eplb-fsm-worker-test").close()


def test_close_ends_after_the_jobs_that_were_submitted() -> None:
    """Peers may be in them already: a rank that closes between two jobs must not leave them waiting for the second."""
    mailbox = Mailbox()
    worker = ThreadWorker(mailbox, CpuDevice(), "eplb-fsm-worker-test")
    begun, go_on = threading.Event(), threading.Event()

    def first() -> Iterator[Pending]:
        begun.set()
        go_on.wait(10)
        yield Done()

    worker.submit(Job(1, AbortReason.WORKER_ERROR, first(), 1.0))
    worker.submit(Job(2, AbortReason.WORKER_ERROR, iter([Done()]), 1.0))
    assert begun.wait(10)
    threading.Timer(0.2, go_on.set).start()
    worker.close()
    assert not worker.is_alive
    assert _messages(mailbox) == [JobDone(1), JobDone(2)]


def test_close_ends_the_wait_of_a_paced_transfer() -> None:
    """A limit of a byte a second does not keep the thread for hours: closing the pace ends the wait."""
    pace = Pace(1e-6)
    assert pace.wait_for(1000).poll()
    wait = pace.wait_for(1000)
    assert not wait.poll()
    thread = threading.Thread(target=wait.wait, args=(3600.0,))
    thread.start()
    time.sleep(0.05)
    assert thread.is_alive()
    pace.close()
    thread.join(10)
    assert not thread.is_alive()
    assert pace.wait_for(1000).poll()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_dies_is_seen() -> None:
    """What no job may survive ends the thread; the rank sees it, and the job still ends."""
    mailbox = Mailbox()
    worker = ThreadWorker(mailbox, CpuDevice(), "eplb-fsm-worker-test")
    worker.submit(Job(1, AbortReason.WORKER_ERROR, _raising(SystemExit()), 1.0))
    worker.join()
    assert not worker.is_alive
    assert _messages(mailbox) == [JobDone(1)]


def test_pieces_of_a_job_are_a_step_apart() -> None:
    """A breath is as long as a step was while nothing was transferred; else it is nothing."""
    now = [0.0]
    for max_slowdown, breath_s in ((0.03, 0.01), (0.0, 0.0)):
        pace = Pace(0, lambda: now[0])
        assert pace.breathe().poll()
        gauge = StepGauge(pace, max_slowdown)
        for step_idx in range(0, 40, 10):
            gauge.note(step_idx, step_idx * 0.01, is_transferring=False)
        gauge.note(50, 100.0, is_transferring=True)
        gauge.start()
        breath = pace.breathe()
        assert breath.poll() == (breath_s == 0.0)
        now[0] += breath_s * 0.99
        assert breath.poll() == (breath_s == 0.0)
        now[0] += breath_s * 0.02
        assert breath.poll()


def test_the_pause_doubles_to_a_bound_and_halves_to_nothing() -> None:
    """Slowing down is bounded, so that a slow loop delays an epoch and never stops it; no limit means no wait."""
    pace = Pace(0)
    assert pace.wait_for(1 << 30).poll()
    for _ in range(20):
        pace.slow_down()
    assert 0 < pace._pause_s <= Pace.max_pause_s
    for _ in range(20):
        pace.speed_up()
    assert pace.wait_for(1).poll()
