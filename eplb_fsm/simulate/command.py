"""`eplb-fsm simulate`: explore seeds, count what they have shown, and replay those that broke something."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from eplb_fsm.errors import ConfigError
from eplb_fsm.runtime.clock import monotonic
from eplb_fsm.simulate.coverage import measure_coverage
from eplb_fsm.simulate.explore import Failure, Findings, Mapper, Space, explore, quiet_log, run_seed
from eplb_fsm.simulate.run import RunResult, event_words
from eplb_fsm.simulate.scenario import Target
from eplb_fsm.simulate.shrink import shrink

_MAX_RANKS = 16
_MAX_SHRUNK = 3
"""Failures that are made smaller and printed in full; the others are named."""


def run_command(args: argparse.Namespace, mapper: Mapper, num_processes: int) -> tuple[int, dict[str, Any], str]:
    """Explore, and shrink what failed; blocks until all is done.

    Args:
        args: Of :func:`eplb_fsm.simulate.arguments.add_arguments`.
        mapper: Runs parts of the seeds; the command line owns the processes.
        num_processes: How many there are.

    Returns:
        The exit status, all figures, and the text to print.

    Raises:
        ConfigError: For options that cannot be.
    """
    if not 2 <= args.ranks <= _MAX_RANKS:
        raise ConfigError(f"--ranks {args.ranks}: choose 2 to {_MAX_RANKS}; one rank has nothing to agree on")
    space = Space(args.ranks, args.is_lockstep)
    for seed in args.seeds if args.verbose else ():
        with quiet_log():
            _print_events(run_seed(space, seed))
    began = monotonic()
    progress = _silent if args.quiet else lambda findings: _show(findings, len(args.seeds))
    findings = explore(space, args.seeds, mapper, trace=args.trace, on_progress=progress)
    figures = _figures(findings, monotonic() - began, num_processes)
    lines = [_table(figures)]
    lines += [_describe(space, failure) for failure in findings.failures[:_MAX_SHRUNK]]
    lines += [_headline(space, failure) for failure in findings.failures[_MAX_SHRUNK:]]
    if args.verbose:
        lines += [f"not seen: {_words(target)}" for target in measure_coverage(findings.hits).missing]
    return int(bool(findings.num_failures)), figures, "\n".join(lines)


def replay_command(space: Space, seed: int) -> str:
    """Return the command that shows one run again."""
    coupling = {None: "", True: " --lockstep", False: " --free"}[space.is_lockstep]
    return f"eplb-fsm simulate --seeds {seed}:{seed + 1} --ranks {space.num_ranks}{coupling} --verbose"


def _silent(findings: Findings) -> None:
    pass


def _show(findings: Findings, num_seeds: int) -> None:
    sys.stderr.write(f"\r{findings.num_runs} of {num_seeds} runs, {findings.num_failures} failed")
    sys.stderr.write("\n" if findings.num_runs == num_seeds else "")
    sys.stderr.flush()


def _figures(findings: Findings, seconds: float, num_jobs: int) -> dict[str, Any]:
    coverage = measure_coverage(findings.hits)
    return {
        "runs": findings.num_runs,
        "runs_through_an_epoch": findings.num_whole,
        "runs_with_an_epoch_after_an_abort": findings.num_second,
        "interleavings": len(findings.interleavings),
        "cluster_states": len(findings.states),
        "combinations_seen": coverage.num_seen,
        "combinations_feasible": coverage.num_feasible,
        "combinations_thought_impossible": [_words(target) for target in coverage.surprises],
        "seconds": seconds,
        "processes": num_jobs,
        "failed": findings.num_failures,
        "failures": [{"seed": failure.seed, "violations": failure.violations} for failure in findings.failures],
    }


def _words(target: Target) -> str:
    return f"{target.fault.value} in {target.state.value}, {target.decision}"


def _table(figures: dict[str, Any]) -> str:
    second = figures["runs_with_an_epoch_after_an_abort"] / max(figures["runs"], 1)
    feasible = figures["combinations_feasible"]
    share = figures["combinations_seen"] / feasible
    rate = figures["interleavings"] / figures["seconds"] / figures["processes"]
    rows = [
        ("runs", f"{figures['runs']}"),
        ("through at least one epoch", f"{figures['runs_through_an_epoch']}"),
        ("with an abort and another epoch", f"{figures['runs_with_an_epoch_after_an_abort']} ({second:.0%})"),
        ("distinct interleavings", f"{figures['interleavings']}"),
        ("distinct cluster states", f"{figures['cluster_states']}"),
        (
            "state, decision, fault",
            f"{figures['combinations_seen']} of {figures['combinations_feasible']} ({share:.1%})",
        ),
        ("interleavings a second and process", f"{rate:.0f}"),
        ("failed", f"{figures['failed']}"),
    ]
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(f"{name:<{width}}{value}" for name, value in rows)


def _headline(space: Space, failure: Failure) -> str:
    command = replay_command(space, failure.seed)
    return f"\nFAILED seed {failure.seed}: {failure.violations[0]}\n  replay it: {command}"


def _describe(space: Space, failure: Failure) -> str:
    with quiet_log():
        shrunk = shrink(run_seed(space, failure.seed))
    choices = [f"{at}: rank {c.rank} {c.action.name}" for at, c in enumerate(shrunk.schedule) if c is not None]
    lines = [
        _headline(space, failure),
        f"  smallest run found in {shrunk.num_tries} tries: {shrunk.result.violations[0]}",
        *(f"  fault  {fault}" for fault in shrunk.result.scenario.faults),
        f"  {shrunk.num_choices} of {len(shrunk.schedule)} choices are not the round robin's: {', '.join(choices)}",
    ]
    return "\n".join(lines)


def _print_events(result: RunResult) -> None:
    write = sys.stdout.write
    write(f"{result.scenario}\ntrace digest {result.digest}\n")
    for event in result.events:
        write(" ".join(map(str, event_words(event))) + "\n")
    write("".join(f"VIOLATION {text}\n" for text in result.violations))
