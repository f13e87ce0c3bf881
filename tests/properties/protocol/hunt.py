"""Looking for a mutant: how many generated runs it takes until one breaks the invariant that it must break."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from mutants import Mutant
from runs import Drawn, broken_in, scenarios

from eplb_fsm.simulate.explore import quiet_log
from eplb_fsm.simulate.planning import forget_plans

_ONLY_GENERATE = settings(
    database=None,
    deadline=None,
    phases=[Phase.generate],
    print_blob=False,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
"""What is looked for is one run, not the smallest one."""


class _FoundError(Exception):
    """A run broke what it must break."""


def hunt(mutant: Mutant, max_runs: int, with_seed: int | None = None) -> int | None:
    """Return how many runs it took to find a mutant, None where all of them hold.

    Args:
        mutant: Planted for as long as this lasts.
        max_runs: After so many it is given up.
        with_seed: Draws other runs; None: the same ones every time.
    """
    num_runs = found_at = 0

    @settings(_ONLY_GENERATE, max_examples=max_runs, derandomize=with_seed is None)
    @given(scenario=scenarios(mutant.aim))
    def look(scenario: Drawn) -> None:
        nonlocal num_runs, found_at
        num_runs += 1
        if mutant.has_stale_rank:
            scenario = replace(scenario, stale_rank=scenario.num_ranks - 1)
        if any(text.startswith(f"{mutant.breaks}:") for text in broken_in(scenario, is_strict=mutant.is_strict)):
            found_at = found_at or num_runs
            raise _FoundError

    search: Callable[[], None] = look if with_seed is None else seed(with_seed)(look)
    with pytest.MonkeyPatch.context() as patch, quiet_log():
        forget_plans()
        mutant.plant(patch)
        try:
            search()
        except _FoundError:
            return found_at
        finally:
            forget_plans()  # the mutant's would outlive it
    return None
