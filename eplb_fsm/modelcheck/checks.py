"""Runs the checks of a manifest beside each other and compares what is seen with what is expected."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from eplb_fsm.modelcheck.manifest import Check, read_model
from eplb_fsm.modelcheck.tlc import Run, Tlc

_SHORT_S = 20.0
"""A check that was seen to take less is a short one."""


class Result(NamedTuple):
    """A check, what was seen of it, and what is surprising in that: empty if it is as expected."""

    check: Check
    run: Run
    surprise: str

    def as_json(self) -> dict[str, Any]:
        """Return what `--json` writes of it."""
        return {
            "name": self.check.name,
            "expected": self.check.expected,
            "seen": self.run.seen,
            "property": self.run.property,
            "states": self.run.states,
            "seconds": round(self.run.seconds, 1),
        }


def run_checks(
    tlc: Tlc, folder: Path, checks: Sequence[Check], jobs: int, on_result: Callable[[Result], None]
) -> list[Result]:
    """Run checks in parallel, the longest first; blocks until all have ended.

    Args:
        tlc: What to run.
        folder: Where the modules are.
        checks: What to run it on.
        jobs: How many at a time.
        on_result: Is given each result as soon as it is there, in the calling thread.

    Returns:
        The results, in the order of `checks`.
    """
    longest_first = sorted(checks, key=lambda check: check.seconds or 0.0, reverse=True)
    results: dict[str, Result] = {}
    with ThreadPoolExecutor(jobs) as pool:
        try:
            for future in as_completed([pool.submit(run_check, tlc, folder, check) for check in longest_first]):
                result = future.result()
                results[result.check.name] = result
                on_result(result)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            tlc.end()
            raise
    return [results[check.name] for check in checks]


def run_check(tlc: Tlc, folder: Path, check: Check) -> Result:
    """Run one check; blocks until it has ended."""
    cfg = folder / check.cfg
    run = tlc.run(folder / check.module, cfg, is_short=check.seconds is not None and check.seconds < _SHORT_S)
    if run.seen == "violates" and run.property is None:
        run = run._replace(property=_temporal_property(cfg))
    return Result(check, run, compare(check, run))


def _temporal_property(cfg: Path) -> str | None:
    """Return which property a violated temporal one is: TLC does not say, so only a cfg with a single one tells."""
    checked = read_model(cfg.read_text(encoding="utf-8")).checked
    return checked[0] if len(checked) == 1 else None


def compare(check: Check, run: Run) -> str:
    """Return what is surprising in a run, empty if it is as expected."""
    if run.seen == "error":
        return "TLC failed"
    if run.seen != check.expected:
        return f"should be {check.expected}, is {run.seen}"
    if run.property != check.property:
        return f"should violate {check.property}, violates {run.property or 'one of several temporal properties'}"
    if check.expected == "holds" and run.states != check.states:
        return f"should have {check.states or 'a recorded number of'} states, has {run.states}"
    return ""


def updated(check: Check, run: Run) -> Check:
    """Return a check with the count and the time that were seen, or as it was if something else came out."""
    if (run.seen, run.property) != (check.expected, check.property):
        return check
    return replace(check, states=run.states if run.seen == "holds" else None, seconds=round(run.seconds, 1))
