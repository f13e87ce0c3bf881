"""The explorer: one seed is one run, classes are counted, what can happen is covered, failures are made small."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path

import pytest

from eplb_fsm.cli import main
from eplb_fsm.core import rank as core_rank
from eplb_fsm.core.rank import RankCore
from eplb_fsm.core.states import State
from eplb_fsm.core.votes import Decision, Tally
from eplb_fsm.observe.events import Event
from eplb_fsm.simulate.branches import NUM_BRANCHES
from eplb_fsm.simulate.coverage import all_targets, feasible_targets, measure_coverage, why_impossible
from eplb_fsm.simulate.explore import Findings, Space, explore, explore_seeds, quiet_log, run_seed
from eplb_fsm.simulate.journal import Journal
from eplb_fsm.simulate.run import Run
from eplb_fsm.simulate.scenario import FaultKind
from eplb_fsm.simulate.shrink import shrink

SPACE = Space(3)
SEEDS = range(144, 148)
NUM_SEEDS = 384 * NUM_BRANCHES
"""As many as fit 75 seconds on two cores; `make explore` goes on where they end."""
LEAST_SHARE = 0.95

DIGESTS = f"""
from eplb_fsm.simulate.explore import Space, quiet_log, run_seed
with quiet_log():
    for seed in range({SEEDS.start}, {SEEDS.stop}):
        result = run_seed(Space(3), seed)
        print(result.digest, result.interleaving, sum(result.states))
"""


def fingerprints(hash_seed: str) -> list[str]:
    """Digests of some seeds, made in a fresh process."""
    environ = {**os.environ, "PYTHONHASHSEED": hash_seed}
    done = subprocess.run([sys.executable, "-c", DIGESTS], capture_output=True, text=True, env=environ, check=True)
    return done.stdout.splitlines()


def test_one_seed_is_one_run_in_any_process() -> None:
    """Two processes with other hash seeds, and this one after other seeds, make the same runs bit for bit."""
    with quiet_log():
        for seed in range(10):
            run_seed(SPACE, seed)
        here = [run_seed(SPACE, seed) for seed in SEEDS]
    mine = [f"{result.digest} {result.interleaving} {sum(result.states)}" for result in here]
    assert fingerprints("1") == fingerprints("2") == mine
    assert len(set(mine)) == len(SEEDS)


def test_a_seed_alone_makes_the_run_that_it_makes_with_others() -> None:
    """Going back to where seeds part leaves no trace: alone, with its own beginning, a seed shows the same."""
    with quiet_log():
        together = list(SPACE.runs(range(6 * NUM_BRANCHES)))
        assert [result.scenario.seed for result in together] == list(range(6 * NUM_BRANCHES))
        for result in together[5::11]:
            alone = run_seed(SPACE, result.scenario.seed)
            assert alone.digest == result.digest
            assert alone == result


def test_a_recorded_schedule_replays_its_run() -> None:
    """The choices of a run, given back, make the same run; the default ones make another."""
    with quiet_log():
        result = run_seed(SPACE, 42)
        assert Run(result.scenario, result.schedule).result().digest == result.digest
        assert Run(result.scenario, []).result().digest != result.digest


def event(rank: int, action: str, step_idx: int = 1, **detail: object) -> Event:
    """An event of which only these matter here."""
    return Event(
        seq=0,
        rank=rank,
        step_idx=step_idx,
        action=action,
        state="COLLECTING",
        epoch=1,
        round_idx=1,
        chunk_idx=0,
        num_staged=0,
        is_drained=True,
        is_frozen=False,
        live_digest=0,
        detail=detail,
    )


def class_of(*events: Event) -> int:
    """The class of a run of two ranks in which this happens, in this order."""
    journal = Journal(2)
    for each in events:
        journal.on_event(each)
    return journal.interleaving()


def test_the_order_of_commuting_events_does_not_count() -> None:
    """The order on a rank makes a class, and that of the votes of a round; that of other ranks' events does not."""
    loaded, failed, other = event(0, "LoadCollected"), event(0, "WorkFailed"), event(1, "LoadCollected")
    assert class_of(loaded, failed, other) == class_of(other, loaded, failed) == class_of(loaded, other, failed)
    assert class_of(loaded, failed, other) != class_of(failed, loaded, other)
    votes = event(0, "PostVote"), event(1, "PostVote")
    assert class_of(*votes) != class_of(*reversed(votes))


