"""The command `eplb-fsm trace check`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from eplb_fsm.modelcheck.command import OK, SURPRISE, find_folder, write_json
from eplb_fsm.modelcheck.recorded import find_runs, read_run
from eplb_fsm.modelcheck.tlc import Tlc
from eplb_fsm.modelcheck.traces import Rejection, TraceResult, check_runs


def add_trace_command(commands: Any, parser_class: type[argparse.ArgumentParser]) -> None:
    """Add `trace` with its own commands.

    Args:
        commands: What `add_subparsers` returned.
        parser_class: Of the parsers to add.
    """
    trace = commands.add_parser("trace", help="check recorded traces", description="What can be said of traces.")
    actions = trace.add_subparsers(dest="trace_command", required=True, metavar="COMMAND", parser_class=parser_class)
    check = actions.add_parser(
        "check",
        help="have TLC say whether recorded runs are runs of the specification",
        description="Check what the ranks of a run recorded against the specification. The traces in one folder are "
        "one run. Exit status 1 if a run is rejected; then the first event that the specification does not allow is "
        "shown, with the state before it. TLA2TOOLS_JAR and JAVA override the packages of eplb-fsm[spec].",
    )
    check.add_argument("traces", nargs="+", type=Path, metavar="FILE", help="traces, or folders with traces in them")
    check.add_argument("--json", metavar="FILE", help="write the results; - for the standard output")
    check.add_argument("--spec", type=Path, metavar="DIR", help="folder of the specification (default: spec)")


def run_trace(args: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """Run `trace check`; blocks until TLC has ended.

    Raises:
        ConfigError: If something cannot be checked; says why.
        EplbError: If TLC fails.
    """
    runs = [read_run(files) for files in find_runs(args.traces)]
    results = check_runs(Tlc.find(environ), find_folder(args.spec), runs)
    lines = sys.stderr if args.json == "-" else sys.stdout
    for result in results:
        print("\n".join(result_lines(result)), file=lines)
    rejected = sum(not result.is_accepted for result in results)
    print(f"{len(results)} runs: {f'{rejected} REJECTED' if rejected else 'all accepted'}", file=lines)
    write_json(args.json, [_as_json(result) for result in results])
    return SURPRISE if rejected else OK


def result_lines(result: TraceResult) -> Iterator[str]:
    """Yield what is printed of a run: one line, and where and why it was rejected."""
    run = result.run
    cut = ", ".join(str(rank) for rank, is_cut in enumerate(run.is_cut) if is_cut)
    facts = f"{len(run.events)} ranks, {run.num_events} events{', cut off: rank ' * bool(cut)}{cut}"
    yield f"{'ok' if result.is_accepted else 'REJECTED':8}  {run.name}  {facts}"
    if result.broken:
        yield f"    | a state breaks {result.broken}"
    if result.rejection is not None:
        yield from (f"    | {line}" for line in _rejection_lines(result, result.rejection))


def _rejection_lines(result: TraceResult, rejection: Rejection) -> Iterator[str]:
    event = rejection.event
    yield f"{result.run.files[rejection.rank].name}, line {event.line}: {event.action} at step {event.step}"
    yield f"why: {rejection.why}"
    yield "before it: " + ", ".join(f"{name} {value}" for name, value in rejection.before.items() if name != "posted")


def _as_json(result: TraceResult) -> dict[str, Any]:
    rejection = result.rejection
    first = rejection and {
        "file": str(result.run.files[rejection.rank]),
        "line": rejection.event.line,
        "action": rejection.event.action,
        "step": rejection.event.step,
        "why": rejection.why,
    }
    return {
        "run": result.run.name,
        "ranks": len(result.run.events),
        "events": result.run.num_events,
        "accepted": result.is_accepted,
        "breaks": result.broken,
        "rejected_at": first,
    }
