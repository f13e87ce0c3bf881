"""`eplb-fsm decode`: the engine launched once, by itself and under torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from eplb_fsm.placement.placement import Placement
from tests.engines.processes import ROOT, run_cli

ARGUMENTS = ("--steps", "60", "--batch", "4", "--quiet", "--eplb-config", '{"idle_round_interval": 4}')
REBALANCE = ("--enable-eplb", "--eplb-rebalance-num-iterations", "15", "--ep-num-redundant-experts", "8")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


def run_torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `eplb-fsm` on two ranks under torchrun."""
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node=2",
            "--standalone",
            "-m",
            "eplb_fsm",
            *arguments,
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def report(path: Path) -> dict[str, Any]:
    """What a run wrote."""
    written: dict[str, Any] = json.loads(path.read_text())
    return written


def test_decode_gives_the_same_result_however_it_is_launched(tmp_path: Path) -> None:
    """Fixed under the own launcher, async under torchrun with a trace: tokens and logits are the same."""
    fixed, moving = tmp_path / "fixed.json", tmp_path / "moving.json"
    start = tmp_path / "start.npz"
    Placement.initial(4, 32, 40, 2).save(start)
    done = run_cli("decode", "--ranks", "2", *ARGUMENTS, "--ep-num-redundant-experts", "8", "--json", str(fixed))
    assert done.returncode == 0, done.stderr
    arguments = (*ARGUMENTS, *REBALANCE, "--enable-eplb-rebalance-async", "--init-expert-location", str(start))
    done = run_torchrun("decode", *arguments, "--json", str(moving), "--trace", str(tmp_path / "traces"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("tokens sha256") == 1
    none, rebalanced = report(fixed)["runs"]["none"], report(moving)["runs"]["async"]
    assert rebalanced["epochs"]["committed"] >= 1
    assert none["moved_bytes"] == 0 < rebalanced["moved_bytes"]
    for digest in ("tokens_sha256", "logits_sha256"):
        assert none[digest] == rebalanced[digest]
    assert sorted(path.name for path in (tmp_path / "traces/async").iterdir()) == ["rank0.ndjson", "rank1.ndjson"]


def test_decode_says_when_no_epoch_was_due() -> None:
    """A run shorter than the interval is no failure, and tells why nothing moved."""
    done = run_cli("decode", "--ranks", "2", "--steps", "10", "--batch", "2", "--quiet", "--enable-eplb")
    assert done.returncode == 0, done.stderr
    assert "one starts every 3000 steps and the run had 10" in done.stdout


def test_decode_under_torchrun_refuses_another_number_of_ranks() -> None:
    """The number of ranks is what was started."""
    done = run_torchrun("decode", "--ranks", "3")
    assert done.returncode != 0
    assert "torchrun started 2 ranks: leave --ranks out" in done.stderr
