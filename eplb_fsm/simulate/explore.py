"""Many seeds: what all runs together have shown, and the runs that broke something."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from eplb_fsm.observe.trace import NdjsonTrace
from eplb_fsm.simulate.branches import NUM_BRANCHES, run_branches
from eplb_fsm.simulate.coverage import feasible_targets
from eplb_fsm.simulate.run import RunResult
from eplb_fsm.simulate.scenario import Scenario, Target, draw_scenario

_SEEDS_AT_A_TIME = 8 * NUM_BRANCHES
_NUM_NEW_OBJECTS = 200_000
"""Between two looks for garbage."""
_MAX_KEPT_FAILURES = 100


class Space(NamedTuple):
    """Which runs a seed is drawn from."""

    num_ranks: int
    is_lockstep: bool | None = None
    """None: drawn for each run."""

    def scenario(self, seed: int) -> Scenario:
        """Return the scenario of a seed, which it shares with its branches."""
        drawn = draw_scenario(seed // NUM_BRANCHES, self.num_ranks, self.is_lockstep, feasible_targets())
        return replace(drawn, seed=seed)

    def runs(self, seeds: range) -> Iterator[RunResult]:
        """Run all seeds, one after the other."""
        for first in range(seeds.start // NUM_BRANCHES * NUM_BRANCHES, seeds.stop, NUM_BRANCHES):
            yield from run_branches(self.scenario(first), seeds, feasible_targets())


class Failure(NamedTuple):
    """A run that broke an invariant."""

    seed: int
    violations: list[str]


@dataclass(slots=True)
class Findings:
    """What a number of runs has shown; those of several processes are merged.

    Attributes:
        num_runs: Runs.
        num_whole: Runs through at least one whole epoch; only these count as interleavings.
        num_second: Of these, runs with an aborted epoch and another one after it.
        interleavings: Hashes of the equivalence classes of whole runs.
        states: Hashes of the cluster states.
        hits: Combinations of state, decision and fault that were seen.
        failures: Runs that broke an invariant; only the first ones are kept.
    """

    num_runs: int = 0
    num_whole: int = 0
    num_second: int = 0
    num_failures: int = 0
    interleavings: set[int] = field(default_factory=set)
    states: set[int] = field(default_factory=set)
    hits: set[Target] = field(default_factory=set)
    failures: list[Failure] = field(default_factory=list)

    def add(self, result: RunResult) -> None:
        """Count one run."""
        self.num_runs += 1
        self.states |= result.states
        self.hits.update(result.hits)
        if result.num_epochs:
            self.num_whole += 1
            self.num_second += result.has_second_epoch
            self.interleavings.add(result.interleaving)
        if result.violations:
            self.num_failures += 1
            self._keep([Failure(result.scenario.seed, result.violations)])

    def merge(self, other: Findings) -> None:
        """Add what another process has found."""
        self.num_runs += other.num_runs
        self.num_whole += other.num_whole
        self.num_second += other.num_second
        self.num_failures += other.num_failures
        self.interleavings |= other.interleavings
        self.states |= other.states
        self.hits |= other.hits
        self._keep(other.failures)

    def _keep(self, failures: Sequence[Failure]) -> None:
        self.failures = sorted([*self.failures, *failures])[:_MAX_KEPT_FAILURES]


def run_seed(space: Space, seed: int) -> RunResult:
    """Run one seed."""
    return next(space.runs(range(seed, seed + 1)))


def write_trace(result: RunResult, folder: Path) -> None:
    """Write the events of a run, a file for each rank."""
    files = [NdjsonTrace(folder, rank) for rank in range(result.scenario.num_ranks)]
    for event in result.events:
        files[event.rank].on_event(event)
    for file in files:
        file.close()


def explore_seeds(space: Space, seeds: range, trace: Path | None = None) -> Findings:
    """Run all seeds in this process; with a folder, write the trace of each rank to ``seed<n>`` in it."""
    torch.set_num_threads(1)
    findings = Findings()
    with quiet_log(), rare_collections():
        for result in space.runs(seeds):
            findings.add(result)
            if trace is not None:
                write_trace(result, trace / f"seed{result.scenario.seed}")
    return findings


@contextmanager
def quiet_log() -> Iterator[None]:
    """Log nothing of the library: it would report every fault, on every rank."""
    logger = logging.getLogger("eplb_fsm")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def rare_collections() -> Iterator[None]:
    """Look for garbage rarely, and not among what was there before: runs make many objects and few cycles."""
    threshold = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(_NUM_NEW_OBJECTS)
    try:
        yield
    finally:
        gc.set_threshold(*threshold)
        gc.unfreeze()


class Mapper(Protocol):
    """Applies a function to many things, in any order: ``map``, or ``imap_unordered`` of a pool of processes."""

    def __call__(self, function: Callable[[range], Findings], parts: Sequence[range], /) -> Iterable[Findings]:
        """Return what the function returns for each."""
        ...


def explore(
    space: Space,
    seeds: range,
    mapper: Mapper = map,
    *,
    trace: Path | None = None,
    on_progress: Callable[[Findings], None] = lambda findings: None,
) -> Findings:
    """Run all seeds, some at a time; what is found does not depend on which process runs which.

    Args:
        space: Which runs.
        seeds: Which seeds.
        mapper: Runs parts of the seeds; by default one after the other in this process.
        trace: Folder for the traces of all runs.
        on_progress: Told of the sum so far, after each part.
    """
    findings = Findings()
    parts = [seeds[first : first + _SEEDS_AT_A_TIME] for first in range(0, len(seeds), _SEEDS_AT_A_TIME)]
    for part in mapper(partial(explore_seeds, space, trace=trace), parts):
        findings.merge(part)
        on_progress(findings)
    return findings
