"""The engine's benchmarks run, in small; their figures are not judged here, their claims of identity are."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.benchmarks import identity, itl

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_logits_are_identical_while_large_layers_move(tmp_path: Path) -> None:
    """Four ranks, experts of a megabyte: epochs of many chunks change no bit; the benchmark does it for 2,000 steps."""
    result = identity.measure(ranks=4, steps=140, batch=2, interval=30, layers=2, folder=tmp_path)
    assert result["identical"]
    assert result["epochs"]["committed"] >= 1
    assert result["epochs"]["failed"] == 0
    assert result["fewest_commits_of_an_epoch"] >= 2
    assert result["fewest_steps_of_an_epoch"] >= 4


def test_latency_is_compared_over_the_same_steps() -> None:
    """Two interleaved pairs give a ratio with its interval, over steps of which enough were active."""
    result = itl.measure(ranks=2, steps=80, pairs=2, batch=8, options={})
    ratio = result["ratios"]["p99_active"]
    assert ratio["lower95"] <= ratio["ratio"] <= ratio["upper95"]
    assert 0 < result["least_active_share"] < 1


def test_interval_of_equal_ratios_is_a_point() -> None:
    """Pairs that all have the ratio 1.1 leave no doubt; of two others the interval is Student's."""
    same = itl.interval([math.log(1.1)] * 7)
    assert same["lower95"] == pytest.approx(1.1) == pytest.approx(same["upper95"])
    wide = itl.interval([0.0, 0.2])
    assert math.log(wide["upper95"]) == pytest.approx(0.1 + 12.706 * 0.1)
