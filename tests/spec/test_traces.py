"""What ranks record is a run of the spec, and what they could not have recorded is not."""

from __future__ import annotations

import json
import os
import random
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from test_names import recorded_in_product
from test_product_calls import CASES, MAX_ACTIONS, make_cluster

from eplb_fsm.cli import main
from eplb_fsm.core.rank import RankCore
from eplb_fsm.core.votes import Decision, Tally
from eplb_fsm.errors import ConfigError
from eplb_fsm.modelcheck.recorded import Recorded, RecordedRun, find_runs, read_run
from eplb_fsm.modelcheck.tlc import Tlc
from eplb_fsm.modelcheck.traces import TraceResult, check_runs
from eplb_fsm.observe.trace import SCHEMA_VERSION, NdjsonTrace
from eplb_fsm.simulate.branches import NUM_BRANCHES
from eplb_fsm.simulate.cluster import SimulatedCluster
from eplb_fsm.simulate.explore import Space, explore_seeds

SPEC = Path(__file__).resolve().parents[2] / "spec"
NUM_RUNS = 50
"""Of simulated ranks, with faults."""
NUM_TAMPERED = 10
"""Traces of which every position is tampered with."""


def check(runs: Sequence[RecordedRun]) -> list[TraceResult]:
    """What the spec says of runs."""
    return check_runs(Tlc.find(os.environ), SPEC, runs)


def simulated(folder: Path, num_ranks: int, num_runs: int) -> list[RecordedRun]:
    """Runs of the simulated cluster, with what goes wrong in them; no two from one scenario."""
    stride = NUM_BRANCHES + 3
    explore_seeds(Space(num_ranks), range(0, num_runs * stride, stride), folder)
    return [read_run(files) for files in find_runs([folder])]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[RecordedRun]:
    """Runs of two ranks, as they were recorded."""
    return simulated(tmp_path_factory.mktemp("two"), 2, NUM_RUNS)


