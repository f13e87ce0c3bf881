"""The model runner for CPUs, whose own `load_model` leaves out everything about EPLB.

The rest of it comes from the runner for GPUs, which tells `eplb_state` about every forward and steps it after each.
"""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models.interfaces import get_mixture_of_experts_model
from vllm.v1.worker import gpu_model_runner
from vllm.v1.worker.cpu_model_runner import CPUModelRunner


def apply() -> None:
    """Make `load_model` do about EPLB what the runner for GPUs does, in the same order."""
    load_without_eplb = CPUModelRunner.load_model

    def load_model(self: Any, load_dummy_weights: bool = False) -> None:
        if self.parallel_config.enable_eplb:
            # Looked up now, not above: a plugin may have put a class of its own there.
            self.eplb_state = gpu_model_runner.EplbState(self.parallel_config, self.device)
        load_without_eplb(self, load_dummy_weights)
        if self.parallel_config.enable_eplb:
            _register_model(self)

    CPUModelRunner.load_model = load_model


def _register_model(runner: Any) -> None:
    runner._moe_model = get_mixture_of_experts_model(runner.model)
    if runner._moe_model is None:
        return
    runner.eplb_state.add_model(runner._moe_model, runner.model_config)
    if runner.eplb_state.is_async:
        runner.eplb_state.start_async_loop()
