"""Inter-token latency while an epoch is under way, against the same steps of a run without rebalancing.

Pairs of runs, `none` and `async`, follow each other in the same processes, in alternating order. Of each pair the
p99 over the steps that were active in the async run is compared with the p99 over the same steps of the other.
The interval is over the pairs' log ratios (Student's t).

    python -m tests.benchmarks.itl --ranks 2 --pairs 7
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from eplb_fsm.config import RebalanceConfig
from eplb_fsm.engines.demo.options import DemoOptions, demo_defaults
from eplb_fsm.engines.demo.run import launch_runs
from eplb_fsm.engines.reference.figures import active_steps, percentile
from eplb_fsm.engines.reference.machine import describe_machine, describe_versions
from eplb_fsm.engines.reference.run import RankRun, RunSpec
from eplb_fsm.engines.reference.timeline import first_difference

# 97.5 % quantiles of Student's t for 1 to 30 degrees of freedom; beyond, the normal one is near enough.
_T_QUANTILES = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


def interval(log_ratios: Sequence[float]) -> dict[str, float]:
    """Return the geometric mean of the ratios with its two-sided 95 % interval."""
    mean = statistics.fmean(log_ratios)
    freedom = len(log_ratios) - 1
    quantile = _T_QUANTILES[freedom - 1] if freedom <= len(_T_QUANTILES) else 1.96
    half = quantile * statistics.stdev(log_ratios) / math.sqrt(len(log_ratios)) if freedom else math.inf
    return {"ratio": math.exp(mean), "lower95": math.exp(mean - half), "upper95": math.exp(mean + half)}


def make_specs(ranks: int, steps: int, pairs: int, batch: int, options: dict[str, Any]) -> list[RunSpec]:
    """Return the runs of all pairs: none, async, async, none, none, ..."""
    # A policy that plans from nothing moves most experts each time: much to be slowed down by.
    config = RebalanceConfig(**{**demo_defaults(steps, ranks), "policy": "deepseek", **options})
    none, _, rebalanced = DemoOptions(ranks=ranks, steps=steps, batch=batch, config=config).specs()
    specs = []
    for pair in range(pairs):
        both = [replace(none, name=f"none-{pair}"), replace(rebalanced, name=f"async-{pair}")]
        specs += both if pair % 2 == 0 else both[::-1]
    return specs


def _itl_ms(ranks: Sequence[RankRun], steps: np.ndarray) -> np.ndarray:
    return np.concatenate([rank.timeline.itl_ns[: rank.timeline.steps][steps] for rank in ranks]) / 1e6


def _cpu_ms(ranks: Sequence[RankRun], steps: np.ndarray) -> float:
    """CPU time of the rebalancer's step() in the decode thread, mean of these steps."""
    parts = [rank.timeline.rebalance_cpu_ns[: rank.timeline.steps][steps] for rank in ranks]
    return float(np.concatenate(parts).mean()) / 1e6


def compare_pair(none: Sequence[RankRun], rebalanced: Sequence[RankRun]) -> dict[str, Any]:
    """Return the figures of one pair; milliseconds."""
    if first_difference([r.timeline for r in none], [r.timeline for r in rebalanced]) is not None:
        raise AssertionError("the runs of a pair are not identical")
    # The ranks are in step, but leave COLLECTING and COMPUTING each at its own time: a step is active if it is on any.
    active = np.logical_or.reduce([active_steps(rank.timeline) for rank in rebalanced])
    active[0] = False
    idle = ~active
    idle[0] = False
    figures: dict[str, Any] = {
        "active_share": float(active.mean()),
        "committed": rebalanced[0].outcomes.get("COMMITTED", 0),
        "late_rounds": sum(rank.late_rounds for rank in rebalanced),
        "step_cpu_ms_active": _cpu_ms(rebalanced, active),
    }
    for percent in (50, 99):
        for name, steps in (("active", active), ("idle", idle)):
            plain, other = (percentile(_itl_ms(run, steps), percent) for run in (none, rebalanced))
            figures[f"p{percent}_{name}"] = {"none": plain, "async": other, "ratio": other / plain}
    return figures


def measure(ranks: int, steps: int, pairs: int, batch: int, options: dict[str, Any]) -> dict[str, Any]:
    """Run all pairs; return each one's figures and the ratios with their intervals."""
    specs = make_specs(ranks, steps, pairs, batch, options)
    runs = dict(zip((spec.name for spec in specs), launch_runs(specs, ranks, None), strict=True))
    figures = [compare_pair(runs[f"none-{pair}"], runs[f"async-{pair}"]) for pair in range(pairs)]
    ratios = {
        name: interval([math.log(pair[name]["ratio"]) for pair in figures])
        for name in ("p99_active", "p50_active", "p99_idle", "p50_idle")
    }
    shares = [pair["active_share"] for pair in figures]
    return {
        "ranks": ranks,
        "steps": steps,
        "batch": batch,
        "pairs": figures,
        "ratios": ratios,
        "least_active_share": min(shares),
        "options": options,
    }


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--batch", type=int, default=8, help="sequences that each rank decodes at the same time")
    parser.add_argument("--options", type=json.loads, default={}, metavar="JSON", help="rebalance options")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    machine = describe_machine()
    result = measure(args.ranks, args.steps, args.pairs, args.batch, args.options)
    result["machine"], result["versions"] = machine, describe_versions()
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
