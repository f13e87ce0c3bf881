"""`eplb-fsm plan` and `eplb-fsm compare`, as a user calls them."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from eplb_fsm.cli import main
from eplb_fsm.placement import Placement, Topology, balancedness, get_policy

RANKS = ("--ranks", "4", "--ep-num-redundant-experts", "4")
START = Placement.initial(3, 12, 16, 4)


@pytest.fixture
def loads(tmp_path: Path) -> Path:
    """Five windows of a load that drifts; the last layer is never used."""
    rng = np.random.default_rng(0)
    popularity = rng.lognormal(0.0, 1.2, (3, 12)) * [[1.0], [1.0], [0.0]]
    windows = np.round([popularity * rng.lognormal(0.0, 0.2, (3, 12)) * 1000 for _ in range(5)])
    np.savez(tmp_path / "loads.npz", logical_count=windows)
    return tmp_path / "loads.npz"


def _windows(loads: Path) -> np.ndarray:
    return np.load(loads)["logical_count"]


@pytest.mark.parametrize("suffix", [".json", ".npz"])
def test_a_plan_is_written_and_can_be_loaded(suffix: str, loads: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is printed and put into the figures is what the file does to the sum of the windows."""
    output, figures = loads.with_suffix(suffix if suffix == ".json" else ".out.npz"), loads.with_name("figures.json")
    flags = ("--output", str(output), "--json", str(figures), "--expert-bytes", "1000")
    assert main(["plan", str(loads), *RANKS, *flags]) == 0
    planned, total = Placement.load(output, like=START), _windows(loads).sum(axis=0)
    assert planned == get_policy("deepseek_refined").plan(total, START, Topology(4))
    report, printed = json.loads(figures.read_text()), capsys.readouterr().out
    after = balancedness(total, planned)
    assert report["balancedness"]["after"]["mean"] == pytest.approx(after.mean())
    assert report["balancedness"]["after"]["mean"] > report["balancedness"]["before"]["mean"]
    assert report["moved_bytes"] == report["peer_moves"] * 1000 > 0
    for shown in (f"{after.mean():.4f}", f"{after.min():.4f}", f"written: {output}", "left as they were: 1"):
        assert shown in printed


def test_the_json_is_what_sglang_takes(loads: Path) -> None:
    """`ExpertLocationMetadata.init_by_mapping` is called with its entries as arguments, and has only this one."""
    output = loads.with_name("placement.json")
    assert main(["plan", str(loads), *RANKS, "--output", str(output)]) == 0
    record = json.loads(output.read_text())
    assert list(record) == ["physical_to_logical_map"]
    assert np.shape(record["physical_to_logical_map"]) == (3, 16)


def test_a_plan_from_a_placement_moves_little(loads: Path) -> None:
    """The movement-aware policy changes what has to be changed of the placement that is there."""
    first, second, figures = (loads.with_name(name) for name in ("first.json", "second.json", "figures.json"))
    assert main(["plan", str(loads), *RANKS, "--output", str(first)]) == 0
    flags = ("--init-expert-location", str(first), "--eplb-algorithm", "movement_aware", "--json", str(figures))
    assert main(["plan", str(loads), *RANKS, "--output", str(second), *flags]) == 0
    assert json.loads(figures.read_text())["peer_moves"] == 0
    assert Placement.load(second, like=START) == Placement.load(first, like=START)


