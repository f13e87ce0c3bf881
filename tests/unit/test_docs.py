"""What the docs say of the code is what the code says."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from eplb_fsm.cli import OPTION_FLAGS
from eplb_fsm.config import RebalanceConfig
from eplb_fsm.core.states import ACTIVE_STATES, TRANSITIONS, State, Transition
from eplb_fsm.placement.balancedness import FORMULAS
from tools.diagram import render_mermaid, render_table

ROOT = Path(__file__).resolve().parents[2]


def test_generated_parts_are_current() -> None:
    """Diagram and tables in the README and the docs equal what the code generates now."""
    command = [sys.executable, "tools/generate_docs.py", "--check"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_equivalents_name_real_options() -> None:
    """Every option that the table of equivalents translates exists."""
    page = (ROOT / "docs/reference/options.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| `(\w+)` ", page.split("## Equivalents")[1], re.MULTILINE)
    assert named
    assert set(named) <= {field.name for field in fields(RebalanceConfig)}


def test_flags_are_those_of_the_equivalents() -> None:
    """Each SGLang flag that the command line takes stands in the table of equivalents, beside the option it sets."""
    page = (ROOT / "docs/reference/options.md").read_text(encoding="utf-8").split("## Equivalents")[1]
    rows = dict(re.findall(r"^\| `(\w+)` \|([^|]*)\|", page, re.MULTILINE))
    assert not {flag for flag, option in OPTION_FLAGS.items() if f"`{flag}`" not in rows.get(option, "")}


def test_balancedness_example() -> None:
    """The page of definitions lists every formula, with the value that the code gives for its example."""
    page = (ROOT / "docs/reference/metrics-definitions.md").read_text(encoding="utf-8")
    shown = dict(re.findall(r"^\| `(\w+)` \|.*\| (\d\.\d+) \|$", page, re.MULTILINE))
    loads = np.array(ast.literal_eval(re.findall(r"rank loads `(.*?)`", page)[0]), dtype=np.float64)
    assert shown == {name: f"{formula(loads):.4f}" for name, formula in FORMULAS.items()}


def test_readme_is_short() -> None:
    """The README has at most 140 lines."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 140


@pytest.mark.parametrize("page", ["README.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md"))])
def test_links_lead_somewhere(page: str) -> None:
    """Every relative link of a page names a file that exists."""
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = [t for t in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in t]
    assert not [t for t in targets if not (ROOT / page).parent.joinpath(t).exists()]


def test_diagram_shows_every_transition() -> None:
    """Each action of the table stands on an arrow that ends in its destination."""
    arrows = [line for line in render_mermaid().splitlines() if "-->" in line]
    for row in TRANSITIONS:
        assert any(re.search(rf"--> {row.dest.value} :.*\b{row.action}\b", line) for line in arrows), row


def test_diagram_marks_local_transitions() -> None:
    """An action that a rank takes alone is marked, and no other."""
    text = render_mermaid()
    for row in TRANSITIONS:
        assert (f"{row.action} (local)" in text) is not row.agreed


def test_diagram_draws_each_source() -> None:
    """A row that is not for all active states gets one arrow from each of its states."""
    rows = [Transition("Leap", (State.IDLE, State.COMPUTING), State.TRANSFERRING, agreed=True)]
    lines = render_mermaid(rows).splitlines()
    assert "    IDLE --> TRANSFERRING : Leap" in lines
    assert "    COMPUTING --> TRANSFERRING : Leap" in lines


def test_diagram_boxes_all_active_states() -> None:
    """A row for all active states is drawn once, from a box that is declared once."""
    rows = [Transition(name, ACTIVE_STATES, State.IDLE, agreed=True) for name in ("Abort", "Leave")]
    lines = render_mermaid(rows).splitlines()
    assert lines.count('    state "any active state" as ANY_ACTIVE') == 1
    assert "    ANY_ACTIVE --> IDLE : Abort<br/>Leave" in lines


def test_table_has_a_row_for_each_transition() -> None:
    """The table in the docs has the rows of the transition table, in its order."""
    rows = render_table().splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == [row.action for row in TRANSITIONS]
