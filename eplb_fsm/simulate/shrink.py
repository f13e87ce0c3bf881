"""Make a failing run smaller: first its faults, then its schedule; every try is a run of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace

from eplb_fsm.simulate.run import Run, RunResult, Schedule
from eplb_fsm.simulate.scenario import Scenario

_MAX_TRIES = 150


@dataclass(frozen=True, slots=True)
class Shrunk:
    """The smallest run found that breaks the same invariant.

    Attributes:
        result: What it shows; its scenario holds the faults that are needed.
        schedule: Its choices; None where the default does as well.
        num_tries: Runs made on the way.
    """

    result: RunResult
    schedule: Schedule
    num_tries: int

    @property
    def num_choices(self) -> int:
        """Choices that are not left to the default."""
        return sum(choice is not None for choice in self.schedule)


class _Search:
    def __init__(self, invariant: str, max_tries: int) -> None:
        self._invariant = invariant
        self._max_tries = max_tries
        self.num_tries = 0

    @property
    def may_go_on(self) -> bool:
        return self.num_tries < self._max_tries

    def fails(self, scenario: Scenario, schedule: Schedule) -> RunResult | None:
        """Return the run if it breaks the same invariant."""
        self.num_tries += 1
        result = Run(scenario, schedule).result()
        return result if invariant_of(result) == self._invariant else None


def invariant_of(result: RunResult) -> str:
    """Return the name of the first invariant that a run breaks, empty if none."""
    return result.violations[0].partition(":")[0] if result.violations else ""


def shrink(result: RunResult, max_tries: int = _MAX_TRIES) -> Shrunk:
    """Return the smallest run found within ``max_tries`` runs that breaks the same invariant as this one.

    Raises:
        ValueError: If the run breaks none.
    """
    if not result.violations:
        raise ValueError(f"seed {result.scenario.seed} breaks no invariant")
    search = _Search(invariant_of(result), max_tries)
    result = _drop_faults(search, result)
    result, schedule = _default_choices(search, result)
    return Shrunk(result, schedule, search.num_tries)


def _drop_faults(search: _Search, result: RunResult) -> RunResult:
    """Leave out one fault after the other, as long as the run fails without it."""
    kept = 0
    while kept < len(result.scenario.faults) and search.may_go_on:
        faults = result.scenario.faults
        smaller = search.fails(replace(result.scenario, faults=faults[:kept] + faults[kept + 1 :]), result.schedule)
        if smaller is None:
            kept += 1
        else:
            result = smaller
    return result


def _default_choices(search: _Search, result: RunResult) -> tuple[RunResult, Schedule]:
    """Put the default in place of choices: of halves first, at last of single ones."""
    schedule: Schedule = result.schedule
    size = len(schedule)
    while size:
        for first in range(0, len(schedule), size):
            part = schedule[first : first + size]
            if not any(part) or not search.may_go_on:
                continue
            tried = [*schedule[:first], *([None] * len(part)), *schedule[first + size :]]
            smaller = search.fails(result.scenario, tried)
            if smaller is not None:
                result, schedule = smaller, tried
        size //= 2
    return result, schedule
