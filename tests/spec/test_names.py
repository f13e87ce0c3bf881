"""Spec and code call the same things by the same words."""

from __future__ import annotations

import ast
import inspect
import re
from functools import cache
from pathlib import Path

import pytest
from projections import VOTE_WORDS
from recorded_calls import METHODS

from eplb_fsm import fsm
from eplb_fsm.core import invariants
from eplb_fsm.core.reasons import AbortReason, OutcomeKind, StopReason
from eplb_fsm.core.states import ACTIVE_STATES, TRANSITIONS, State, snake_case
from eplb_fsm.core.votes import DecisionKind, Progress, Vote
from eplb_fsm.observe import recorder
from eplb_fsm.runtime import driver

SPEC = Path(__file__).resolve().parents[2] / "spec"

VOTE_WORDS_NOT_IN_SPEC = {
    "protocol_version": "compared before the first round, too, and a constant after it",
    "config_fingerprint": "compared before the first round, too, and a constant after it",
    "lag": "a constant of a model; what adopts it is tested in tests/interleavings",
}
INVARIANTS_NOT_IN_SPEC = {
    "CommitIsDecided": "the spec's CommitChunk is only possible where a round has decided it",
    "SameDecision": "the spec decides by one function of the votes of a round; there is no second opinion to differ",
    "ReplicasEqual": "the spec has one slot for each expert",
}
INVARIANTS_NOT_IN_CODE = {
    "NoOverwriteBeforeConsumed": "no event shows what a buffer holds; the simulated engine checks rows in every pass",
    "NoSilentStop": "a rank that waits in vain shows it by giving up",
    "RefinesAtomic": "says the same as the others once more, by the atomic spec",
}
ACTIONS_NOT_IN_TRACES = {
    "Forward": "step() records nothing where nothing is due",
    "SkipStep": "an engine's mistake, which nothing on its rank sees when it happens",
    "DoubleStep": "an engine's mistake, which nothing on its rank sees when it happens",
    "Execute": "the device's, behind the host's back",
    "Pack": "the worker's; what it leads to is recorded as ChunkStaged",
    "ChunkDamaged": "recorded as WorkFailed with the reason INTEGRITY",
    "WorkerFoundDead": "recorded as WorkFailed with the reason WORKER_DIED",
    "WorkerDies": "whoever dies records nothing",
    "Crash": "whoever dies records nothing",
    "Damage": "the network's",
    "Publish": "the watchdog's, on its own thread",
}
CALLS_THAT_ARE_NO_METHOD = {
    "Init": "what a core is made with",
    "Step": "the driver sets step_idx",
    "OtherPlacement": "what an engine that moves experts itself would do",
    "LateResult": "the calls LoadCollected, PlanReady, ChunkStaged and WorkFailed with an epoch that is over",
}
METHODS_BY_OTHER_OPERATORS = {
    "give_up": "last_vote and after_last_vote, with its reason",
    "close": "last_vote and after_last_vote, with CLOSED",
    "commit_failed": "last_vote and after_last_vote, with COMMIT_FAILED",
}


@cache
def text_of(module: str) -> str:
    """A module without its comments."""
    text = (SPEC / f"{module}.tla").read_text(encoding="utf-8")
    return re.sub(r"\(\*.*?\*\)|\\\*[^\n]*", "", text, flags=re.DOTALL)


def definition(module: str, name: str) -> str:
    """What a module says after ``name ==``, up to the next definition."""
    match = re.search(rf"^{name}(?:\([^)]*\))? ==(.*?)(?=^\w|^=|\Z)", text_of(module), re.DOTALL | re.MULTILINE)
    assert match, f"{module} does not define {name}"
    return match[1]


def operators(module: str) -> set[str]:
    """The names that a module defines."""
    return set(re.findall(r"^(\w+)(?:\([^)]*\))? ==", text_of(module), re.MULTILINE))


def strings(text: str) -> set[str]:
    """The strings in a piece of a module."""
    return set(re.findall(r'"(\w+)"', text))


def pascal_case(name: str) -> str:
    """The spec's spelling of a name of the code."""
    return "".join(word.capitalize() for word in name.split("_"))


def test_states() -> None:
    """The states, and which of them are active."""
    active = {state.value for state in ACTIVE_STATES}
    assert strings(definition("Core", "ActiveStates")) == active
    assert strings(definition("Core", "States")) | active == {state.value for state in State}


def test_transitions() -> None:
    """Every transition of the table is in the spec: what reading a round does in the core, the others as actions."""
    for transition in TRANSITIONS:
        follows_from_reading = transition.agreed and transition.action != "CommitChunk"
        assert transition.action in operators("Core" if follows_from_reading else "Rebalance")


