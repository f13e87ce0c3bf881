"""The command line: which options it takes, from where, and how it refuses."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import pytest

from eplb_fsm import cli
from eplb_fsm.config import RebalanceConfig
from eplb_fsm.placement.placement import Placement

ROOT = Path(__file__).resolve().parents[2]


def parse(*arguments: str) -> argparse.Namespace:
    """The parsed arguments of a command."""
    return cli.make_parser().parse_args(arguments)


def config(
    *arguments: str, environ: dict[str, str] | None = None, defaults: dict[str, object] | None = None
) -> RebalanceConfig:
    """The configuration that `decode` makes of arguments, variables and defaults."""
    return cli.read_config(parse("decode", *arguments), environ or {}, defaults or {}, may_set_mode=True)


def flags_of(command: str) -> set[str]:
    """All flags of a command."""
    parser = cli.make_parser()
    commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return {flag for action in commands.choices[command]._actions for flag in action.option_strings}


def rows_of(section: str) -> list[list[str]]:
    """The table rows of a section of the page on options."""
    text = (
        (ROOT / "docs/reference/options.md").read_text(encoding="utf-8").split(f"## {section}\n")[1].split("\n## ")[0]
    )
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:1] == "|"]
    return rows[2:]


def test_the_page_lists_the_arguments_of_the_parser() -> None:
    """Each argument for rebalancing is on the page with the option it sets, and no other is."""
    listed = {row[0].strip("`").split()[0]: row[1].strip("`") for row in rows_of("Command line")}
    offered = {flag for flag in flags_of("decode") if "ep" in flag.split("-") or "expert" in flag or "eplb" in flag}
    assert set(listed) == offered
    assert {flag: option for flag, option in listed.items() if flag in cli.OPTION_FLAGS} == cli.OPTION_FLAGS
    assert flags_of("decode") - flags_of("demo") == {"--enable-eplb", "--enable-eplb-rebalance-async", "--model-path"}


def test_the_table_of_equivalents_agrees_with_the_parser() -> None:
    """Where the command line has a flag of SGLang, it sets the option that the table says."""
    equivalents = {}
    for row in rows_of("Equivalents"):
        for flag in re.findall(r"`(--[\w-]+)`", row[1]):
            equivalents[flag] = row[0].strip("`")
    assert equivalents.items() >= cli.OPTION_FLAGS.items()


@pytest.mark.parametrize(
    ("arguments", "environ", "seen"),
    [
        ((), {}, 70),
        ((), {"EPLB_FSM_STEP_INTERVAL": "80"}, 80),
        (("--eplb-config", '{"step_interval": 90}'), {"EPLB_FSM_STEP_INTERVAL": "80"}, 90),
        (("--eplb-rebalance-num-iterations", "100", "--eplb-config", '{"step_interval": 90}'), {}, 100),
    ],
)
def test_an_argument_wins_over_json_over_environment_over_default(
    arguments: tuple[str, ...], environ: dict[str, str], seen: int
) -> None:
    """Each source of an option hides those behind it."""
    assert config(*arguments, environ=environ, defaults={"step_interval": 70}).step_interval == seen


@pytest.mark.parametrize(
    ("arguments", "mode"),
    [
        ((), "sync"),
        (("--enable-eplb-rebalance-async",), "async"),
        (("--eplb-config", '{"use_async": true}'), "async"),
        (("--eplb-config", '{"use_async": false}', "--enable-eplb-rebalance-async"), "async"),
        (("--eplb-config", '{"mode": "async"}'), "async"),
    ],
)
def test_the_mode_comes_from_the_proposed_flag_or_from_vllms_field(arguments: tuple[str, ...], mode: str) -> None:
    """Without the flag the rebalance is synchronous."""
    assert config(*arguments, defaults={"mode": "sync"}).mode == mode


def test_the_demo_ignores_a_mode_in_the_environment() -> None:
    """It makes a run of each mode whatever a server's environment says."""
    environ = {"EPLB_FSM_MODE": "sync", "EPLB_FSM_MIN_GAIN": "0.5"}
    made = cli.read_config(parse("demo"), environ, {}, may_set_mode=False)
    assert (made.mode, made.min_gain) == ("async", 0.5)


REFUSED = [
    (("demo", "--eplb-algorithm", "nope"), "unknown policy 'nope'"),
    (("demo", "--eplb-config", "{bad"), "--eplb-config is not JSON"),
    (("demo", "--eplb-config", "[1]"), "--eplb-config is a JSON list"),
    (("demo", "--eplb-config", '{"step_intervall": 3}'), "unknown option 'step_intervall'"),
    (("demo", "--eplb-config", '{"use_async": 1}'), "give true or false"),
    (("demo", "--eplb-config", '{"mode": "sync"}'), "the demo runs both"),
    (("demo", "--eplb-config", '{"commit_bytes": 0}'), 'commit_bytes = 0: must be "auto" or between 1 and'),
    (("demo", "--eplb-rebalance-num-iterations", "-1"), "step_interval = -1"),
    (("demo", "--ranks", "33"), "run 1 to 32 ranks"),
    (("demo", "--ranks", "1"), "ranks is 1: set it to 2 or more"),
    (("demo", "--ranks", "3", "--ep-num-redundant-experts", "8"), "use 10 redundant experts"),
    (("demo", "--steps", "39"), "set it to 40 or more"),
    (("demo", "--domains", "code"), "name two domains"),
    (("demo", "--domains", "code,klingon"), "unknown text domain 'klingon'"),
    (("demo", "--init-expert-location", "missing.json"), "cannot read placement file missing.json"),
    (("demo", "--json", "missing/demo.json"), "the folder missing does not exist"),
    (("decode", "--enable-eplb-rebalance-async"), "add --enable-eplb"),
    (("decode", "--model-path", "missing"), "no model in missing"),
]


@pytest.mark.parametrize(("arguments", "reason"), REFUSED)
def test_what_cannot_work_is_one_line_and_status_2(
    arguments: tuple[str, ...],
    reason: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """No rank is started; the line says what to change."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    written = capsys.readouterr()
    assert written.out == ""
    assert written.err.count("\n") == 1
    assert reason in written.err


@pytest.mark.parametrize("arguments", [(), ("serve",), ("demo", "--ranks", "0"), ("demo", "--steps", "many")])
def test_wrong_usage_is_one_line_and_status_2(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """What argparse refuses is told in the same way."""
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_placement_file_of_another_shape_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A placement for two ranks is not taken by four."""
    path = tmp_path / "placement.json"
    Placement.initial(4, 32, 40, 2).save(path)
    assert cli.main(["demo", "--ranks", "4", "--init-expert-location", str(path)]) == 2
    assert "make a placement for this model" in capsys.readouterr().err
    path.write_text(json.dumps({"format": "something else"}))
    assert cli.main(["demo", "--ranks", "4", "--init-expert-location", str(path)]) == 2
    assert "is not a placement file" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """The version is told."""
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert re.match(r"eplb-fsm \d", capsys.readouterr().out)
