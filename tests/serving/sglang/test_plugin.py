"""The plugin that SGLang finds: inert unless asked, and an exit with the reason where it cannot do what was asked."""

from __future__ import annotations

import os
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from eplb_fsm.errors import ConfigError
from tests.dist.harness import RankLink, run_ranks
from tests.serving.light import sources_of
from tests.serving.sglang import light


def _register(link: RankLink, sources: Path, asked: str, tampered: str) -> dict[str, Any]:
    """Load the plugin as SGLang does, in a process of its own."""
    os.environ["ENABLE_EPLB_REBALANCE_ASYNC"] = asked
    light.install(sources, link.rank, link.world_size)
    light.stand_in_hooked()
    (plugin,) = entry_points(group="sglang.srt.plugins", name="eplb_fsm")
    register = plugin.load()
    module = sys.modules[register.__module__]
    module.version = lambda package: light.VERSION
    if tampered:
        tested = module.read_tested("sglang")
        tested[light.VERSION][tampered] = "another"
        module.read_tested = lambda engine: tested
    said: object = None
    try:
        register()
    except SystemExit as error:
        said = error.code
    hooks = sys.modules.get("sglang.srt.plugins.hook_registry")
    managers = sys.modules.get("sglang.srt.eplb.eplb_manager")
    return {
        "said": said,
        "hooks": sorted(hooks.HookRegistry._hooks) if hooks else [],
        "started": _initialize(),
        "manager": managers.EPLBManager.__name__ if managers else "",
        "torch": "eplb_fsm.fsm" in sys.modules,
    }


def _initialize() -> str:
    """What initializing a model runner without an EPLB manager says."""
    runner = sys.modules["sglang.srt.model_executor.model_runner"].ModelRunner()
    try:
        return str(runner.initialize())
    except ConfigError as error:
        return str(error)


@pytest.fixture(scope="module")
def sources() -> Path:
    """SGLang's files."""
    return sources_of("sglang", light.VERSION)


@pytest.mark.parametrize("asked", ["", "0"])
def test_the_plugin_is_inert_unless_asked(sources: Path, asked: str) -> None:
    """Without the switch nothing of SGLang is imported, hooked or replaced."""
    (seen,) = run_ranks(1, _register, sources, asked, "")
    assert (seen["said"], seen["hooks"], seen["manager"], seen["started"]) == (None, [], "", "None")


def test_the_plugin_replaces_the_manager_where_asked(sources: Path) -> None:
    """With the switch SGLang's registry puts our manager into the place of its own, and hooks reloads of weights."""
    (seen,) = run_ranks(1, _register, sources, "1", "")
    assert seen["said"] is None
    assert seen["manager"] == "BackgroundEPLBManager"
    hooked = {name.rsplit(".", 1)[-1] for name in seen["hooks"]}
    assert {"EPLBManager", "initialize", "update_weights_from_disk", "begin_weight_update"} <= hooked
    assert "SGLang's EPLB manager is NoneType: start with --enable-eplb" in seen["started"]


def test_a_changed_symbol_ends_the_start_with_the_reason(sources: Path) -> None:
    """Where SGLang's code is not that of a tested version, the process exits and names what differs."""
    changed = "sglang.srt.model_executor.model_runner:ModelRunner.forward"
    (seen,) = run_ranks(1, _register, sources, "1", changed)
    assert changed in seen["said"]
    assert "install a tested version (0.5.23)" in seen["said"]
    assert seen["hooks"] == []


def test_a_switch_that_says_neither_yes_nor_no_ends_the_start(sources: Path) -> None:
    """A mistyped variable is an error, not a server that quietly blocks."""
    (seen,) = run_ranks(1, _register, sources, "maybe", "")
    assert "set it to 1" in seen["said"]
