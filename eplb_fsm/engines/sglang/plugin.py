"""Entry point ``sglang.srt.plugins``: puts :class:`.BackgroundEPLBManager` into SGLang where that is asked for."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from eplb_fsm.engines.fingerprints import check_fingerprints, read_tested
from eplb_fsm.engines.switch import VARIABLE, is_asked
from eplb_fsm.errors import ConfigError

logger = logging.getLogger(__name__)

_MANAGER = "sglang.srt.eplb.eplb_manager.EPLBManager"
_INITIALIZE = "sglang.srt.model_executor.model_runner.ModelRunner.initialize"
_UPDATER = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
_RELOADS = ("update_weights_from_disk", "update_weights_from_ipc")
"""Methods that write all weights before they return."""
_OPENING = {"begin_weight_update": "end_weight_update", "release_memory_occupation": "resume_memory_occupation"}
"""Methods from which on weights may be written, or be gone, until the other one."""


def register() -> None:
    """Do nothing, unless asked; then replace the manager, or end this process with the reason.

    SGLang only logs what a plugin raises and serves on with its own manager, which blocks: so this exits instead.
    """
    try:
        if not is_asked(os.environ):
            return
        check_fingerprints("SGLang", version("sglang"), read_tested("sglang"))
        _hook()
    except Exception as error:  # whatever it is, SGLang would only log it
        sys.exit(f"{VARIABLE} is set, but SGLang cannot rebalance in the background: {error}")


def _hook() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from eplb_fsm.engines.sglang.controller import BackgroundEPLBManager

    hooks: dict[str, tuple[Any, Any]] = {
        _MANAGER: (BackgroundEPLBManager, HookType.REPLACE),
        _INITIALIZE: (start_manager, HookType.AFTER),
    }
    hooks |= {f"{_UPDATER}.{name}": (frozen_during, HookType.AROUND) for name in _RELOADS}
    for opening, closing in _OPENING.items():
        hooks[f"{_UPDATER}.{opening}"] = frozen_from(opening), HookType.AROUND
        hooks[f"{_UPDATER}.{closing}"] = frozen_until(opening), HookType.AROUND
    for target, (hook, kind) in hooks.items():
        HookRegistry.register(target, hook, kind)
    HookRegistry.apply_hooks()
    missing = sorted(set(hooks) - set(HookRegistry._patched))
    if missing:
        raise ConfigError(f"SGLang's hook registry did not take {', '.join(missing)}; its log above says why")


def start_manager(result: Any, runner: Any, *args: Any, **kwargs: Any) -> Any:
    """After a model runner is initialized: connect its manager to the other ranks.

    Raises:
        ConfigError: There is no manager of ours to start.
    """
    from eplb_fsm.engines.sglang.controller import BackgroundEPLBManager

    if runner.is_draft_worker:
        return result
    if not isinstance(runner.eplb_manager, BackgroundEPLBManager):
        seen = type(runner.eplb_manager).__name__
        raise ConfigError(
            f"{VARIABLE} is set, but SGLang's EPLB manager is {seen}: start with --enable-eplb, and without another "
            "plugin that replaces EPLBManager"
        )
    runner.eplb_manager.start()
    return result


def frozen_during(original: Callable[..., Any], updater: Any, *args: Any, **kwargs: Any) -> Any:
    """Around a reload of weights: no row is in transfer, and no chunk becomes live."""
    manager = _manager(updater)
    manager.session.freeze_now(original.__name__)
    try:
        return original(updater, *args, **kwargs)
    finally:
        manager.check_experts()
        manager.session.unfreeze(original.__name__)


def frozen_from(reason: str) -> Callable[..., Any]:
    """Return a hook that freezes before a method and leaves it so."""

    def hook(original: Callable[..., Any], updater: Any, *args: Any, **kwargs: Any) -> Any:
        _manager(updater).session.freeze_now(reason)
        return original(updater, *args, **kwargs)

    return hook


def frozen_until(reason: str) -> Callable[..., Any]:
    """Return a hook that takes a freeze back after a method."""

    def hook(original: Callable[..., Any], updater: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(updater, *args, **kwargs)
        manager = _manager(updater)
        manager.check_experts()
        manager.session.unfreeze(reason)
        return result

    return hook


def _manager(updater: Any) -> Any:
    return updater.tp_worker.model_runner.eplb_manager
