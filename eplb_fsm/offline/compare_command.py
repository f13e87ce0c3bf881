"""`eplb-fsm compare`: policies side by side on a recording."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from eplb_fsm.errors import ConfigError
from eplb_fsm.observe.table import render
from eplb_fsm.offline.comparison import Planner, run_windows, summarize
from eplb_fsm.offline.plot import check_plot, plot_balance
from eplb_fsm.offline.problem import Problem, read_problem
from eplb_fsm.placement.placement import Placement
from eplb_fsm.placement.policies import get_policy, policy_names
from eplb_fsm.placement.validate import Float64Array

_NO_MOVE = "no move"
_START = "deepseek"
_NOT_BY_DEFAULT = ("deepseek_refined", "deepseek_hierarchical")
"""One takes seconds; the other is `deepseek` where the groups divide among the nodes, else an error."""


def run_compare(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Have all policies plan for one window after the other; blocks.

    Without a placement to start from, all start from DeepSeek's for the first window, which no one is asked about
    then; a recording of one window starts from the trivial placement.

    Args:
        args: Of :func:`~eplb_fsm.offline.arguments.add_compare_arguments`.

    Returns:
        All figures, and the text to print.

    Raises:
        EplbError: Input that cannot be.
    """
    if args.plot is not None:
        check_plot(args.plot)
    problem = read_problem(args)
    planners = {_NO_MOVE: _no_move, **_policies(args.eplb_algorithms, problem, args.replica_split)}
    windows, start = _windows(problem, args.window_size)
    total = len(windows) * len(planners)

    def show(name: str, window: int) -> None:
        done = window * len(planners) + list(planners).index(name)
        sys.stderr.write(f"\r{done} of {total} plans, now {name}".ljust(60))
        sys.stderr.flush()

    weighted = planners if args.replica_split == "weighted" else ()
    on_plan = (lambda *_: None) if args.quiet else show
    speeds = problem.topology.counted_speeds
    results = run_windows(args.loads.name, windows, None, planners, start, on_plan, weighted, speeds)
    if not args.quiet:
        sys.stderr.write("\r" + " " * 60 + "\r")
    rows = summarize(results)
    if args.plot is not None:
        plot_balance(rows, args.plot)
    return {"windows": len(windows), "summary": rows}, _text(rows, windows, problem, args)


def _no_move(load: Float64Array, current: Placement) -> Placement:
    return current


def _policies(names: str | None, problem: Problem, replica_split: str) -> dict[str, Planner]:
    chosen = [name for name in policy_names() if name not in _NOT_BY_DEFAULT] if names is None else names.split(",")
    return {name.strip(): _planner(name.strip(), problem, replica_split) for name in chosen}


def _planner(name: str, problem: Problem, replica_split: str) -> Planner:
    policy = get_policy(name, problem.target_balancedness, replica_split)
    warm_up = getattr(policy, "warm_up", None)
    if warm_up is not None:
        warm_up()  # the compiler runs before the clock does
    return lambda load, current: policy.plan(load, current, problem.topology)


def _windows(problem: Problem, window_size: int) -> tuple[Sequence[Float64Array], Placement]:
    """Sum the recorded windows that go into one plan, and say where everyone starts."""
    if not 1 <= window_size <= len(problem.windows):
        raise ConfigError(f"--window-size {window_size}: choose 1 to {len(problem.windows)}, the windows recorded")
    whole = len(problem.windows) // window_size * window_size  # what is left over at the end is no whole window
    windows = list(problem.windows[:whole].reshape(-1, window_size, *problem.windows.shape[1:]).sum(axis=1))
    if problem.is_given or len(windows) == 1:
        return windows, problem.start
    start = get_policy(_START).plan(np.asarray(windows[0]), problem.start, problem.topology)
    return windows[1:], start


def _text(
    rows: Mapping[str, Mapping[str, Any]], windows: Sequence[Float64Array], problem: Problem, args: argparse.Namespace
) -> str:
    head = ["policy", "balanced", "worst layer", "next window", "moves a plan", "ms a plan"]
    sizes = [] if args.expert_bytes is None else ["GB a plan"]
    table = [[*head, *sizes]]
    for name, row in rows.items():
        moves = row["moves"] / row["plans"]
        ahead = "-" if row["balance_next"] is None else f"{row['balance_next']:.4f}"
        cells = [name, f"{row['balance_now']:.4f}", f"{row['worst_layer']:.4f}", ahead]
        cells += [f"{moves:.1f}", f"{row['ms_median']:.1f}"]
        table.append(cells + ([] if args.expert_bytes is None else [f"{moves * args.expert_bytes / 1e9:.2f}"]))
    _, layers, experts = problem.windows.shape
    plans = f"{len(windows)} plans of each policy" if len(windows) > 1 else "one plan of each policy"
    plotted = "" if args.plot is None else f"\n\nwritten: {args.plot}"
    return (
        f"{layers} layers, {experts} experts in {problem.start.num_physical_experts} slots on "
        f"{problem.topology.num_ranks} ranks; {plans}\n\n{render(table)}{plotted}"
    )