@pytest.mark.timeout(300)
def test_the_spec_accepts_what_simulated_ranks_record(tmp_path: Path) -> None:
    """Runs with crashes, lost votes, failed transfers, freezes, skipped steps and all else are runs of the spec."""
    found = check([run for ranks in (3, 4) for run in simulated(tmp_path / f"{ranks}", ranks, NUM_RUNS // 2)])
    assert len(found) == NUM_RUNS
    assert [result for result in found if not result.is_accepted] == []


def lost_for_good(cluster: SimulatedCluster) -> None:
    """A rank that has promised a commit loses its channel, and nobody is left to say what was decided."""
    others, core = (cluster.ranks[0], cluster.ranks[2]), cluster.ranks[1].fsm._core
    cluster.run_until(lambda: core.in_window and min(it.num_passes for it in others) >= core.read_due, MAX_ACTIONS)
    cluster.ranks[1].channel.is_lost = True
    for other in others:
        cluster.crash(other.rank)
    cluster.run_until(lambda: not cluster.living, MAX_ACTIONS)


def tables_are_gone(cluster: SimulatedCluster) -> None:
    """A rank cannot write the shares of a new plan: a fail-stop of its own."""

    def write_tables(prepared: Sequence[object]) -> None:
        raise RuntimeError("this test broke the tables")

    cluster.ranks[1].parts.runner.write_tables = write_tables  # type: ignore[method-assign]
    cluster.ranks[0].fsm.request_rebalance()
    cluster.run_until(lambda: not cluster.ranks[1].is_alive, MAX_ACTIONS)


def test_the_spec_accepts_whatever_a_rank_can_record(tmp_path: Path) -> None:
    """Lost and resolved decisions, commits that fail, fail-stops, requests of all kinds: each action is accepted."""
    for seed, case in enumerate((*CASES, lost_for_good, tables_are_gone)):
        traces = [NdjsonTrace(tmp_path / case.__name__, rank) for rank in range(3)]
        case(make_cluster(seed, lambda rank, traces=traces: (traces[rank],)))
        for trace in traces:
            trace.close()
    found = check([read_run(files) for files in find_runs([tmp_path])])
    assert [result for result in found if not result.is_accepted] == []
    actions = {event.action for result in found for own in result.run.events for event in own}
    assert actions == {"Init", *recorded_in_product()}
    causes = [
        event.detail["cause"]
        for result in found
        for own in result.run.events
        for event in own
        if event.action == "FailStop"
    ]
    assert {"UNRESOLVED", "TABLES_DAMAGED"} <= set(causes)


def read_own(self: RankCore, tally: Tally) -> Decision:
    """A planted bug: a rank that has promised commits, whatever the others voted."""
    own = self.posted
    return _read_round(self, Tally(own, own) if own is not None and own.promises_commit else tally)


def forget_deadlines(self: RankCore) -> None:
    """A planted bug: nobody votes on a deadline."""


_read_round = RankCore.read_round


@pytest.mark.parametrize(("name", "bug"), [("read_round", read_own), ("_vote_on_deadlines", forget_deadlines)])
def test_the_spec_rejects_what_a_bug_makes_ranks_record(
    name: str, bug: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks that decide by themselves, or know no deadline, record runs that the spec does not have."""
    monkeypatch.setattr(RankCore, name, bug)
    assert not all(result.is_accepted for result in check(simulated(tmp_path, 3, 2 * NUM_RUNS)))


class Tampered(NamedTuple):
    """A run with one thing done to the trace of one rank."""

    how: str
    word: str
    previous: Recorded
    event: Recorded
    following: Recorded | None
    run: RecordedRun


def tamper(run: RecordedRun, its_rank: int, rng: random.Random) -> Iterator[Tampered]:
    """Drop, double, swap and alter the event at every position of a rank's trace."""
    own = run.events[its_rank]

    def changed(how: str, at: int, events: Sequence[Recorded], word: str = "") -> Tampered:
        others = [*run.events]
        others[its_rank] = tuple(events)
        following = own[at + 1] if at + 1 < len(own) else None
        return Tampered(how, word, own[max(at - 1, 0)], own[at], following, run._replace(events=tuple(others)))

    for at, event in enumerate(own):
        before, after = own[:at], own[at + 1 :]
        if at:  # a trace without its Init is refused before it comes to the spec
            yield changed("drop", at, [*before, *after])
            yield changed("double", at, [*before, event, event, *after])
        if at and after:
            yield changed("swap", at, [*before, after[0], event, *after[1:]])
        word = rng.choice(alterable(event))
        yield changed("alter", at, [*before, altered(event, word), *after], word)


STATE_WORDS = ("state", "epoch", "round_idx", "chunk_idx", "num_staged", "is_drained", "is_frozen", "live_digest")
DETAIL_WORDS: Mapping[str, tuple[str, ...]] = {
    "PostVote": ("progress", "pass_id", "abort", "stop", "request", "freeze", "earliest_next_step", "lag"),
    "ReadRound": ("decision", "reason", "num_chunks", "outcome", "earliest_next_step"),
    "ResolveRound": ("decision", "num_chunks", "outcome", "earliest_next_step"),
    "CommitChunk": ("chunk", "outcome", "earliest_next_step"),
    "PlanReady": ("plan_digest", "num_chunks", "skip", "deadline_steps"),
    "ChunkStaged": ("digest",),
    "WorkFailed": ("reason",),
    "GiveUp": ("outcome",),
    "Close": ("outcome",),
}
REPORTS = ("LoadCollected", "PlanReady", "ChunkStaged", "WorkFailed", "TransportLost")
OTHER_WORDS = {"state": "IDLE TRANSFERRING", "decision": "NONE COMMIT", "outcome": "COMMITTED ABORTED"}
OTHER_WORDS |= {"reason": "LOAD_ERROR INTEGRITY", "action": "TransportLost GiveUpReading"}


def alterable(event: Recorded) -> list[str]:
    """The words of an event that mean something to the spec."""
    if event.action == "Init":
        return list(STATE_WORDS)
    return [*STATE_WORDS, "action", "step_idx", *DETAIL_WORDS.get(event.action, ())]


def altered(event: Recorded, word: str) -> Recorded:
    """An event with another value of one word."""
    words = json.loads(json.dumps(event.words))
    place = words if word in words else words["detail"]
    old = place[word]
    if word in OTHER_WORDS:
        place[word] = next(other for other in OTHER_WORDS[word].split() if other != old)
    elif word in ("abort", "stop"):
        place[word] = 0 if old else (2 << 32) + words["rank"]
    elif isinstance(old, bool) or word in ("request", "freeze"):
        place[word] = type(old)(not old)
    else:
        place[word] = old + 1
    return Recorded(words["action"], words["step_idx"], words, event.line)


def projected(event: Recorded) -> list[Any]:
    """The state of its rank that an event says."""
    return [event.words[word] for word in STATE_WORDS]


def is_legal(it: Tampered) -> bool:
    """Whether what was done to a run makes another legal one.

    Either two neighbours changed places that leave the state as it was, so that they commute; or it was the last event
    of its rank, and nobody else was told of it: the trace of a rank that ended earlier, or otherwise; or the rank left
    a step() out, read a round one step late, and made what that decided live in time; or two jobs found the transfer
    group broken, where it was one; or a plan was another one, and the epoch was aborted before a round compared plans.
    """
    if it.following is None:
        return it.how in ("drop", "alter")
    if it.word == "step_idx" and (it.event.action, it.following.action) == ("ReadRound", "CommitChunk"):
        return it.following.step == it.event.step + 1
    if it.word == "step_idx" and it.event.action in REPORTS:
        return it.following.step > it.event.step
    if (it.how, it.event.action) == ("double", "TransportLost"):
        return True
    if it.event.action == "PlanReady" and it.word in ("plan_digest", "num_chunks"):
        return _next_decision(it) in ("ABORT", "STOP")
    states = [projected(event) for event in (it.previous, it.event, it.following)]
    return it.how == "swap" and states[0] == states[1] == states[2]


def _next_decision(it: Tampered) -> str:
    """What the first round after an event that decided anything decided for its rank."""
    later = [event for event in it.run.events[it.event.words["rank"]] if event.line > it.event.line]
    decisions = [event.detail["decision"] for event in later if event.action == "ReadRound"]
    return next((decision for decision in decisions if decision != "NONE"), "")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_spec_rejects_what_was_tampered_with(runs: list[RecordedRun]) -> None:
    """Every position of ten traces is dropped, doubled, swapped and altered; what is still accepted is a legal run."""
    rng = random.Random(0)
    whole = [run for run in runs if any(event.detail.get("outcome") == "COMMITTED" for event in run.events[0])]
    chosen = sorted(whole, key=lambda run: run.num_events)[:NUM_TAMPERED]
    tampered = [it for run in chosen for it in tamper(run, rng.randrange(2), rng)]
    found = check([it.run for it in tampered])
    accepted = [it for it, result in zip(tampered, found, strict=True) if result.is_accepted]
    assert len(chosen) == NUM_TAMPERED
    assert len(tampered) > 1000
    assert [(it.how, it.word, it.event, it.following) for it in accepted if not is_legal(it)] == []
    legal = dict(Counter(it.how for it in accepted))
    sys.stdout.write(f"{len(tampered)} tampered runs, {len(accepted)} of them legal: {legal}\n")


def test_a_rejection_names_the_first_event_that_cannot_be(
    runs: list[RecordedRun], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command shows file, line, action and the state before it, and ends with status 1."""
    run = next(run for run in runs if any(event.action == "PlanReady" for event in run.events[1]))
    lines = run.files[1].read_text().splitlines()
    at = next(number for number, line in enumerate(lines) if '"PlanReady"' in line)
    words = json.loads(lines[at])
    lines[at] = json.dumps({**words, "state": "TRANSFERRING"})
    for file in run.files:
        (tmp_path / file.name).write_text(file.read_text())
    (tmp_path / "rank1.ndjson").write_text("\n".join(lines) + "\n")
    report = tmp_path / "report.json"
    assert main(["trace", "check", str(tmp_path), "--json", str(report)]) == 1
    told = capsys.readouterr().out
    assert f"rank1.ndjson, line {at + 1}: PlanReady at step {words['step_idx']}" in told
    assert "state should be AWAITING_CONSENSUS, is TRANSFERRING" in told
    assert "state COMPUTING" in told
    assert json.loads(report.read_text())[0]["rejected_at"]["line"] == at + 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda lines: lines[:3] + lines[4:], "event 3 should stand"),
        (lambda lines: lines[:-2] + lines[-1:], "lines are missing"),
        (lambda lines: ['{"trace":"eplb_fsm","schema":1,"rank":0}', *lines[1:]], f"of schema {SCHEMA_VERSION}"),
        (lambda lines: [*lines[:2], "{", *lines[3:]], "line 3 is not JSON"),
        (lambda lines: [*lines[:1], '{"seq":1}', *lines[2:]], "line 2 is no event: it has no 'action'"),
    ],
)
def test_a_file_that_is_no_whole_trace_is_refused(
    change: Any, words: str, runs: list[RecordedRun], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A gap in the numbers, a missing line, another schema and what is not JSON are named with file and line."""
    for file in runs[0].files:
        (tmp_path / file.name).write_text(file.read_text())
    lines = (tmp_path / "rank0.ndjson").read_text().splitlines()
    (tmp_path / "rank0.ndjson").write_text("\n".join(change(lines)) + "\n")
    assert main(["trace", "check", str(tmp_path)]) == 2
    assert words in capsys.readouterr().err


def test_a_run_needs_the_traces_of_all_ranks(runs: list[RecordedRun], tmp_path: Path) -> None:
    """One file of two is not enough, nor a folder without any."""
    (tmp_path / "rank0.ndjson").write_text(runs[0].files[0].read_text())
    with pytest.raises(ConfigError, match=r"no trace of ranks \[1\]"):
        read_run([tmp_path / "rank0.ndjson"])
    with pytest.raises(ConfigError, match="has no trace"):
        find_runs([tmp_path / "nothing"])
