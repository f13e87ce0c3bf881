"""Times what an engine calls after each forward pass to rebalance experts, whoever does that.

STEP_TIMES names a folder; without it nothing is changed. Each process that makes forward passes writes a file there, a
line for each step: the time by the clock, and the processor's time of the thread, both in nanoseconds.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_VARIABLE = "STEP_TIMES"


def register_in_vllm() -> None:
    """Time ``EplbState.step``, of this class or of what stands in its place."""
    if not os.environ.get(_VARIABLE):
        return
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    load_model = CPUModelRunner.load_model

    def load_timed_model(self: Any, *args: Any, **kwargs: Any) -> None:
        load_model(self, *args, **kwargs)
        if getattr(self, "eplb_state", None) is not None:
            self.eplb_state.step = _timed(self.eplb_state.step)

    CPUModelRunner.load_model = load_timed_model


def register_in_sglang() -> None:
    """Time ``EPLBManager.on_forward_pass_end``, of this class or of what stands in its place."""
    if not os.environ.get(_VARIABLE):
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def time_manager(result: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.eplb_manager is not None:
            self.eplb_manager.on_forward_pass_end = _timed(self.eplb_manager.on_forward_pass_end)
        return result

    target = "sglang.srt.model_executor.model_runner.ModelRunner.initialize"
    HookRegistry.register(target, time_manager, HookType.AFTER)


def _timed(step: Callable[..., Any]) -> Callable[..., Any]:
    file = Path(os.environ[_VARIABLE], str(os.getpid())).open("w", buffering=1)  # noqa: SIM115  # for as long as the process lives

    def timed(*args: Any, **kwargs: Any) -> Any:
        cpu, wall = time.thread_time_ns(), time.perf_counter_ns()
        try:
            return step(*args, **kwargs)
        finally:
            wall = time.perf_counter_ns() - wall
            file.write(f"{wall} {time.thread_time_ns() - cpu}\n")

    return timed
