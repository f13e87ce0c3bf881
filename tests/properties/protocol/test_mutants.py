"""Each mutant of the spec exists in the code, and generated runs find it; without it the same runs hold."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hunt import hunt
from hypothesis import given, settings
from mutants import MUTANTS, Mutant
from runs import Aim, Drawn, broken_in, scenarios

from eplb_fsm.simulate.explore import quiet_log

CI = settings.get_profile("ci")
MANIFEST = Path(__file__).resolve().parents[3] / "spec/manifest.json"

ONLY_IN_SPEC = {
    "plan_not_validated": "placements, the cutting of paths and the reading of plans each refuse to lose an expert",
    "buffers_freed_alone": "nothing shows it outside: the same rank votes to abort, so what it freed is never live",
}
OTHER_INVARIANT = {
    "NoOverwriteBeforeConsumed": ("live_equals_map", "buffers are no part of an event: seen once it is made live"),
}
"""Properties of the spec that the code has under another name, and why."""
SOONER_SEEN = {
    "pass_without_result": (
        "same_decision",
        "it covers every round that ranks read at different steps, not only commits",
    ),
    "pause_from_own_plan": ("same_decision", "a vote of another step is read at another step as well"),
    "stale_vote": ("same_membership", "no round may decide anything then, also where it would have done no harm"),
    "step_counted_twice": ("commit_cannot_fail", "a commit that is late is not made, and ends its rank"),
}
"""Mutants that break another invariant of the code long before that of the property, and why that one will do."""


def spec_mutants() -> dict[str, str]:
    """The property that each mutant of the spec violates; those that are seen from outside as well are the same."""
    checks = json.loads(MANIFEST.read_text(encoding="utf-8"))
    names = {check["name"].removeprefix("mutants/"): check for check in checks if check["name"].startswith("mutants/")}
    return {name: check["property"] for name, check in names.items() if not name.endswith("_atomic")}


def invariant_of(spec_property: str) -> str:
    """The code's invariant of a property."""
    snake_case = re.sub(r"(?<!^)(?=[A-Z])", "_", spec_property).lower()
    return OTHER_INVARIANT.get(spec_property, (snake_case, ""))[0]


def test_spec_and_code_have_the_same_mutants() -> None:
    """Neither side has a mutant that the other one lacks, but for those that are listed with a reason."""
    in_code = {mutant.name for mutant in MUTANTS}
    assert len(in_code) == len(MUTANTS)
    assert in_code == set(spec_mutants()) - set(ONLY_IN_SPEC)
    assert set(ONLY_IN_SPEC) <= set(spec_mutants())


def test_mutants_break_what_they_break_in_the_spec() -> None:
    """Each mutant is looked for by the invariant that the manifest names for it."""
    looked_for = {mutant.name: mutant.breaks for mutant in MUTANTS}
    sooner = {name: invariant for name, (invariant, _) in SOONER_SEEN.items()}
    in_both = {name: invariant_of(prop) for name, prop in spec_mutants().items() if name not in ONLY_IN_SPEC}
    assert looked_for == in_both | sooner


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_is_found(mutant: Mutant) -> None:
    """With one thing wrong, one of the generated runs of the ci profile breaks the invariant that is named."""
    assert hunt(mutant, CI.max_examples) is not None


@pytest.mark.parametrize(
    "aim",
    sorted({mutant.aim for mutant in MUTANTS if not mutant.is_strict}, key=str),
    ids=lambda aim: "+".join(kind.name for kind in aim.kinds[:3]) or "NO_FAULTS",
)
def test_without_a_mutant_the_same_runs_hold(aim: Aim) -> None:
    """The runs that find the mutants find nothing in the library as it is."""

    @settings(max_examples=max(settings().max_examples // 10, 5))
    @given(scenario=scenarios(aim))
    def hold(scenario: Drawn) -> None:
        assert broken_in(scenario) == []

    with quiet_log():
        hold()
