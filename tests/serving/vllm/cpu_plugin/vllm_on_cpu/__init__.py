"""What vLLM 0.32.0 lacks to run expert parallelism with EPLB on CPUs; for tests only.

vLLM calls `register` once in each of its processes: the frontend, the engine core, every worker and the process that
inspects model classes.
"""

from __future__ import annotations

import importlib

__all__ = ["register"]


def register() -> None:
    """Apply the patches where vLLM runs on CPUs; elsewhere it needs none of them."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    # The worker comes first: it replaces parts of torch that the modules imported below look up as they load.
    importlib.import_module("vllm.v1.worker.cpu_worker")
    from vllm_on_cpu import config, faults, kernel, passes, routing, runner, streams

    # The last two wrap what the runner has put in place.
    for patch in (config, streams, routing, kernel, runner, passes, faults):
        patch.apply()
