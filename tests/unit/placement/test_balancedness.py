"""Rank loads and the formulas of balancedness, on numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from eplb_fsm.errors import ConfigError, LoadError
from eplb_fsm.placement import Placement, balancedness, balancedness_summary, rank_loads

# Layer 0: rank 0 has experts 0, 1; rank 1 has 1 and an empty slot. Layer 1: 0, 0 and 1, 0.
PLACEMENT = Placement([[0, 1, 1, -1], [0, 0, 1, 0]], 2, 2)
LOAD = [[6.0, 4.0], [9.0, 3.0]]


def test_replicas_share_the_load() -> None:
    """Each replica carries its share, two on one rank carry two shares, an empty slot carries nothing."""
    assert rank_loads(LOAD, PLACEMENT).tolist() == [[8.0, 2.0], [6.0, 6.0]]


def test_no_load_is_lost() -> None:
    """The loads of the ranks add up to the load, on random placements."""
    rng = np.random.default_rng(3)
    for _ in range(10):
        placement = Placement([rng.permutation([*range(9), *rng.integers(-1, 9, 7)])], 9, 4)
        load = rng.lognormal(size=(1, 9))
        assert rank_loads(load, placement).sum() == pytest.approx(load.sum())


def test_balancedness_is_mean_over_max() -> None:
    """Mean rank load over largest, by layer."""
    assert balancedness(LOAD, PLACEMENT).tolist() == [5 / 8, 1.0]


def test_an_idle_layer_is_balanced() -> None:
    """A layer without load has balancedness 1.0, not a division by zero."""
    assert balancedness([[0, 0], [9, 3]], PLACEMENT).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("formula", "value"),
    [
        ("mean", (5 / 8 + 1) / 2),
        ("min", 5 / 8),
        ("vllm", (5 + 6) / (8 + 6)),
        ("sglang", ((5 + 1e-5) / (8 + 1e-5) + 1) / 2),
    ],
)
def test_formulas(formula: str, value: float) -> None:
    """Each formula by name gives the engine's number."""
    assert balancedness_summary(LOAD, PLACEMENT, formula) == pytest.approx(value, rel=1e-12)


def test_formulas_when_idle() -> None:
    """Without any load the formulas give what the engines report: 1 from SGLang's, 0 from vLLM's."""
    idle = np.zeros((2, 2))
    values = [balancedness_summary(idle, PLACEMENT, name) for name in ("mean", "min", "vllm", "sglang")]
    assert values == [1.0, 1.0, 0.0, 1.0]


def test_mean_is_the_default() -> None:
    """Without a name the mean over the layers is meant."""
    assert balancedness_summary(LOAD, PLACEMENT) == balancedness_summary(LOAD, PLACEMENT, "mean")


def test_an_unknown_formula_is_refused() -> None:
    """The error lists the names."""
    with pytest.raises(ConfigError, match="mean, min, vllm, sglang"):
        balancedness_summary(LOAD, PLACEMENT, "median")


@pytest.mark.parametrize(
    ("load", "message"),
    [
        ([[1.0, 2.0]], r"shape \(1, 2\)"),
        ([[1.0, -2.0], [0.0, 0.0]], "layer 0, expert 1 is -2.0"),
        ([[1.0, 2.0], [float("nan"), 0.0]], "layer 1, expert 0 is nan"),
        ([[1.0, 2.0], [float("inf"), 0.0]], "layer 1, expert 0 is inf"),
        ([["a", "b"]] * 2, "not an array of numbers"),
        ([[1.0], [1.0, 2.0]], "not an array of numbers"),
    ],
)
def test_bad_load_is_refused(load: object, message: str) -> None:
    """Load of another shape, or with an entry that is no count, is one error naming it."""
    with pytest.raises(LoadError, match=message):
        rank_loads(load, PLACEMENT)  # type: ignore[arg-type]
