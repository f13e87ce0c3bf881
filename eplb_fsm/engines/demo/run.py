"""Runs the demo: starts the ranks once, makes the three runs in them, and puts the report together."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from eplb_fsm.engines.demo.options import RUNS, DemoOptions
from eplb_fsm.engines.reference.figures import balancedness_curve, run_figures
from eplb_fsm.engines.reference.launch import launch
from eplb_fsm.engines.reference.machine import describe_machine, describe_versions
from eplb_fsm.engines.reference.ranks import RankContext
from eplb_fsm.engines.reference.run import RankRun, RunSpec, Started, Tamper, run_rank
from eplb_fsm.engines.reference.timeline import first_difference
from eplb_fsm.errors import ConfigError, EplbError

Report = dict[str, Any]
"""What `--json` writes."""
OnMessage = Callable[[int, Any], None]


class Refused(NamedTuple):
    """The answer of a rank that cannot work as it was configured."""

    message: str


def rank_main(context: RankContext, specs: Sequence[RunSpec], tamper: Tamper | None) -> list[RankRun] | Refused:
    """Make all runs on one rank, one after the other in the same process."""
    context.send(Started(os.getpid()))
    try:
        return [run_rank(context, spec, tamper) for spec in specs]
    except EplbError as error:
        if isinstance(error, ValueError):  # a configuration that the launcher could not judge, alike on all ranks
            return Refused(str(error))
        raise


def launch_runs(
    specs: Sequence[RunSpec], ranks: int, on_message: OnMessage | None, tamper: Tamper | None = None
) -> list[list[RankRun]]:
    """Make runs on so many processes of this machine; return for each run what its ranks measured.

    Blocks until all processes have ended and are reaped.

    Raises:
        ConfigError: The ranks refused the configuration.
        RankError: A rank was lost or failed; names it.
    """
    configs = [spec.config for spec in specs if spec.config is not None]
    # Whoever is not gone by itself after the time in which a vote must arrive is ended.
    grace = {"grace_s": configs[0].vote_timeout_s} if configs else {}
    answers = launch(rank_main, ranks, (tuple(specs), tamper), on_message=on_message, **grace)
    for answer in answers:
        if isinstance(answer, Refused):
            raise ConfigError(answer.message)
    return [list(run) for run in zip(*answers, strict=True)]


def run_demo(options: DemoOptions, on_message: OnMessage | None = None, tamper: Tamper | None = None) -> Report:
    """Run the demo and return its report; blocks for a minute or more.

    Args:
        options: The demo.
        on_message: Called in this thread with a rank and what it tells: :class:`Started`, :class:`Progress`.
        tamper: Damages something, for tests.

    Raises:
        ConfigError: Something of the options cannot work.
        RankError: A rank was lost or failed; names it.
    """
    specs = options.specs()
    machine = describe_machine()
    runs = dict(zip(RUNS, launch_runs(specs, options.ranks, on_message, tamper), strict=True))
    return make_report(options, runs, machine)


def make_report(options: DemoOptions, runs: dict[str, list[RankRun]], machine: dict[str, Any]) -> Report:
    """Return all that was measured, in values that JSON has."""
    figures = {name: run_figures(ranks, options.change_step, options.window) for name, ranks in runs.items()}
    lines = {name: [rank.timeline for rank in ranks] for name, ranks in runs.items()}
    digests = {(run["tokens_sha256"], run["logits_sha256"]) for run in figures.values()}
    for name, run in figures.items():
        run["balancedness_curve"] = balancedness_curve(lines[name][0])
    config = asdict(options.config)
    del config["mode"]
    return {
        "ranks": options.ranks,
        "steps": options.steps,
        "change_step": options.change_step,
        "balancedness_window_steps": options.window,
        "batch": options.batch,
        "seed": options.seed,
        "domains": list(options.domains),
        "identical": len(digests) == 1,
        "first_different_step": {name: first_difference(lines["none"], lines[name]) for name in RUNS[1:]},
        "runs": figures,
        "problems": find_problems(figures, len(digests) == 1),
        "config": config,
        "machine": machine,
        "versions": describe_versions(),
    }


def find_problems(figures: dict[str, Any], identical: bool) -> list[str]:
    """Return which promises the demo broke, one sentence each; empty when it kept all."""
    problems = [] if identical else ["the runs are not identical: rebalancing changed tokens or logits"]
    for name in RUNS[1:]:
        epochs = figures[name]["epochs"]
        if epochs["failed"]:
            problems.append(f"{name}: {epochs['failed']} epochs failed ({figures[name]['why_stopped']})")
        elif figures[name]["why_stopped"]:
            problems.append(f"{name}: rebalancing stopped ({figures[name]['why_stopped']})")
        if not epochs["committed"]:
            problems.append(f"{name}: no epoch was committed, so nothing was shown; use more --steps")
    return problems
