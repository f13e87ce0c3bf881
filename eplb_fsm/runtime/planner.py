"""Where the policy runs.

A policy is Python that computes for milliseconds to seconds. In a thread it would hold the interpreter lock that
the decode loop needs, so by default it runs in a child process that imports numpy and no torch.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from multiprocessing.connection import Connection, Pipe
from typing import Protocol

import numpy as np

from eplb_fsm.core.reasons import AbortReason
from eplb_fsm.errors import ConfigError
from eplb_fsm.placement.task import EncodedPlan, PlanRequest, PlanTask
from eplb_fsm.runtime.pending import Done, Pending
from eplb_fsm.runtime.worker import WorkError


class Planner(Protocol):
    """Computes plans for the worker."""

    def submit(self, request: PlanRequest) -> Pending:
        """Start computing; worker thread."""
        ...

    def result(self) -> EncodedPlan:
        """Return the plan once it is done.

        Raises:
            WorkError: With POLICY_ERROR when the policy raised or its process is gone.
        """
        ...

    def close(self) -> None:
        """Release the planner."""
        ...


class InlinePlanner:
    """Computes on the worker's own thread."""

    def __init__(self, task: PlanTask) -> None:
        task.warm_up()
        self._task = task
        self._result: EncodedPlan | WorkError | None = None

    def submit(self, request: PlanRequest) -> Pending:
        """Compute now."""
        try:
            self._result = self._task.plan(request)
        except Exception as error:  # a policy may raise anything
            self._result = WorkError(AbortReason.POLICY_ERROR, f"{type(error).__name__}: {error}")
        return Done()

    def result(self) -> EncodedPlan:
        """Return what was computed."""
        assert self._result is not None
        if isinstance(self._result, WorkError):
            raise self._result
        return self._result

    def close(self) -> None:
        """Nothing to release."""


class ProcessPlanner:
    """Computes in a child process, which ends with its parent: its end of the pipe closes.

    Args:
        task: What stays the same.
        start_timeout_s: Longest wait for the child at construction.
        plan_timeout_s: Longest time for one plan; the child is ended and made anew after it.

    Raises:
        ConfigError: If the child cannot find the policy.
    """

    def __init__(self, task: PlanTask, *, start_timeout_s: float, plan_timeout_s: float) -> None:
        self._task = task
        self._start_timeout_s = start_timeout_s
        self._plan_timeout_s = plan_timeout_s
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._is_closed = False
        self._start()

    def submit(self, request: PlanRequest) -> Pending:
        """Send the load to the child."""
        if self._process is None:
            try:
                self._start()
            except ConfigError as error:
                raise WorkError(AbortReason.POLICY_ERROR, f"the planner could not be started again: {error}") from error
        pipe = self._open_pipe()
        try:
            pipe.send(request)
        except OSError as error:
            self._end()
            raise WorkError(AbortReason.POLICY_ERROR, "the planner's process is gone") from error
        return _Answer(pipe, self._plan_timeout_s)

    def result(self) -> EncodedPlan:
        """Take the child's answer."""
        answer = self._receive(0.0)
        if isinstance(answer, str):
            raise WorkError(AbortReason.POLICY_ERROR, answer)
        assert isinstance(answer, np.ndarray)
        return answer

    def close(self) -> None:
        """End the child for good; any thread, also while the worker waits for a plan."""
        self._is_closed = True
        self._end()

    def _start(self) -> None:
        try:
            self._launch().send(self._task)
            answer = self._receive(self._start_timeout_s)
        except (OSError, WorkError) as error:
            self._end()
            raise ConfigError(
                f"the planner's process did not start: {error}; see its output, or choose planner='thread'"
            ) from error
        if isinstance(answer, str):
            self._end()
            raise ConfigError(answer)

    def _launch(self) -> Connection:
        mine, theirs = Pipe()
        with self._lock, theirs:
            if self._is_closed:
                mine.close()
                raise OSError("it was closed")
            self._pipe = mine
            self._process = subprocess.Popen(
                [sys.executable, "-m", "eplb_fsm.runtime.planner_child", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            )
        return mine

    def _open_pipe(self) -> Connection:
        pipe = self._pipe
        if pipe is None:
            raise WorkError(AbortReason.POLICY_ERROR, "the planner was closed")
        return pipe

    def _receive(self, timeout_s: float) -> object:
        pipe = self._open_pipe()
        try:
            if pipe.poll(timeout_s):
                return pipe.recv()
            detail = "the planner took longer than its limit"
        except (EOFError, OSError):
            detail = "the planner's process died"
        self._end()
        raise WorkError(AbortReason.POLICY_ERROR, detail)

    def _end(self) -> None:
        with self._lock:
            # The child goes first: its end of the pipe closes, and a thread that waits for an answer wakes up.
            if self._process is not None:
                self._process.kill()
                self._process.wait()
                self._process = None
            if self._pipe is not None:
                self._pipe.close()
                self._pipe = None


class _Answer:
    """The child's answer; a limit of its own, so that the peers get an error instead of a time-out."""

    def __init__(self, pipe: Connection, limit_s: float) -> None:
        self._pipe = pipe
        self._limit_s = limit_s

    def poll(self) -> bool:
        return self._pipe.poll(0)

    def wait(self, timeout_s: float) -> None:
        try:
            self._pipe.poll(self._limit_s)
        except OSError:
            return  # result() says so
