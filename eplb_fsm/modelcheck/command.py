"""The commands `eplb-fsm spec check` and `eplb-fsm spec explain`."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from eplb_fsm.errors import ConfigError
from eplb_fsm.modelcheck.checks import Result, compare, run_check, run_checks, updated
from eplb_fsm.modelcheck.manifest import MANIFEST, TIERS, Check, load_manifest, write_manifest
from eplb_fsm.modelcheck.tlc import Step, Tlc

OK, SURPRISE = 0, 1

_VARIABLE = re.compile(r"^(?:/\\ )?(\w+) = (.*?)(?=^/\\ |\Z)", re.MULTILINE | re.DOTALL)


def add_spec_command(commands: Any, parser_class: type[argparse.ArgumentParser]) -> None:
    """Add `spec` with its own commands.

    Args:
        commands: What `add_subparsers` returned.
        parser_class: Of the parsers to add.
    """
    spec = commands.add_parser("spec", help="check the specification with TLC", description="What TLC says of spec/.")
    actions = spec.add_subparsers(dest="spec_command", required=True, metavar="COMMAND", parser_class=parser_class)
    check = actions.add_parser(
        "check",
        help="run the checks of spec/manifest.json, each of which must hold or fail as written there",
        description="Run the checks of the manifest. Exit status 1 on any surprise: a result, a property or a number "
        "of states that is not the expected one. TLA2TOOLS_JAR and JAVA override the packages of eplb-fsm[spec].",
    )
    add = check.add_argument
    add("--only", metavar="GLOB", default="*", help="checks whose name matches, as in 'mutants/*'")
    add("--tier", choices=(*TIERS, "all"), default="push", help="push (default), nightly or all")
    add("--json", metavar="FILE", help="write the results; - for the standard output, with the lines on the other")
    add("--jobs", type=int, metavar="N", default=os.cpu_count() or 1, help="checks at a time (default: cores)")
    add("--update", action="store_true", help="write states and seconds of what came out as expected to the manifest")
    explain = actions.add_parser(
        "explain",
        help="run one check that must fail and print its counterexample",
        description="Print the counterexample of one check, step by step: the action, and what it changes.",
    )
    explain.add_argument("name", metavar="NAME", help="the check")
    for command in (check, explain):
        command.add_argument("--spec", type=Path, metavar="DIR", help="folder of the manifest (default: spec)")


def run_spec(args: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """Run `spec check` or `spec explain`; blocks until TLC has ended.

    Raises:
        ConfigError: If nothing can be run; says why.
    """
    folder = find_folder(args.spec)
    return (_check if args.spec_command == "check" else _explain)(args, folder, load_manifest(folder), environ)


def find_folder(given: Path | None) -> Path:
    """Return the folder of the manifest: the given one, that below the current folder, or that of the checkout.

    Raises:
        ConfigError: If there is none.
    """
    if given is not None:
        return given
    for root in (Path.cwd(), Path(__file__).resolve().parents[2]):
        if (root / "spec" / MANIFEST).is_file():
            return root / "spec"
    raise ConfigError(f"there is no spec/{MANIFEST} here, and eplb_fsm is not a checkout: name the folder with --spec")


def _check(args: argparse.Namespace, folder: Path, checks: list[Check], environ: Mapping[str, str]) -> int:
    if args.jobs < 1:
        raise ConfigError(f"--jobs is {args.jobs}: give a number from 1")
    chosen = [c for c in checks if fnmatchcase(c.name, args.only) and args.tier in (c.tier, "all")]
    if not chosen:
        raise ConfigError(f"no check of tier {args.tier} is called {args.only}: see {folder / MANIFEST}")
    lines = sys.stderr if args.json == "-" else sys.stdout
    width = max(len(check.name) for check in chosen)

    def show(result: Result) -> None:
        print(result_line(_as_recorded(result) if args.update else result, width), file=lines, flush=True)

    results = run_checks(Tlc.find(environ), folder, chosen, args.jobs, show)
    if args.update:
        results = [_as_recorded(result) for result in results]
        _update(folder, results)
    write_json(args.json, [result.as_json() for result in results])
    surprises = [result.check.name for result in results if result.surprise]
    summary = f"{len(results)} checks: "
    summary += f"{len(surprises)} SURPRISES: {', '.join(surprises)}" if surprises else "all as expected"
    print(summary, file=lines)
    return SURPRISE if surprises else OK


def _as_recorded(result: Result) -> Result:
    """Return a result of which count and time are as expected, because they are recorded."""
    check = updated(result.check, result.run)
    return Result(check, result.run, compare(check, result.run))


def _update(folder: Path, results: Sequence[Result]) -> None:
    """Write what came out as expected into the manifest as it is now; somebody may have changed it meanwhile."""
    runs = {result.check.name: result.run for result in results}
    checks = load_manifest(folder)
    write_manifest(folder, [updated(check, runs[check.name]) if check.name in runs else check for check in checks])


def result_line(result: Result, width: int = 0) -> str:
    """Return what is printed of a result: one line, and what TLC said if it failed."""
    check, run = result.check, result.run
    facts = [f"expected {check.expected}", f"seen {run.seen}", run.property or "-"]
    facts += [f"{run.states if run.states is not None else '-'} states", f"{run.seconds:.1f} s"]
    line = f"{'SURPRISE' if result.surprise else 'ok':8}  {check.name:{width}}  {', '.join(facts)}"
    if result.surprise:
        line += f": {result.surprise}"
    return "\n    | ".join([line, *run.message.splitlines()])


def write_json(target: str | None, results: Sequence[dict[str, Any]]) -> None:
    """Write results to a file, to the standard output for ``-``, or nowhere for None.

    Raises:
        ConfigError: The file cannot be written.
    """
    if target is None:
        return
    text = json.dumps(results, indent=2) + "\n"
    if target == "-":
        sys.stdout.write(text)
        return
    try:
        Path(target).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--json {target}: cannot be written ({error.strerror}); name another file") from error


def _explain(args: argparse.Namespace, folder: Path, checks: list[Check], environ: Mapping[str, str]) -> int:
    check = next((check for check in checks if check.name == args.name), None)
    if check is None:
        raise ConfigError(f"no check is called {args.name}: see {folder / MANIFEST}")
    result = run_check(Tlc.find(environ), folder, check)
    print(result_line(result))
    for line in trace_lines(result.run.trace):
        print(line)
    return SURPRISE if result.surprise else OK


def trace_lines(trace: Sequence[Step]) -> Iterator[str]:
    """Yield a counterexample as text: each action, and below it the variables that it changed."""
    before: dict[str, str] = {}
    for number, step in enumerate(trace, 1):
        yield f"{number:3}  {step.action.partition(' line ')[0]}"
        after = dict(_VARIABLE.findall(step.state))
        yield from (f"       {name} = {text.strip()}" for name, text in after.items() if before.get(name) != text)
        before = after
