"""TLC's state graph of the cores is that of real cores: the same states, the same calls, the same edges."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from unittest.mock import patch

import pytest
from core_graph import Explorer
from graphs import Call, Graph, Table, describe_difference
from recorded_calls import METHODS, recorded_calls
from tlc_graph import SPEC, read_graph, run_tlc

from eplb_fsm.core.rank import RankCore
from eplb_fsm.core.reasons import AbortReason, OutcomeKind, StopReason
from eplb_fsm.core.states import TRANSITIONS, State
from eplb_fsm.core.votes import Decision, DecisionKind, Vote
from eplb_fsm.modelcheck.values import Record

GRAPHS = sorted(path.stem for path in (SPEC / "graph").glob("*.cfg"))
NIGHTLY = sorted(path.stem for path in (SPEC / "graph/nightly").glob("*.cfg"))


@dataclass(frozen=True, slots=True)
class Compared:
    """What is kept of two graphs once they were compared."""

    difference: str
    calls: set[Call]
    changes: set[tuple[str, str]]
    """The states of a rank before and after a call."""
    outcomes: set[tuple[str, str]]
    methods: set[str]


_NUM_AHEAD = os.cpu_count() or 1
_TLC = ThreadPoolExecutor(_NUM_AHEAD)
_TAKEN: set[str] = set()
_FOUND: dict[str, Future[tuple[Record, Graph]]] = {}
"""What TLC finds, or has found, and nobody has taken yet."""


def find_graph(name: str) -> tuple[Record, Graph]:
    """The constants of a cfg, and the graph that TLC finds for them."""
    with tempfile.TemporaryDirectory() as folder:
        dump = Path(folder) / "graph.dot"
        setup = run_tlc(SPEC / f"graph/{name}.cfg", dump)
        return setup, read_graph(dump, Table())


def take_graph(name: str) -> tuple[Record, Graph]:
    """The same; TLC goes on with the graphs that follow in the list, each core with one."""
    following = GRAPHS[GRAPHS.index(name) :][: _NUM_AHEAD + 1] if name in GRAPHS else [name]
    for ahead in following:
        if ahead not in _FOUND and (ahead == name or ahead not in _TAKEN):
            _FOUND[ahead] = _TLC.submit(find_graph, ahead)
    _TAKEN.add(name)
    return _FOUND.pop(name).result()


def explore(setup: Record, spec: Graph) -> tuple[Graph, str]:
    """The graph of real cores, and how the spec's differs from it."""
    code = Explorer(setup, spec.table).explore()
    return code, describe_difference(spec, "the spec", code, "the code")


@cache
def compare(name: str) -> Compared:
    """Both graphs of a cfg, compared."""
    setup, spec = take_graph(name)
    with recorded_calls() as methods:
        code, difference = explore(setup, spec)
    outcomes = {(core["outcome"]["kind"], core["outcome"]["reason"]) for core in code.cores()}
    return Compared(difference, code.calls(), code.state_changes(), outcomes, methods)


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
    """Each outcome, abort reason and stop reason is reached in some graph."""
    outcomes = {outcome for name in GRAPHS for outcome in compare(name).outcomes}
    assert {kind for kind, _ in outcomes} - {"none"} == {*OutcomeKind.__members__}
    assert {reason for kind, reason in outcomes if kind == "ABORTED"} == {*AbortReason.__members__}
    assert {reason for kind, reason in outcomes if kind == "FAILED"} == {*StopReason.__members__}


def test_the_graphs_make_every_transition() -> None:
    """Each state is reached, and a rank goes from one to another as the table of transitions says, in every way."""
    changes = {change for name in GRAPHS for change in compare(name).changes}
    rows = {(source.value, row.dest.value) for row in TRANSITIONS for source in row.sources}
    assert {(source, dest) for source, dest in changes if source != dest} == {it for it in rows if it[0] != it[1]}
    assert {dest for _, dest in changes} == {state.value for state in State}


def test_the_graphs_make_every_call() -> None:
    """The calls between states are all the public methods of a core."""
    assert {method for name in GRAPHS for method in compare(name).methods} == METHODS


def _give_up_in_silence(core: RankCore, action: str, reason: StopReason, detail: str) -> Vote | None:
    """The last vote says nothing of the STOP."""
    vote = LAST_VOTE(core, action, reason, detail)
    return vote._replace(stop=0) if vote is not None else None


def _forget_request(core: RankCore, decision: Decision) -> None:
    """An aborted epoch is not tried again."""
    ABORT(core, decision)
    core._wants_rebalance = False


def _back_to_idle_by_step(core: RankCore) -> None:
    """The next round of an idle rank follows its own step, not the multiples of the interval."""
    SCHEDULE_NEXT(core)
    if core.state is State.IDLE and not core.is_leaving:
        core.post_due = core.step_idx + 1


LAST_VOTE = RankCore._last_vote
ABORT = RankCore._abort
SCHEDULE_NEXT = RankCore._schedule_next


@pytest.mark.parametrize(
    ("method", "planted", "call"),
    [
        ("_last_vote", _give_up_in_silence, "GiveUp"),
        ("_abort", _forget_request, "ResolveRound"),
        ("_schedule_next", _back_to_idle_by_step, "CommitChunk"),
    ],
)
def test_planted_differences_are_found(method: str, planted: Callable[..., object], call: str) -> None:
    """A core that differs in one detail has another graph, and the first edge that shows it is named."""
    setup, spec = lost_graph()
    with patch.object(RankCore, method, planted):
        _, difference = explore(setup, spec)
    assert "edges are only in the graph of the spec; the first:" in difference
    assert f"Call(action='{call}'" in difference
    assert "with this after it instead" in difference


@cache
def lost_graph() -> tuple[Record, Graph]:
    """The graph that has most of what a rank can do."""
    return find_graph("lost")
