"""The figures of one run, from what its ranks measured; `docs/reference/metrics-definitions.md` defines them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from eplb_fsm.engines.reference.run import RankRun
from eplb_fsm.engines.reference.timeline import Timeline, logits_sha256, tokens_sha256

Figures = dict[str, Any]
RECOVERY_STEPS = 50
"""Steps over which it is judged whether the load is balanced again."""
RECOVERED = 0.97
"""Part of the balancedness at the end that counts as balanced again."""
OUTCOMES = ("committed", "skipped", "aborted", "failed")


def percentile(values: np.ndarray, percent: float) -> float:
    """Return the smallest value that at least `percent` % of the values do not exceed; 0 without values."""
    return float(np.percentile(values, percent, method="inverted_cdf")) if len(values) else 0.0


def active_steps(timeline: Timeline) -> np.ndarray:
    """Return which steps had an epoch under way, in their forward pass or after it: bool `(steps,)`."""
    idle = np.array([state in ("IDLE", "STOPPED") for state in timeline.states], dtype=bool)
    if not len(idle):
        return np.zeros(timeline.steps, dtype=bool)
    before = np.concatenate([np.ones(1, dtype=bool), idle[:-1]])
    active: np.ndarray = ~(idle & before)
    return active


def latency_ms(timelines: Sequence[Timeline]) -> dict[str, float]:
    """Return p50, p99 and max of the inter-token latency over all ranks and steps but the first."""
    values = np.concatenate([line.itl_ns[1 : line.steps] for line in timelines]) / 1e6
    return {
        "p50": percentile(values, 50),
        "p99": percentile(values, 99),
        "max": float(values.max(initial=0.0)),
    }


def steps_to_balance(timeline: Timeline, change_step: int, goal: float) -> int | None:
    """Return how long after the change the rank loads of `RECOVERY_STEPS` steps are balanced to the goal again.

    Args:
        timeline: Of any rank; each knows the load of all.
        change_step: Step at which the domain of the text changes.
        goal: Balancedness, mean over layers.

    Returns:
        Steps from the change to the end of the first such window that lies behind it; None if there is none.
    """
    rows = timeline.rank_rows[change_step : timeline.steps].astype(np.float64)
    sums = np.concatenate([np.zeros((1, *rows.shape[1:])), rows.cumsum(0)])
    windows = sums[RECOVERY_STEPS:] - sums[:-RECOVERY_STEPS]
    balanced = (windows.mean(2) / np.maximum(windows.max(2), 1)).mean(1) >= goal
    return int(balanced.argmax()) + RECOVERY_STEPS if balanced.any() else None


def run_figures(ranks: Sequence[RankRun], change_step: int | None, window: int) -> Figures:
    """Return the figures of one run; all but the digests are plain numbers.

    Args:
        ranks: What each rank measured.
        change_step: Step at which the domain of the text changes; None if it does not.
        window: Steps before the change, and before the end, over which balancedness is taken.
    """
    lines = [rank.timeline for rank in ranks]
    steps = lines[0].steps
    change = steps if change_step is None else change_step
    # Every rank counts the rows that all ranks computed, so the first one's table is the table of all.
    before = lines[0].balancedness(max(0, change - window), change)
    after = lines[0].balancedness(max(0, steps - window), steps)
    outcomes = ranks[0].outcomes
    commits = [step for step in ranks[0].commit_steps if step > change]
    return {
        "itl_ms": latency_ms(lines),
        "longest_step_ms": max(float(line.rebalance_ns.max(initial=0)) for line in lines) / 1e6,
        "longest_step_cpu_ms": max(float(line.rebalance_cpu_ns.max(initial=0)) for line in lines) / 1e6,
        "balancedness": {"before": float(before.mean()), "after": float(after.mean())},
        "balancedness_min_layer": {"before": float(before.min()), "after": float(after.min())},
        "epochs": {name: outcomes.get(name.upper(), 0) for name in OUTCOMES},
        "moved_bytes": sum(rank.moved_bytes for rank in ranks),
        "peer_bytes": sum(rank.peer_bytes for rank in ranks),
        "late_rounds": sum(rank.late_rounds for rank in ranks),
        "rounds": sum(rank.rounds for rank in ranks),
        "tokens_sha256": tokens_sha256(lines),
        "logits_sha256": logits_sha256(lines),
        "steps": steps,
        "seconds": float(lines[0].itl_ns[:steps].sum()) / 1e9,
        "tokens_per_second": _tokens_per_second(lines),
        "steps_to_balance": steps_to_balance(lines[0], change, RECOVERED * float(after.mean())),
        "steps_to_last_commit": commits[-1] - change if commits else None,
        "steps_to_first_commit": commits[0] - change if commits else None,
        "commits": {
            "before": sum(step <= change for step in ranks[0].commit_steps),
            "after": len(commits),
        },
        "steps_in_state": dict(Counter(lines[0].states)),
        "active_share": float(active_steps(lines[0]).mean()) if steps else 0.0,
        "lag": max(rank.lag for rank in ranks),
        "staging_bytes": max(rank.staging_bytes for rank in ranks),
        "why_stopped": next((rank.why_stopped for rank in ranks if rank.why_stopped), ""),
    }


def _tokens_per_second(lines: Sequence[Timeline]) -> float:
    """Tokens fed forward by all ranks, prompt and generated, over the time of the loop."""
    seconds = float(lines[0].itl_ns[: lines[0].steps].sum()) / 1e9
    return sum(int(line.live_tokens[: line.steps].sum()) for line in lines) / seconds if seconds else 0.0


def balancedness_curve(timeline: Timeline, points: int = 50) -> list[float]:
    """Return the mean balancedness of consecutive, equal parts of a run."""
    edges = np.linspace(0, timeline.steps, min(points, timeline.steps) + 1).astype(int)
    return [float(timeline.balancedness(first, last).mean()) for first, last in pairwise(edges)]
