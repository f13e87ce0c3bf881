"""Below the mailbox: real worker threads beside the decode loop, changing over as often as the interpreter allows."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

import pytest
import torch
from clusters import ROW_BYTES, Recorded, config

from eplb_fsm.errors import TransferError
from eplb_fsm.runtime.device import CpuDevice
from eplb_fsm.runtime.pending import Pending
from eplb_fsm.runtime.staging import StagingArea
from eplb_fsm.runtime.transport import Parcel, Transport
from eplb_fsm.runtime.worker import ThreadWorker

NUM_EPOCHS = 25
MAX_STEPS = 60_000
"""A run in which nothing is ever committed ends, too."""
PATIENT = {
    "collecting_deadline_steps": 10 * MAX_STEPS,
    "computing_deadline_steps": 10 * MAX_STEPS,
    "awaiting_consensus_deadline_steps": 10 * MAX_STEPS,
    "transfer_slack_steps": 10 * MAX_STEPS,
    "drain_deadline_steps": 10 * MAX_STEPS,
}
"""A decode loop without forward passes makes many steps while a thread waits for its turn."""


class Shared:
    """The end of an in-memory transport that may be used by one thread of each rank: one lock for all ends.

    The lock is around the exchange between ranks, which stands for a network; what a rank's own threads share has none.
    """

    def __init__(self, inner: Transport, lock: threading.Lock) -> None:
        self._inner = inner
        self._lock = lock
        self.flags = inner.flags

    def begin(self, sends: Sequence[Parcel], receives: Sequence[Parcel], tag: int) -> Pending:
        return self._locked(lambda: self._inner.begin(sends, receives, tag))

    def all_reduce_sum(self, tensor: torch.Tensor) -> Pending:
        return self._locked(lambda: self._inner.all_reduce_sum(tensor))

    def broadcast(self, tensor: torch.Tensor, root: int) -> Pending:
        return self._locked(lambda: self._inner.broadcast(tensor, root))

    def close(self) -> None:
        self._inner.close()

    def _locked(self, start: Callable[[], Pending]) -> Pending:
        with self._lock:
            return _Blocking(start(), self._lock)


class _Blocking:
    def __init__(self, inner: Pending, lock: threading.Lock) -> None:
        self._inner = inner
        self._lock = lock

    def poll(self) -> bool:
        with self._lock:
            return self._inner.poll()

    def wait(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not self.poll():
            if time.monotonic() > deadline:
                raise TransferError("the other ranks did not come")
            time.sleep(0)


@pytest.fixture(autouse=True)
def _change_over_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def with_threads(run: Recorded) -> list[ThreadWorker]:
    """Put real threads in the place of the cooperative workers."""
    lock = threading.Lock()
    workers = []
    for rank in run.ranks:
        runner = rank.parts.runner
        worker = ThreadWorker(rank.parts.mailbox, CpuDevice(), f"worker-{rank.rank}")
        workers.append(worker)
        runner._worker = worker
        runner._device = CpuDevice()  # the simulated one is for one thread, and a worker waits for its events
        runner._jobs.transport = Shared(rank.parts.transport, lock)  # type: ignore[assignment]
    return workers


def decode(run: Recorded, num_epochs: int) -> None:
    """Make steps on all ranks in turn until enough epochs are committed, and the pace changes all the time."""
    for turn in range(MAX_STEPS):
        for rank in run.ranks:
            run.cluster.step(rank)
            pace = rank.parts.runner._jobs.pace
            (pace.slow_down if turn % 7 == 0 else pace.speed_up)()
        if not turn % 16:
            time.sleep(0)
        if all(rank.fsm.health().num_outcomes["COMMITTED"] >= num_epochs for rank in run.ranks):
            return


def race(run: Recorded) -> None:
    """Decode with real workers while another thread looks and asks, then check everything."""
    workers = with_threads(run)
    is_over, wrong = threading.Event(), []

    def look_and_ask() -> None:
        try:
            while not is_over.is_set():
                for rank in run.ranks:
                    rank.fsm.health()
                    rank.fsm.request_rebalance()
                time.sleep(0.001)
        except Exception as error:  # whatever it is, it must not stay in this thread
            wrong.append(error)

    watcher = threading.Thread(target=look_and_ask)
    watcher.start()
    try:
        decode(run, NUM_EPOCHS)
    finally:
        is_over.set()
        watcher.join()
        for worker in workers:
            worker.close()
    assert wrong == []
    run.check()
    assert all(rank.fsm.health().num_outcomes["COMMITTED"] >= NUM_EPOCHS for rank in run.ranks)


@pytest.mark.parametrize("buffers", [1, 3])
@pytest.mark.parametrize("policy", ["rotate", "shuffle"])
def test_threads_change_nothing(policy: str, buffers: int) -> None:
    """With real workers, whose threads are switched after each few instructions, all passes see the right rows."""
    options = config(
        policy=policy,
        staging_buffers=buffers,
        commit_bytes=ROW_BYTES,
        step_interval=2,
        idle_round_interval=1,
        **PATIENT,
    )
    race(Recorded(3, lag=1, options=options))


def test_a_race_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a worker hands its program out before the rows are there, the same run shows it."""
    stage = StagingArea.stage

    class Hasty:
        def __init__(self, inner: Transport) -> None:
            self._inner = inner

        def begin(self, *what: object) -> Pending:
            pending = self._inner.begin(*what)  # type: ignore[arg-type]
            threading.Thread(target=lambda: _finish(pending), daemon=True).start()
            return _Done()

    class _Done:
        def poll(self) -> bool:
            return True

        def wait(self, timeout_s: float) -> None:
            pass

    def _finish(pending: Pending) -> None:
        with suppress(TransferError):
            pending.wait(10)

    def stage_hastily(self: StagingArea, chunk: object, after: Pending, tag: int, transport: Transport, *rest: object):
        return stage(self, chunk, after, tag, Hasty(transport), *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(StagingArea, "stage", stage_hastily)
    monkeypatch.setattr(StagingArea, "_verify", lambda self, at, received: None)
    options = config(commit_bytes=ROW_BYTES, step_interval=2, idle_round_interval=1, **PATIENT)
    with pytest.raises(AssertionError):
        race(Recorded(3, lag=1, options=options))
