"""TLC's state graph of the cores is that of real cores: the same states, the same calls, the same edges."""

from __future__ import annotations

import os
import re
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from core_graph import Explorer
from graphs import Call, Graph, Table, describe_difference
from recorded_calls import METHODS, recorded_calls
from tlc_graph import SPEC, read_graph, run_tlc

from eplb_fsm.core.reasons import AbortReason, OutcomeKind, StopReason
from eplb_fsm.core.states import State
from eplb_fsm.core.votes import DecisionKind
from eplb_fsm.modelcheck.values import Record

GRAPHS = sorted(path.stem for path in (SPEC / "graph").glob("*.cfg"))
NIGHTLY = sorted(path.stem for path in (SPEC / "graph/nightly").glob("*.cfg"))


@dataclass(frozen=True, slots=True)
class Compared:
    """What is kept of two graphs once they were compared."""

    difference: str
    calls: set[Call]
    states: set[str]
    outcomes: set[tuple[str, str]]
    methods: set[str]


def tlc_graph(cfg: Path) -> tuple[Record, Graph]:
    """The constants of a cfg and the graph that TLC finds for them."""
    with tempfile.TemporaryDirectory() as folder:
        dump = Path(folder) / "graph.dot"
        setup = run_tlc(cfg, dump)
        return setup, read_graph(dump, Table())


@cache
def compare(name: str) -> Compared:
    """Both graphs of a cfg, compared."""
    setup, spec = tlc_graph(SPEC / f"graph/{name}.cfg")
    with recorded_calls() as methods:
        code = Explorer(setup, spec.table).explore()
    cores = code.cores()
    return Compared(
        describe_difference(spec, "the spec", code, "the code"),
        code.calls(),
        {core["state"] for core in cores},
        {(core["outcome"]["kind"], core["outcome"]["reason"]) for core in cores},
        methods,
    )


@pytest.mark.parametrize("name", GRAPHS)
def test_the_graphs_are_equal(name: str) -> None:
    """Spec and code have the same initial state and the same set of edges (state, call, state)."""
    assert compare(name).difference == ""


@pytest.mark.skipif(os.environ.get("TEST_TIER") != "nightly", reason="minutes: set TEST_TIER=nightly")
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", NIGHTLY)
def test_larger_graphs_are_equal(name: str) -> None:
    """The same with more steps, chunks and epochs."""
    assert compare(f"nightly/{name}").difference == ""


def test_the_graphs_take_every_action() -> None:
    """Each action of the module is taken in some graph, with each decision that a round can have."""
    text = (SPEC / "CoreGraph.tla").read_text(encoding="utf-8")
    actions = set(re.findall(r'\b(?:Calls|Takes|Asks|Leaves)\([^"]*"([A-Z][a-z]\w+)"', text))
    calls = {call for name in GRAPHS for call in compare(name).calls}
    assert {call.action for call in calls} == actions
    decisions = [call.argument for call in calls if call.action == "ReadRound"]
    assert {decision["kind"] for decision in decisions} == {kind.value for kind in DecisionKind}
    assert {decision["reason"] for decision in decisions if decision["kind"] == "STOP"} == {*StopReason.__members__}


def test_the_graphs_reach_everything() -> None:
    """Each state, outcome, abort reason and stop reason is reached in some graph."""
    outcomes = {outcome for name in GRAPHS for outcome in compare(name).outcomes}
    assert {state for name in GRAPHS for state in compare(name).states} == {state.value for state in State}
    assert {kind for kind, _ in outcomes} - {"none"} == {*OutcomeKind.__members__}
    assert {reason for kind, reason in outcomes if kind == "ABORTED"} == {*AbortReason.__members__}
    assert {reason for kind, reason in outcomes if kind == "FAILED"} == {*StopReason.__members__}


def test_the_graphs_make_every_call() -> None:
    """The calls between states are all the public methods of a core."""
    assert {method for name in GRAPHS for method in compare(name).methods} == METHODS
