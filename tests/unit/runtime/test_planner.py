"""The planner's child process: its errors are errors of a plan, and it never outlives its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from eplb_fsm.core.reasons import AbortReason
from eplb_fsm.errors import ConfigError
from eplb_fsm.placement import Placement, Thresholds, Topology
from eplb_fsm.placement.shapes import BankShape, Budget
from eplb_fsm.placement.task import PlanRequest, PlanTask
from eplb_fsm.runtime.planner import InlinePlanner, Planner, ProcessPlanner
from eplb_fsm.runtime.worker import WorkError
from tests.dist.policies import MARKER

_CURRENT = Placement.initial(2, 8, 12, 2)
_LOAD = np.arange(16, dtype=np.int64).reshape(2, 8)


def _task(policy: str) -> PlanTask:
    return PlanTask(policy, Topology(2), (BankShape("target", (64, 64)),), Budget(4096, 2), Thresholds(0.0))


def _plan(planner: Planner) -> object:
    planner.submit(PlanRequest([_LOAD], [_CURRENT])).wait(10)
    return planner.result()


def _num_open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_both_planners_make_the_same_plan_and_leave_no_descriptor() -> None:
    """A child process computes what a thread computes; after close() its pipe is gone, and close() may come twice."""
    before = _num_open_files()
    planner = ProcessPlanner(_task("deepseek"), start_timeout_s=100, plan_timeout_s=30)
    theirs = _plan(planner)
    assert np.array_equal(theirs, _plan(InlinePlanner(_task("deepseek"))))  # type: ignore[arg-type]
    planner.close()
    planner.close()
    assert _num_open_files() == before
    with pytest.raises(WorkError, match="it was closed"):
        planner.submit(PlanRequest([_LOAD], [_CURRENT]))


def test_a_planner_warms_its_policy_up() -> None:
    """Both planners call warm_up() where a policy has one, before they plan."""
    task = _task("tests.dist.policies:NeedsWarmUp")
    planner = ProcessPlanner(task, start_timeout_s=100, plan_timeout_s=30)
    theirs = _plan(planner)
    planner.close()
    assert np.array_equal(theirs, _plan(InlinePlanner(task)))  # type: ignore[arg-type]


def test_the_target_reaches_the_policy() -> None:
    """With a target that the placement reaches nothing moves; with a higher one something does."""
    skipped, moving = (
        replace(_task("movement_aware"), target_balancedness=target).plan(PlanRequest([_LOAD], [_CURRENT]))
        for target in (0.1, 0.99)
    )
    assert "already where the policy wants it" in _task("movement_aware").decode(skipped, (_CURRENT,)).skip_reason
    assert _task("movement_aware").decode(moving, (_CURRENT,)).chunks


def test_a_policy_error_is_the_plans_and_a_restart_follows_a_death(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Raising, exiting and hanging are POLICY_ERROR with words; the planner goes on, with a new child where it must."""
    marker = tmp_path / "marker"
    monkeypatch.setenv(MARKER, str(marker))
    planner = ProcessPlanner(_task("tests.dist.policies:Marked"), start_timeout_s=100, plan_timeout_s=5)
    before = _num_open_files()
    for how, words in (
        ("raise", "ValueError: this policy does not like the load"),
        ("exit", "the planner's process died"),
        ("hang", "took longer than its limit"),
    ):
        marker.write_text(how)
        with pytest.raises(WorkError, match=words) as raised:
            _plan(planner)
        assert raised.value.reason is AbortReason.POLICY_ERROR
        marker.unlink()
        assert isinstance(_plan(planner), np.ndarray)
    assert _num_open_files() == before
    planner.close()


def test_closing_wakes_a_worker_that_waits_for_a_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """close() from another thread ends the wait for a hanging policy, as a failed plan and nothing else."""
    marker = tmp_path / "marker"
    marker.write_text("hang")
    monkeypatch.setenv(MARKER, str(marker))
    planner = ProcessPlanner(_task("tests.dist.policies:Marked"), start_timeout_s=100, plan_timeout_s=60)
    raised: list[BaseException] = []

    def wait() -> None:
        try:
            _plan(planner)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.2)
    planner.close()
    thread.join(10)
    assert not thread.is_alive()
    assert isinstance(raised[0], WorkError)


@pytest.mark.parametrize("policy", ["no such policy", "tests.dist.policies:Missing", "tests.dist.policies:Broken"])
def test_a_policy_that_is_not_there_is_a_configuration_error(policy: str) -> None:
    """Neither planner starts without its policy, and the error names it; no child stays."""
    before = _num_open_files()
    with pytest.raises(ConfigError, match=policy.split(":")[-1]):
        InlinePlanner(_task(policy))
    with pytest.raises(ConfigError, match=policy.split(":")[-1]):
        ProcessPlanner(_task(policy), start_timeout_s=100, plan_timeout_s=1)
    assert _num_open_files() == before


def test_a_child_that_does_not_answer_is_an_error() -> None:
    """A child that is not up in time is a ConfigError that says what else can be chosen."""
    with pytest.raises(ConfigError, match="choose planner='thread'"):
        ProcessPlanner(_task("deepseek"), start_timeout_s=0.001, plan_timeout_s=1)


_PARENT = """
import sys
sys.path[:0] = {path!r}
from tests.unit.runtime.test_planner import PlanRequest, ProcessPlanner, _CURRENT, _LOAD, _task
planner = ProcessPlanner(_task("tests.dist.policies:Marked"), start_timeout_s=100, plan_timeout_s=60)
planner.submit(PlanRequest([_LOAD], [_CURRENT]))
print(planner._process.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("how", ["hang", "plan"])
def test_the_child_ends_with_a_killed_parent(how: str, tmp_path: Path) -> None:
    """SIGKILL of the parent ends the child, also in the middle of a policy that never returns."""
    marker = tmp_path / "marker"
    marker.write_text(how)
    parent = subprocess.Popen(
        [sys.executable, "-c", _PARENT.format(path=[path for path in sys.path if path])],
        env={**os.environ, MARKER: str(marker)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    os.kill(parent.pid, signal.SIGKILL)
    parent.communicate()
    deadline = time.monotonic() + 10
    while _is_running(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _is_running(child)


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False