@pytest.mark.parametrize(("record", "reasons"), [("Abort", AbortReason), ("Stop", StopReason)])
def test_reasons(record: str, reasons: type[AbortReason] | type[StopReason]) -> None:
    """The abort and stop reasons have the same codes."""
    codes = {name: int(code) for name, code in re.findall(r"(\w+) \|-> (\d+)", definition("Votes", record))}
    assert codes == {"none": 0, **{reason.name: reason.value for reason in reasons}}


def test_outcomes() -> None:
    """The kinds of outcomes that operators of the core give."""
    ends = re.findall(r'EndEpoch\([^"]*"\w+", "(\w+)"', text_of("Core"))
    assert set(ends) == {kind.name for kind in OutcomeKind}


def test_decisions() -> None:
    """What a round can decide, and what the core does with each."""
    kinds = {kind.value for kind in DecisionKind}
    assert set(re.findall(r'Decision\("(\w+)"', text_of("Votes"))) == kinds
    acted_on = set(re.findall(r'decision\.kind = "(\w+)"', definition("Core", "Apply")))
    assert acted_on == kinds - {DecisionKind.NONE.value}


def test_progress() -> None:
    """The values of the word that says how far a rank is."""
    votes = re.findall(r"^(\w+)Vote == (\d)", text_of("Votes"), re.MULTILINE)
    assert {name.upper(): int(value) for name, value in votes} == {it.name: it.value for it in Progress}


def test_vote_words() -> None:
    """The spec's vote has the code's words, but for those with a reason."""
    fields = set(re.findall(r"(\w+) \|->", definition("Core", "MakeVote")))
    assert fields == VOTE_WORDS.keys()
    assert {*VOTE_WORDS.values(), *VOTE_WORDS_NOT_IN_SPEC} == {*Vote._fields}
    assert not VOTE_WORDS_NOT_IN_SPEC.keys() & {*VOTE_WORDS.values()}


def test_invariants() -> None:
    """What the checks of the spec hold is what the code checks, but for those with a reason."""
    cfgs = [path.read_text(encoding="utf-8") for path in (SPEC / "holds").glob("*.cfg")]
    named = [re.sub(r"^(?:SPECIFICATION|CONSTANT|CONSTRAINT)\b.*", "", cfg, flags=re.MULTILINE) for cfg in cfgs]
    checked = {name for text in named for name in re.findall(r"\b[A-Z][a-z]\w+", text) if not name.startswith("Never")}
    functions = inspect.getmembers(invariants, inspect.isfunction)
    in_code = {pascal_case(name) for name, it in functions if it.__module__ == invariants.__name__ and name[0] != "_"}
    in_code.remove("FindViolations")
    assert checked - INVARIANTS_NOT_IN_CODE.keys() == in_code - INVARIANTS_NOT_IN_SPEC.keys()
    assert INVARIANTS_NOT_IN_CODE.keys() <= checked
    assert INVARIANTS_NOT_IN_SPEC.keys() <= in_code - checked


def recorded_actions(source: Path) -> set[str]:
    """The actions that a source file hands to what records them."""
    nodes = ast.walk(ast.parse(source.read_text(encoding="utf-8")))
    calls = [node for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    return {
        argument.value
        for call in calls
        if isinstance(call.func, ast.Attribute) and call.func.attr in ("record", "ask", "ask_now", "_carry_out")
        for argument in call.args
        if isinstance(argument, ast.Constant)
    }


def recorded_in_product() -> set[str]:
    """The actions that ranks record, but for the initial state."""
    sources = (Path(source.__file__ or "") for source in (fsm, driver, recorder))
    return set().union(*map(recorded_actions, sources)) - {"Init"}


def test_actions_in_traces() -> None:
    """Every action that a rank records is one of the spec, and the others have a reason not to be recorded."""
    steps = definition("Rebalance", "RankNext") + definition("Rebalance", "Next")
    actions = set(re.findall(r"\b([A-Z]\w+)\((?:r|m)\b", steps)) - {"RankNext", "HasJob"}
    assert actions - ACTIONS_NOT_IN_TRACES.keys() == recorded_in_product()
    assert ACTIONS_NOT_IN_TRACES.keys() <= actions


def test_methods_of_a_core() -> None:
    """A public method of a core is an operator of the same name, and a call of the same name in the state graphs."""
    assert METHODS - METHODS_BY_OTHER_OPERATORS.keys() <= operators("Core")
    assert not METHODS_BY_OTHER_OPERATORS.keys() & operators("Core")
    named = set(re.findall(r'\b(?:Calls|Takes|Asks|Leaves)\([^"]*"([A-Z][a-z]\w+)"', text_of("CoreGraph")))
    calls = {snake_case(name) for name in named - CALLS_THAT_ARE_NO_METHOD.keys()}
    assert calls == METHODS
