"""`eplb-fsm sglang` and `eplb-fsm vllm`: one flag is taken, everything else is the engine's."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from eplb_fsm import cli
from eplb_fsm.engines.serve import make_serve
from eplb_fsm.errors import ConfigError


@pytest.fixture(autouse=True)
def _engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sglang", "vllm"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)


ARGUMENTS = ["--model-path", "m", "--enable-eplb", "--", "-x", "--help", "--version"]


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_every_argument_but_the_flag_is_passed_on(engine: str) -> None:
    """The engine gets its arguments as they stood, and the flag becomes a variable that its processes inherit."""
    parsed = cli.make_parser().parse_args([engine, *ARGUMENTS[:2], "--enable-eplb-rebalance-async", *ARGUMENTS[2:]])
    serve = make_serve(engine, parsed.arguments, {"HOME": "h"})
    assert serve.command[0] == sys.executable
    assert [argument for argument in serve.command[3:] if argument != "--"] == [a for a in ARGUMENTS if a != "--"]
    assert serve.environ == {"HOME": "h", "ENABLE_EPLB_REBALANCE_ASYNC": "1"}


def test_without_the_flag_nothing_is_asked_of_the_plugin() -> None:
    """Started without the flag, the engine's environment is what it was."""
    assert make_serve("sglang", ["--enable-eplb"], {"HOME": "h"}).environ == {"HOME": "h"}


def test_an_engine_that_would_not_load_the_plugin_is_not_started() -> None:
    """A list of allowed plugins without ours would quietly serve with the engine's own rebalance."""
    with pytest.raises(ConfigError, match="add eplb_fsm to it"):
        make_serve("sglang", ["--enable-eplb-rebalance-async"], {"SGLANG_PLUGINS": "other"})
    assert make_serve("sglang", ["--enable-eplb-rebalance-async"], {"SGLANG_PLUGINS": "other, eplb_fsm"})


def test_an_engine_that_is_not_installed_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the engine the command says what to install."""
    monkeypatch.setattr("eplb_fsm.engines.serve.find_spec", lambda name: None)
    assert cli.main(["sglang", "--model-path", "m"]) == 2
    assert capsys.readouterr().err == (
        "eplb-fsm sglang: error: sglang is not installed beside eplb-fsm: pip install sglang\n"
    )