def test_policies_are_compared(loads: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All start from DeepSeek's placement for the first window; the figures are those of planning by hand."""
    figures, plot = loads.with_name("figures.json"), loads.with_name("plot.svg")
    flags = ("--json", str(figures), "--plot", str(plot), "--expert-bytes", "1000000")
    assert main(["compare", str(loads), *RANKS, *flags]) == 0
    report, captured = json.loads(figures.read_text()), capsys.readouterr()
    rows = report["summary"]
    assert {"no move", "deepseek", "deepseek_global", "movement_aware"} <= set(rows)
    assert not {"deepseek_refined", "deepseek_hierarchical"} & set(rows)
    assert report["windows"] == 4
    windows = _windows(loads)
    current = get_policy("deepseek").plan(windows[0], START, Topology(4))
    assert rows["no move"]["balance_now"] == pytest.approx(np.mean([balancedness(w, current) for w in windows[1:]]))
    assert rows["no move"]["moves"] == 0
    ahead = []
    for load, coming in pairwise(windows[1:]):
        current = get_policy("movement_aware").plan(load, current, Topology(4))
        ahead.append(balancedness(coming, current).mean())
    assert rows["movement_aware"]["balance_next"] == pytest.approx(np.mean(ahead))
    assert f"{np.mean(ahead):.4f}" in captured.out
    assert "GB a plan" in captured.out
    assert re.search(r"\d of \d+ plans, now movement_aware", captured.err)
    assert b"<svg" in plot.read_bytes()


def test_policies_are_compared_with_weighted_shares(loads: Path) -> None:
    """Every policy balances its own window better, and movement_aware needs fewer moves for it."""
    rows = {}
    for split in ("equal", "weighted"):
        figures = loads.with_name(f"{split}.json")
        flags = ("--replica-split", split, "--json", str(figures), "--quiet")
        assert main(["compare", str(loads), *RANKS, *flags]) == 0
        rows[split] = json.loads(figures.read_text())["summary"]
    assert all(
        rows["weighted"][name]["balance_now"] > rows["equal"][name]["balance_now"] for name in ("no move", "deepseek")
    )
    assert rows["weighted"]["movement_aware"]["moves"] < rows["equal"]["movement_aware"]["moves"]


def test_slow_ranks_get_less(loads: Path) -> None:
    """In a plan, which is told by time; and both splits are compared by it."""
    figures, speeds = loads.with_name("figures.json"), ("--rank-speeds", "1,1,0.5,1", "--json")
    assert main(["plan", str(loads), *RANKS, *speeds, str(figures), "--output", str(loads.with_suffix(".json"))]) == 0
    after = json.loads(figures.read_text())["balancedness"]["after"]
    assert after["mean"] > 0.9
    assert after["vllm"] < 0.95  # the engine's formula takes ranks as alike
    for split in ("equal", "weighted"):
        assert main(["compare", str(loads), *RANKS, *speeds, str(figures), "--replica-split", split, "--quiet"]) == 0
        rows = json.loads(figures.read_text())["summary"]
        assert rows["movement_aware"]["balance_now"] > 0.9
        assert rows["movement_aware"]["balance_now"] > rows["deepseek_global"]["balance_now"] + 0.02


def test_a_rank_can_be_left_empty(loads: Path) -> None:
    """In a file of this library."""
    output = loads.with_suffix(".out.npz")
    assert main(["plan", str(loads), *RANKS, "--rank-speeds", "1,1,1,0", "--output", str(output)]) == 0
    rows = Placement.load(output, like=START).physical_to_logical_map
    assert (rows[:, 12:] == -1).all()
    assert (rows[:, :12] >= 0).all()


def test_windows_are_summed(loads: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two windows to a plan: the fifth one is left over, and of two plans' windows the first makes the start."""
    figures = loads.with_name("figures.json")
    flags = ("--window-size", "2", "--eplb-algorithms", "deepseek", "--json", str(figures), "--quiet")
    assert main(["compare", str(loads), *RANKS, *flags]) == 0
    rows = json.loads(figures.read_text())["summary"]
    windows = _windows(loads)
    planned = get_policy("deepseek").plan(windows[2] + windows[3], START, Topology(4))
    assert rows["deepseek"]["balance_now"] == pytest.approx(balancedness(windows[2] + windows[3], planned).mean())
    assert rows["deepseek"]["balance_next"] is None
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "one plan of each policy" in captured.out


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        ("plan", ("--output", "placement.txt"), r"must end in \.json or \.npz"),
        ("plan", ("--output", "p.json", "--eplb-algorithm", "best"), "unknown policy 'best'"),
        ("plan", ("--output", "p.json", "--ranks", "5"), "do not divide among 5 ranks"),
        ("plan", ("--output", "p.json", "--ranks", "0"), "--ranks 0"),
        ("plan", ("--output", "p.json", "--ep-num-redundant-experts", "-4"), "--ep-num-redundant-experts -4"),
        ("plan", ("--output", "p.json", "--expert-bytes", "0"), "--expert-bytes 0"),
        ("plan", ("--output", "p.json", "--num-nodes", "3"), "num_nodes=3"),
        ("plan", ("--output", "p.json", "--rank-speeds", "1,fast"), "--rank-speeds 1,fast"),
        ("plan", ("--output", "p.json", "--rank-speeds", "1,1,1"), "3 speeds for 4 ranks"),
        (
            "plan",
            ("--output", "p.json", "--rank-speeds", "1,1,1,2", "--eplb-algorithm", "deepseek"),
            "treats all ranks alike",
        ),
        ("plan", ("--output", "p.json", "--rank-speeds", "1,1,1,0"), "write .npz, or give every rank a speed above 0"),
        ("plan", ("--output", "missing/p.json"), "cannot write placement file"),
        ("plan", ("--output", "p.json", "--init-expert-location", "none.json"), "cannot read placement file"),
        ("compare", ("--window-size", "6"), "choose 1 to 5"),
        ("compare", ("--plot", "plot.txt"), r"must end in \.svg"),
        ("compare", ("--plot", "missing/plot.svg"), "does not exist"),
        ("compare", ("--target-balancedness", "2"), "target_balancedness"),
    ],
)
def test_what_cannot_be_is_one_line(
    command: str,
    flags: tuple[str, ...],
    message: str,
    loads: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Status 2, one line, and nothing is written."""
    monkeypatch.chdir(loads.parent)
    assert main([command, str(loads), *RANKS, *flags]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert message.replace("\\", "") in error
    assert [path.name for path in loads.parent.iterdir()] == ["loads.npz"]