@pytest.fixture(scope="module")
def findings() -> Iterator[Findings]:
    """What many seeds show, on all cores."""
    num_processes = os.cpu_count() or 1
    with get_context("spawn").Pool(num_processes) as pool:
        yield explore(SPACE, range(NUM_SEEDS), pool.imap_unordered)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_seed_breaks_an_invariant(findings: Findings) -> None:
    """In thousands of runs with faults nothing breaks, and a third of them see an abort and another epoch."""
    sys.stdout.write(
        f"{findings.num_runs} runs, {len(findings.interleavings)} interleavings, {len(findings.states)} states, "
        f"{findings.num_second} with an abort and another epoch\n"
    )
    assert findings.failures == []
    assert findings.num_runs == NUM_SEEDS
    assert len(findings.interleavings) >= 0.85 * NUM_SEEDS
    assert findings.num_second >= findings.num_whole / 3


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_what_can_happen_is_covered(findings: Findings) -> None:
    """At least 95 % of the feasible combinations of state, decision and fault are seen, and none that is not one."""
    coverage = measure_coverage(findings.hits)
    sys.stdout.write(f"{coverage.num_seen} of {coverage.num_feasible} combinations\n")
    assert coverage.surprises == []
    assert coverage.share >= LEAST_SHARE, coverage.missing


def test_make_explore_goes_on_from_here() -> None:
    """The Makefile's own seeds begin where those of the tests end, and together they are more than 100,000."""
    makefile = Path(__file__).resolve().parents[2] / "Makefile"
    seeds = re.search(r"^SEEDS \?= (\d+):(\d+)$", makefile.read_text(encoding="utf-8"), re.MULTILINE)
    assert seeds is not None
    assert int(seeds[1]) == NUM_SEEDS
    assert int(seeds[2]) > 100_000


def test_every_excluded_combination_has_its_reason() -> None:
    """Every state and every fault is in the list, and what is left out says why."""
    feasible = set(feasible_targets())
    assert {target.state for target in feasible} == set(State)
    assert {target.fault for target in feasible} == set(FaultKind)
    assert all(bool(why_impossible(target)) != (target in feasible) for target in all_targets())


def no_abort(tally: Tally) -> Decision:
    """A planted bug: all staged wins over a rank that asks to abort."""
    if tally.smallest.progress < 5:
        return _decide(tally)
    return _decide(Tally(tally.largest._replace(abort=0), tally.smallest))


_decide = core_rank.decide


def test_a_failing_run_is_made_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a bug planted some of the first seeds fail; what is left of it still does, with fewer faults and choices."""
    monkeypatch.setattr(core_rank, "decide", no_abort)
    seed = explore_seeds(SPACE, range(20 * NUM_BRANCHES)).failures[0].seed
    with quiet_log():
        full = run_seed(SPACE, seed)
        shrunk = shrink(full)
        assert Run(shrunk.result.scenario, shrunk.schedule).result().digest == shrunk.result.digest
    assert shrunk.result.violations[0].startswith("no_commit_after_abort")
    assert len(shrunk.result.scenario.faults) < len(full.scenario.faults)
    assert shrunk.num_choices < len(full.schedule) / 4


def test_a_run_that_holds_cannot_be_made_small() -> None:
    """Shrinking a run that breaks nothing says so."""
    with quiet_log(), pytest.raises(ValueError, match="breaks no invariant"):
        shrink(run_seed(SPACE, 42))


def test_a_promise_that_is_ignored_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """With ranks that commit when they are ready themselves some of the first seeds fail."""
    read_round = RankCore.read_round

    def read_own(self: RankCore, tally: Tally) -> Decision:
        own = self.posted
        return read_round(self, Tally(own, own) if own is not None and own.promises_commit else tally)

    monkeypatch.setattr(RankCore, "read_round", read_own)
    assert explore_seeds(SPACE, range(10 * NUM_BRANCHES)).num_failures > 0


def test_the_command_counts_and_traces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs that hold end with status 0, all figures, and the traces of every rank."""
    figures, traces = tmp_path / "figures.json", tmp_path / "traces"
    command = ["simulate", "--seeds", "144:148", "--jobs", "1", "--json", str(figures), "--trace", str(traces)]
    assert main(command) == 0
    seen = json.loads(figures.read_text())
    assert (seen["runs"], seen["failed"]) == (4, 0)
    assert seen["interleavings"] == seen["runs_through_an_epoch"] > 0
    assert len(list(traces.glob("seed*/rank*.ndjson"))) == 4 * 3
    assert "distinct interleavings" in capsys.readouterr().out


def test_the_command_says_how_to_replay_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that breaks something ends with status 1, its seed, what is left of it, and a command that works."""
    monkeypatch.setattr(core_rank, "decide", no_abort)
    assert main(["simulate", "--seeds", "992:1012", "--jobs", "1", "--quiet"]) == 1
    told = capsys.readouterr().out
    assert "smallest run found" in told
    command = re.search("replay it: eplb-fsm (.*)", told)
    assert command is not None
    assert main(command[1].split()) == 1
    assert "VIOLATION no_commit_after_abort" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [["--ranks", "1"], ["--seeds", "5:5"], ["--lockstep", "--free"]])
def test_the_command_refuses_what_cannot_be(wrong: list[str]) -> None:
    """Wrong options end with status 2."""
    try:
        status: object = main(["simulate", *wrong])
    except SystemExit as end:
        status = end.code
    assert status == 2
