"""Policies side by side: how balanced, how many moves, how long; every planner on the same loads, one after the other.

Each case starts with DeepSeek's placement for its first window. Then every planner is given one window after the
other and goes on from its own placement. Balancedness is that of the window planned for, and of the next one, which
nobody has seen.

    python -m tests.benchmarks.placement --json placement.json
    python -m tests.benchmarks.placement --peers DIR    # DIR: vLLM's and SGLang's wheels, unpacked
    python -m tests.benchmarks.placement --write        # put table and picture into docs/explanation/placement.md
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eplb_fsm.engines.reference.machine import describe_machine
from eplb_fsm.offline.comparison import Planner, Result, run_windows, summarize
from eplb_fsm.offline.plot import check_plot, plot_balance
from eplb_fsm.placement import Placement
from eplb_fsm.placement.kernels.compiled import IS_COMPILED
from tests.benchmarks.placement.contestants import greedy_swap, no_move, own, peers
from tests.benchmarks.placement.loads import Case, cases

PAGE = Path(__file__).resolve().parents[3] / "docs/explanation/placement.md"
PICTURE = PAGE.parents[1] / "assets/placement.svg"
_TABLE = re.compile(r"(<!-- measured -->\n).*?(<!-- end measured -->)", re.DOTALL)
TARGETS = (0.95, 0.99)
REFERENCE = "deepseek_global"
WEIGHTED = ", weighted"
"""At the end of the name of a planner after which tokens are split unequally among replicas."""


def run_case(case: Case, planners: Mapping[str, Planner]) -> list[Result]:
    """Run all planners on one case; they start from the reference's placement for the first window."""
    size = case.size
    first = Placement.initial(size.num_moe_layers, size.num_logical, size.num_physical, size.num_ranks)
    start = own(REFERENCE, 1.0)(case.windows[0], first)
    weighted = [name for name in planners if name.endswith(WEIGHTED)]
    return run_windows(case.name, case.windows[1:-1], case.windows[-1], planners, start, weighted=weighted)


def make_planners(site_packages: Path | None) -> dict[str, Planner]:
    """All planners by name."""
    return {
        "no move": no_move,
        "greedy swap": greedy_swap,
        REFERENCE: own(REFERENCE, 1.0),
        **{f"movement_aware {target}": own("movement_aware", target) for target in TARGETS},
        f"no move{WEIGHTED}": no_move,
        **{f"movement_aware {target}{WEIGHTED}": own("movement_aware", target, "weighted") for target in TARGETS},
        **peers(site_packages),
    }


def compare(results: Sequence[Result], target: float, split: str) -> dict[str, Any]:
    """How many times fewer moves than the reference, over the cases in which not moving misses the target.

    Args:
        results: All.
        target: Of the movement-aware policy.
        split: What the names of the planners end with; the reference's tokens are always split equally.
    """
    by_case = {(result.case, result.planner): result for result in results}
    names = list(dict.fromkeys(result.case for result in results))
    hard = [name for name in names if min(by_case[name, f"no move{split}"].now) < target]
    ours = [by_case[name, f"movement_aware {target}{split}"] for name in hard]
    theirs = [by_case[name, REFERENCE] for name in hard]
    ratios = [sum(b.moves) / max(1, sum(a.moves)) for a, b in zip(ours, theirs, strict=True)]
    ahead = [statistics.fmean(a.ahead) - statistics.fmean(b.ahead) for a, b in zip(ours, theirs, strict=True)]
    return {
        "target": target,
        "replica_split": "weighted" if split else "equal",
        "cases": len(hard),
        "cases_good_without_moves": len(names) - len(hard),
        "fewer_moves_median": statistics.median(ratios),
        "fewer_moves_min": min(ratios),
        "balance_next_median_difference": statistics.median(ahead),
        "balance_next_worst_difference": min(ahead),
    }


def main() -> None:
    """Run, print tables, and write all of it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--real", type=Path, help="file with real counts: one more case")
    parser.add_argument("--peers", type=Path, help="folder in which vLLM's and SGLang's wheels are unpacked")
    parser.add_argument("--json", type=Path, help="file for every figure")
    parser.add_argument("--write", action="store_true", help="put table and picture into the page")
    args = parser.parse_args()
    if args.write:
        check_plot(PICTURE)
    torch.set_num_threads(1)
    planners = make_planners(args.peers)
    for plan in planners.values():  # compilers run before the clock does
        plan(np.array([[3.0, 1.0]]), Placement.initial(1, 2, 2, 2))
    results = []
    for case in cases(args.real):
        if args.only in case.name:
            results += run_case(case, planners)
            print_case(results[-len(planners) :])
    rows, comparison = (
        summarize(results),
        [compare(results, target, split) for split in ("", WEIGHTED) for target in TARGETS],
    )
    machine = {**describe_machine(), "is_compiled": IS_COMPILED}
    report = {"machine": machine, "summary": rows, "comparison": comparison}
    print(json.dumps(report, indent=2))
    if args.write:
        table = markdown(rows, comparison)
        text = PAGE.read_text(encoding="utf-8")
        plot_balance(rows, PICTURE)
        PAGE.write_text(_TABLE.sub(lambda match: f"{match[1]}{table}\n{match[2]}", text), encoding="utf-8")
    if args.json is not None:
        everything = {**report, "results": [asdict(result) for result in results]}
        args.json.write_text(json.dumps(everything, indent=1), encoding="utf-8")


def markdown(rows: Mapping[str, Mapping[str, float]], comparison: Sequence[Mapping[str, Any]]) -> str:
    """The summary as a table, and a sentence for each target."""
    lines = [
        "| planner | balancedness of the window planned for | of the next one | moves | a plan, median and most, ms |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, row in rows.items():
        balance = f"{row['balance_now']:.4f} | {row['balance_next']:.4f}"
        lines.append(f"| {name} | {balance} | {row['moves']:,} | {row['ms_median']:.1f}, {row['ms_max']:.0f} |")
    for one in comparison:
        lines += [
            "",
            f"Target {one['target']}, replicas with {one['replica_split']} shares: over the {one['cases']} cases that "
            "miss it without moves "
            f"({one['cases_good_without_moves']} do not), {one['fewer_moves_median']:.1f} times fewer moves than "
            f"`{REFERENCE}` in the median and {one['fewer_moves_min']:.1f} times at least; the next window is less "
            f"balanced by {-one['balance_next_median_difference']:.4f} in the median, "
            f"{-one['balance_next_worst_difference']:.4f} at most.",
        ]
    return "\n".join(lines)


def print_case(results: Sequence[Result]) -> None:
    """A line for each planner."""
    for result in results:
        now, ahead = statistics.fmean(result.now), statistics.fmean(result.ahead)
        print(
            f"{result.case:18} {result.planner:20} now {now:.4f} next {ahead:.4f} moves {sum(result.moves):7}"
            f" {statistics.median(result.ms):8.2f} ms, at most {max(result.ms):8.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
