"""Many runs from one beginning: what they share is run once.

The seeds ``n * NUM_BRANCHES`` up to ``(n + 1) * NUM_BRANCHES`` share one scenario. At the start, and wherever the run
may branch (:meth:`~eplb_fsm.simulate.run.Run.go_on`), half of the seeds that have come so far part from the other
half: the state is put back, and another seed decides what is still to come, choices and faults. So each seed is still
one run from the start, and a seed that is run alone takes the same turns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from eplb_fsm.simulate.run import Run, RunResult
from eplb_fsm.simulate.scenario import Scenario, Target
from eplb_fsm.simulate.snapshot import Parts, Snapshot

NUM_BRANCHES = 64


def run_branches(scenario: Scenario, seeds: range, targets: Sequence[Target]) -> Iterator[RunResult]:
    """Run some of the seeds that share a scenario, in ascending order.

    Args:
        scenario: Theirs, with any of its seeds.
        seeds: The seeds wanted; others are left out.
        targets: What the faults may aim at.
    """
    first = scenario.seed // NUM_BRANCHES * NUM_BRANCHES
    yield from _Branches(Run(scenario), seeds, targets).go_on(range(first, first + NUM_BRANCHES))


class _Branches:
    """One run and the seeds that are wanted of it."""

    def __init__(self, run: Run, wanted: range, targets: Sequence[Target]) -> None:
        self._run = run
        self._parts = Parts(run)
        self._wanted = wanted
        self._targets = targets

    def go_on(self, seeds: range) -> Iterator[RunResult]:
        """Go on from here with all of these seeds."""
        here = Snapshot(self._parts)
        is_here = True
        middle = (seeds.start + seeds.stop) // 2
        for half in (range(seeds.start, middle), range(middle, seeds.stop)):
            if not self._wants(half):
                continue
            if not is_here:
                here.restore()
            is_here = False
            self._run.reseed(half.start, self._targets)
            if len(half) > 1 and self._run.go_on(to_branch=True):
                yield from self.go_on(half)
                continue
            for seed in half:
                if seed != half.start:  # the run was over before it could branch again: these part from here
                    here.restore()
                    self._run.reseed(seed, self._targets)
                if seed in self._wanted:
                    yield self._run.result(seed)

    def _wants(self, seeds: range) -> bool:
        return seeds.start < self._wanted.stop and self._wanted.start < seeds.stop
