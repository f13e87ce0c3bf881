"""A manifest that is not as it must be is refused before TLC is started."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from eplb_fsm.cli import main
from eplb_fsm.errors import ConfigError
from eplb_fsm.modelcheck.manifest import load_manifest, read_model, write_manifest

SPEC = Path(__file__).resolve().parents[2] / "spec"

IMPLIED = {"SamePlan": {"NoTransferWithoutConsensus"}}
"""Properties that no mutant violates alone, and those that it must violate with them."""

HOLDS = {
    "name": "holds",
    "module": "Some.tla",
    "cfg": "holds.cfg",
    "expected": "holds",
    "property": None,
    "tier": "push",
    "states": 4,
    "seconds": 1.5,
    "twin": "twin",
    "why": "It holds.",
}
TWIN = {
    **HOLDS,
    "name": "twin",
    "cfg": "twin.cfg",
    "expected": "violates",
    "property": "Never",
    "states": None,
    "twin": None,
}
CFGS = {
    "holds.cfg": "SPECIFICATION Spec\nCONSTANTS Top = 3 \\* three\n  Setup <- Plain\nINVARIANT Always",
    "twin.cfg": "SPECIFICATION Spec\nCONSTANT Setup <- Plain\nCONSTANT Top=3\nINVARIANTS Never\nPROPERTIES Other",
}


def write(folder: Path, entries: Any, **cfgs: str) -> Path:
    """Write a manifest and what it names."""
    for name, text in {**CFGS, **{f"{name}.cfg": text for name, text in cfgs.items()}}.items():
        (folder / name).write_text(text, encoding="utf-8")
    for module in ("Some.tla", "Other.tla"):
        (folder / module).touch()
    (folder / "manifest.json").write_text(json.dumps(entries), encoding="utf-8")
    return folder


def test_valid_manifest(tmp_path: Path) -> None:
    """What is right is loaded as it is written, and written as it is loaded."""
    checks = load_manifest(write(tmp_path, [HOLDS, TWIN]))
    assert [check.name for check in checks] == ["holds", "twin"]
    write_manifest(tmp_path, checks)
    assert json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8")) == [HOLDS, TWIN]


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({}, "is not a list"),
        ([1], "check 0: is not an object"),
        ([HOLDS, TWIN, TWIN], "twin: is there 2 times"),
        ([{**HOLDS, "colour": 1}, TWIN], "holds: has a field 'colour'"),
        ([{"name": "holds"}], "holds: has no 'cfg'"),
        ([{**HOLDS, "tier": "daily"}, TWIN], "holds: tier is 'daily', not one of push, nightly"),
        ([{**HOLDS, "expected": "fails"}, TWIN], "expected is 'fails'"),
        ([{**HOLDS, "states": True}, TWIN], "states is True"),
        ([{**HOLDS, "states": 0}, TWIN], "states is 0"),
        ([{**HOLDS, "seconds": "1"}, TWIN], "seconds is '1'"),
        ([{**HOLDS, "why": ""}, TWIN], "why is ''"),
        ([{**HOLDS, "cfg": "no.cfg"}, TWIN], "holds: no.cfg missing"),
        ([{**HOLDS, "property": "Always"}, TWIN], "holds: must hold, so property must be null"),
        ([{**HOLDS, "twin": None}, TWIN], "holds: must hold, so it needs a twin"),
        ([HOLDS], "'twin' is none"),
        ([{**HOLDS, "twin": "holds"}, TWIN], "'holds' is none"),
        ([HOLDS, {**TWIN, "module": "Other.tla"}], "holds: its twin is of another module, Other.tla"),
        ([HOLDS, {**TWIN, "property": "Always"}], "twin: must violate Always, which its cfg does not check"),
        ([HOLDS, {**TWIN, "property": None}], "twin: must violate None"),
        ([HOLDS, {**TWIN, "states": 4}], "twin: must be violated, so states"),
    ],
)
def test_broken_manifest(tmp_path: Path, entries: Any, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each thing that is wrong is named in one error, and nothing is run."""
    folder = write(tmp_path, entries)
    with pytest.raises(ConfigError) as caught:
        load_manifest(folder)
    assert said in str(caught.value)
    assert main(["spec", "check", "--spec", str(folder)]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("twin", "said"),
    [
        ("SPECIFICATION Spec CONSTANTS Top = 4 Setup <- Plain INVARIANT Never", "CONSTANT Top=3; CONSTANT Top=4"),
        ("SPECIFICATION Spec CONSTANT Top = 3 INVARIANT Never", "CONSTANT Setup<-Plain"),
        ("SPECIFICATION Spec CONSTANTS Top = 3 Setup <- Other INVARIANT Never", "CONSTANT Setup<-Other"),
        ("SPECIFICATION More CONSTANTS Top = 3 Setup <- Plain INVARIANT Never", "SPECIFICATION More"),
        ("SPECIFICATION Spec CONSTANTS Top = 3 Setup <- Plain CONSTRAINT Few INVARIANT Never", "CONSTRAINT Few"),
    ],
)
def test_twin_must_be_like_its_check(tmp_path: Path, twin: str, said: str) -> None:
    """A twin that differs in a constant, the behaviour or its bound shows nothing, and is refused."""
    with pytest.raises(ConfigError, match="holds: its twin twin differs") as caught:
        load_manifest(write(tmp_path, [HOLDS, TWIN], twin=twin))
    assert said in str(caught.value)


