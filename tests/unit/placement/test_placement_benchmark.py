"""The benchmark of policies runs, in small, and counts what it says."""

from __future__ import annotations

import numpy as np

from tests.benchmarks.placement.__main__ import (
    REFERENCE,
    WEIGHTED,
    compare,
    make_planners,
    markdown,
    run_case,
    summarize,
)
from tests.benchmarks.placement.loads import Case, Size

SIZE = Size(3, 16, 20, 4)


def small_case() -> Case:
    """A load that turns over from window to window."""
    rng = np.random.default_rng(0)
    return Case("small", SIZE, tuple(rng.lognormal(0.0, 1.0, (3, 16)) for _ in range(4)))


def test_every_planner_is_measured_on_the_same_windows() -> None:
    """Who moves nothing is charged nothing; the repair moves less than a new plan, and balances what it shall."""
    results = run_case(small_case(), make_planners(None))
    rows = summarize(results)
    assert rows["no move"]["moves"] == 0
    assert 0 < rows["movement_aware 0.95"]["moves"] < rows[REFERENCE]["moves"]
    assert rows["movement_aware 0.95"]["worst_layer"] > rows["no move"]["worst_layer"]
    assert all(len(result.ms) == len(result.moves) == 2 for result in results)


def test_the_comparison_leaves_out_what_is_balanced_without_moves() -> None:
    """A case in which not moving reaches the target is counted apart."""
    results = run_case(small_case(), make_planners(None))
    assert compare(results, 0.95, "")["cases"] == 1
    easy = Case("easy", SIZE, (np.ones((3, 16)),) * 4)
    both = results + run_case(easy, make_planners(None))
    counted = compare(both, 0.95, "")
    assert (counted["cases"], counted["cases_good_without_moves"]) == (1, 1)
    assert counted["fewer_moves_min"] > 1.0
    weighted = compare(both, 0.95, WEIGHTED)
    assert weighted["cases"] + weighted["cases_good_without_moves"] == 2
    assert REFERENCE in markdown(summarize(both), [counted])


def test_weighted_shares_need_fewer_moves() -> None:
    """And without any they balance what was planned for better than equal ones."""
    rows = summarize(run_case(small_case(), make_planners(None)))
    assert rows[f"movement_aware 0.95{WEIGHTED}"]["moves"] <= rows["movement_aware 0.95"]["moves"]
    assert rows[f"no move{WEIGHTED}"]["balance_now"] > rows["no move"]["balance_now"]
