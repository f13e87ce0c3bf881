"""The demo through its real command line: what it writes, what it promises, and that it notices damage."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eplb_fsm import cli
from tests.engines import tampering
from tests.engines.processes import descendants, left_behind, read_until, run_cli, start_cli

SHORT = (
    *("--ranks", "2", "--steps", "120", "--batch", "4", "--eplb-rebalance-num-iterations", "20", "--quiet"),
    *("--eplb-config", '{"commit_bytes": 1000000, "max_transfer_mb_s": 0, "lag": 2}'),  # epochs end soon
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """One short demo with its JSON report and its traces, and the folder they are in."""
    folder = tmp_path_factory.mktemp("demo")
    done = run_cli("demo", *SHORT, "--json", str(folder / "demo.json"), "--trace", str(folder / "traces"))
    assert done.returncode == 0, done.stdout + done.stderr
    return done, folder


def test_a_demo_keeps_its_promises(demo: tuple[Any, Path]) -> None:
    """Two ranks decode identically with rebalancing and without, and the report has every figure under its name."""
    done, folder = demo
    report = json.loads((folder / "demo.json").read_text())
    assert (report["identical"], report["ranks"], report["steps"], report["problems"]) == (True, 2, 120, [])
    assert set(report["runs"]) == {"none", "sync", "async"}
    for run in report["runs"].values():
        assert {"p50", "p99", "max"} <= set(run["itl_ms"])
        assert 0 < run["itl_ms"]["p50"] <= run["itl_ms"]["p99"] <= run["itl_ms"]["max"]
        assert set(run["epochs"]) == {"committed", "skipped", "aborted", "failed"}
        assert all(0.5 <= run["balancedness"][when] <= 1 for when in ("before", "after"))
        for name in ("longest_step_ms", "moved_bytes", "late_rounds", "tokens_sha256", "logits_sha256"):
            assert name in run
    for name in ("sync", "async"):
        assert report["runs"][name]["epochs"]["committed"] >= 1
        assert report["runs"][name]["moved_bytes"] > 0
    assert report["runs"]["none"]["moved_bytes"] == 0
    assert {"machine", "versions", "config", "seed", "domains"} <= set(report)
    assert "inter-token latency p99" in done.stdout
    assert done.stderr == ""


def test_a_demo_writes_one_trace_per_rank_and_run(demo: tuple[Any, Path]) -> None:
    """Each rank of both rebalanced runs leaves a trace whose epochs are those of the report."""
    _, folder = demo
    report = json.loads((folder / "demo.json").read_text())
    for run in ("sync", "async"):
        for rank in (0, 1):
            lines = [json.loads(line) for line in (folder / f"traces/{run}/rank{rank}.ndjson").read_text().splitlines()]
            assert lines[0]["rank"] == rank
            starts = [line for line in lines[1:-1] if line["detail"].get("decision") == "START"]
            ended = sum(report["runs"][run]["epochs"].values())
            assert ended <= len(starts) <= ended + 1  # the last one may be under way when the run ends


def test_the_spec_accepts_what_the_ranks_of_a_demo_record(
    demo: tuple[Any, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Real processes over gloo, sync and async: TLC says that their traces are runs of the spec."""
    _, folder = demo
    assert cli.main(["trace", "check", str(folder / "traces")]) == 0
    assert "2 runs: all accepted" in capsys.readouterr().out


@pytest.mark.parametrize("tamper", [tampering.one_wrong_map_entry, tampering.one_swapped_row])
def test_a_demo_notices_damage(tamper: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One wrong map entry, or one swapped weight row, changes the logits within 50 steps, and the demo fails."""
    path = tmp_path / "demo.json"
    arguments = ["demo", "--ranks", "2", "--steps", "100", "--batch", "4", "--quiet", "--json", str(path)]
    assert cli.main(arguments, tamper=tamper) == 1
    report = json.loads(path.read_text())
    first = report["first_different_step"]["async"]
    assert not report["identical"]
    assert report["first_different_step"]["sync"] is None
    assert tampering.DAMAGED_STEP <= first < tampering.DAMAGED_STEP + 50
    assert report["runs"]["async"]["logits_sha256"] != report["runs"]["none"]["logits_sha256"]
    assert "not identical" in capsys.readouterr().out


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="finds processes in /proc")
@pytest.mark.parametrize(("ranks", "run", "victim"), [(2, "none", 1), (4, "async", 0), (2, "sync", 0)])
def test_a_killed_rank_ends_the_demo(ranks: int, run: str, victim: int) -> None:
    """The demo ends with status 1 and an error that names the killed rank, and leaves no process behind."""
    steps = "4000" if run == "none" else "60"
    arguments = ("demo", "--ranks", str(ranks), "--steps", steps, "--no-live", "--batch", "2")
    demo = start_cli(*arguments)
    _, pids = read_until(demo, rf"^ +{run}: step" if run == "none" else rf"^ +{_before(run)}: step 60 of")
    everybody = descendants(demo.pid)
    assert set(pids.values()) <= everybody
    os.kill(pids[victim], signal.SIGKILL)
    _, errors = demo.communicate(timeout=60)
    assert demo.returncode == 1, errors
    assert f"rank {victim} was killed by SIGKILL" in errors
    assert "Traceback" not in errors
    assert left_behind(everybody) == set()


def _before(run: str) -> str:
    """The run that ends when this one begins."""
    return {"sync": "none", "async": "sync"}[run]


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="finds processes in /proc")
def test_an_interrupted_demo_leaves_nothing(tmp_path: Path) -> None:
    """Ctrl-C ends the demo with status 130, without a traceback and without a process left behind."""
    demo = start_cli("demo", "--ranks", "2", "--steps", "4000", "--no-live", "--json", str(tmp_path / "none.json"))
    read_until(demo, "none: step")
    everybody = descendants(demo.pid)
    os.kill(demo.pid, signal.SIGINT)
    _, errors = demo.communicate(timeout=60)
    assert demo.returncode == 130, errors
    assert "Traceback" not in errors
    assert left_behind(everybody) == set()
    assert not (tmp_path / "none.json").exists()