def test_all_problems_are_named_at_once(tmp_path: Path) -> None:
    """One error names everything that is wrong with the fields."""
    with pytest.raises(ConfigError) as caught:
        load_manifest(write(tmp_path, [{**HOLDS, "tier": 1}, {**TWIN, "why": 2}]))
    assert "holds: tier" in str(caught.value)
    assert "twin: why" in str(caught.value)


def test_check_that_checks_nothing(tmp_path: Path) -> None:
    """A cfg without an invariant or a property holds whatever the spec says, and is refused."""
    with pytest.raises(ConfigError, match="holds: its cfg checks nothing"):
        load_manifest(write(tmp_path, [HOLDS, TWIN], holds="SPECIFICATION Spec CONSTANTS Top=3 Setup <- Plain"))


def test_comments_are_no_model() -> None:
    """Both kinds of comments in a cfg are left out, and white space does not matter."""
    one = read_model("INIT A \\* CONSTANT B = 1\n(* INVARIANT\n No *) NEXT C\n CONSTANT X  =  {1,\n 2}\nINVARIANT I")
    assert one == read_model("INIT A NEXT C CONSTANTS X={1, 2} INVARIANTS I")


def test_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder without a manifest is an error; the default is the folder `spec` of where the command is run."""
    assert main(["spec", "check", "--spec", str(tmp_path)]) == 2
    assert "manifest.json cannot be read" in capsys.readouterr().err
    (tmp_path / "spec").mkdir()
    write(tmp_path / "spec", [{}])
    monkeypatch.chdir(tmp_path)
    assert main(["spec", "check"]) == 2
    assert str(tmp_path / "spec") in capsys.readouterr().err


def test_every_property_has_a_mutant_that_violates_no_other() -> None:
    """A mutant violates the property where nothing else is checked, and holds where all others are."""
    checks = {check.name: check for check in load_manifest(SPEC)}
    safety = re.search(
        r"-- safety -+ \*\)(.*?)\(\* -- ", (SPEC / "MCRebalance.tla").read_text(encoding="utf-8"), re.DOTALL
    )
    assert safety
    checked = set(read_model((SPEC / "holds" / "plain.cfg").read_text(encoding="utf-8")).checked)
    assert checked == set(re.findall(r"^(\w+) ==", safety[1], re.MULTILINE))
    for name in checked:
        only = checks[f"only/{name}"]
        assert only.expected == "holds"
        others = set(read_model((SPEC / only.cfg).read_text(encoding="utf-8")).checked)
        assert others == checked - {name} - IMPLIED.get(name, set())
        mutant = checks[str(only.twin)]
        assert mutant.property == name
        assert read_model((SPEC / mutant.cfg).read_text(encoding="utf-8")).checked == (name,)


def test_every_setup_reaches_what_it_is_about() -> None:
    """A setup without a mutant has a twin of the same name, which serves after the last commit."""
    for check in load_manifest(SPEC):
        if check.name.startswith("holds/") and check.name != "holds/lag2_no_late_wait":
            assert check.twin == check.name.replace("holds", "twins")
        if check.name.startswith("twins/"):
            assert check.property in ("NeverForwardAfterLastCommit", "NeverBoth", "NeverServesAfterLastEpoch")
