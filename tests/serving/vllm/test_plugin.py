"""The plugin that vLLM finds: inert unless asked, and an exit with the reason where it cannot do what was asked."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from eplb_fsm.errors import ConfigError
from tests.dist.harness import RankLink, run_ranks
from tests.serving.light import sources_of
from tests.serving.vllm import light

RUNNER = "vllm.v1.worker.gpu.eplb_utils"


def _register(link: RankLink, sources: Path, asked: str, tampered: str, is_imported: bool) -> dict[str, Any]:
    """Load the plugin as vLLM does, in a process of its own, before or after the runner's module is imported."""
    os.environ["ENABLE_EPLB_REBALANCE_ASYNC"] = asked
    os.environ["VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"] = "MINE, OTHER"
    light.install(sources, link.store(), link.rank, link.world_size)
    light.stand_in_workers()
    if is_imported:
        import_module(RUNNER)
    (plugin,) = entry_points(group="vllm.general_plugins", name="eplb_fsm")
    register = plugin.load()
    module = sys.modules[register.__module__]
    module._version = lambda: light.VERSION
    if tampered:
        tested = module.read_tested("vllm")
        tested[light.VERSION][tampered] = "another"
        module.read_tested = lambda engine: tested
    said: object = None
    finders = list(sys.meta_path)
    try:
        register()
    except SystemExit as error:
        said = error.code
    imported_early = not is_imported and RUNNER in sys.modules
    runner = import_module(RUNNER)
    return {
        "said": said,
        "state": runner.EplbState.__name__,
        "imported early": imported_early,
        "for Ray": [os.environ.get(f"VLLM_RAY_EXTRA_ENV_{name}_TO_COPY") for name in ("VARS", "VAR_PREFIXES")],
        "without EPLB": _start_worker(enable_eplb=False),
        "with EPLB": _start_worker(enable_eplb=True),
        "reload": _reload(),
        "finders": len(sys.meta_path) - len(finders),
        "source is found": "class EPLBController" in (runner.__loader__.get_source(RUNNER) or ""),
    }


def _start_worker(*, enable_eplb: bool) -> str:
    worker = sys.modules["vllm.v1.worker.worker_base"].WorkerBase
    try:
        worker(SimpleNamespace(parallel_config=SimpleNamespace(enable_eplb=enable_eplb)), 0)
    except ConfigError as error:
        return str(error)
    return "started"


def _reload() -> tuple[str, list[str]]:
    """Reload weights with a state that wants to know of it."""
    seen: list[str] = []

    @contextmanager
    def reloading() -> Iterator[None]:
        seen.append("before")
        yield
        seen.append("after")

    runner = sys.modules["vllm.v1.worker.gpu_model_runner"].GPUModelRunner()
    runner.eplb_state = SimpleNamespace(reloading=reloading)
    return runner.reload_weights(), seen


@pytest.fixture(scope="module")
def sources() -> Path:
    """The files of vLLM."""
    return sources_of("vllm", light.VERSION)


@pytest.mark.parametrize("asked", ["", "off"])
def test_the_plugin_is_inert_unless_asked(sources: Path, asked: str) -> None:
    """Without the switch nothing of vLLM is replaced, and no import is watched."""
    (seen,) = run_ranks(1, _register, sources, asked, "", False)
    assert (seen["said"], seen["state"], seen["finders"]) == (None, "EplbState", 0)
    assert (seen["without EPLB"], seen["reload"]) == ("started", ("reloaded", []))
    assert seen["for Ray"] == ["MINE, OTHER", None]


@pytest.mark.parametrize("is_imported", [False, True])
def test_the_plugin_replaces_the_state_where_asked(sources: Path, is_imported: bool) -> None:
    """With the switch the V2 runner makes our state, whether its module was imported before or is later."""
    (seen,) = run_ranks(1, _register, sources, "1", "", is_imported)
    assert (seen["said"], seen["state"]) == (None, "BackgroundEplbStateV2")
    assert not seen["imported early"]
    assert seen["finders"] == 1  # for the module of the V2 runner, which nobody has imported
    assert seen["source is found"]
    assert seen["with EPLB"] == "started"
    assert "start with --enable-eplb" in seen["without EPLB"]
    assert seen["reload"] == ("reloaded", ["before", "after"])
    assert seen["for Ray"] == ["MINE,OTHER,ENABLE_EPLB_REBALANCE_ASYNC", "EPLB_FSM_"]


def test_a_changed_symbol_ends_the_start_with_the_reason(sources: Path) -> None:
    """Where vLLM's code is not that of a tested version, the process exits and names what differs."""
    changed = "vllm.distributed.eplb.eplb_state:EplbState"
    (seen,) = run_ranks(1, _register, sources, "1", changed, False)
    assert changed in seen["said"]
    assert "install a tested version (0.32.0)" in seen["said"]
    assert seen["state"] == "EplbState"
