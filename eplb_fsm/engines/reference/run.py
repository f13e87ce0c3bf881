"""One run of the engine on one rank, with or without a rebalancer: what the demo and `eplb-fsm decode` launch."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from eplb_fsm.config import RebalanceConfig
from eplb_fsm.core.rank import Outcome
from eplb_fsm.engines.reference.contract import ReferenceEngine
from eplb_fsm.engines.reference.loop import DecodeLoop
from eplb_fsm.engines.reference.model import WEIGHTS, ParallelModel, load_model
from eplb_fsm.engines.reference.ranks import RankContext
from eplb_fsm.engines.reference.requests import SlotRequests, Workload
from eplb_fsm.engines.reference.timeline import Timeline
from eplb_fsm.engines.session import Session
from eplb_fsm.fsm import RebalanceFSM
from eplb_fsm.observe.trace import NdjsonTrace
from eplb_fsm.placement.placement import Placement

Tamper = Callable[[str, int, int, ParallelModel], None]
"""`tamper(run, rank, steps, model)`, called after every step: lets a test damage a rank's maps or weights."""


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """One run, the same on all ranks. Picklable.

    Attributes:
        name: Names the run, its groups and its trace folder.
        workload: What is decoded.
        placement: Where the experts are at start.
        batch: Sequences that each rank decodes at the same time.
        steps: Forward passes.
        config: Of the rebalancer; None decodes on the fixed placement.
        weights: Folder of the model.
        trace: Folder for one NDJSON trace per rank; None for none.
        warm_up_steps: Passes before the first that counts; the same requests in every run.
        report_every: Steps between two progress messages; the same step on all ranks.
    """

    name: str
    workload: Workload
    placement: Placement
    batch: int
    steps: int
    config: RebalanceConfig | None = None
    weights: Path = WEIGHTS
    trace: Path | None = None
    warm_up_steps: int = 30
    report_every: int = 25


class Started(NamedTuple):
    """Sent by each rank when it is up."""

    pid: int


class Progress(NamedTuple):
    """Where a rank is, sent to the launcher at a low rate and outside the measured part of a step.

    Attributes:
        itl_ms: Inter-token latency: median over the steps since the last message, ms.
        balancedness: Mean over layers of mean/max rank load, over the same steps.
        epochs: Those that have ended, by outcome.
    """

    run: str
    step: int
    state: str
    itl_ms: float
    balancedness: float
    epochs: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class RankRun:
    """What one rank measured in one run. Picklable.

    Attributes:
        commit_steps: Steps at which a chunk became live.
        outcomes: Epochs by outcome; one that was under way at the end is not among them.
        last_outcomes: The last epochs, oldest first.
        moved_bytes: Bytes that this rank wrote in commits, of which `peer_bytes` came from other ranks.
        why_stopped: Empty while rebalancing was possible.
        placement: Where the experts were at the end.
    """

    timeline: Timeline
    placement: Placement
    commit_steps: list[int] = field(default_factory=list)
    outcomes: dict[str, int] = field(default_factory=dict)
    last_outcomes: tuple[Outcome, ...] = ()
    moved_bytes: int = 0
    peer_bytes: int = 0
    rounds: int = 0
    late_rounds: int = 0
    lag: int = 0
    staging_bytes: int = 0
    why_stopped: str = ""


class _Watch:
    """What is noted and sent after each step, outside the measured part."""

    def __init__(self, context: RankContext, spec: RunSpec, model: ParallelModel, tamper: Tamper | None) -> None:
        self._context, self._spec, self._model, self._tamper = context, spec, model, tamper
        self.fsm: RebalanceFSM | None = None
        self.loop: DecodeLoop | None = None
        self.commit_steps: list[int] = []
        self._placements: tuple[Placement, ...] | None = None

    def after_step(self, steps: int) -> None:
        """Take note of a commit, send progress when it is due."""
        fsm = self.fsm
        if fsm is not None and fsm.placements is not self._placements:
            if self._placements is not None:
                self.commit_steps.append(steps)
            self._placements = fsm.placements
        if self._tamper is not None:
            self._tamper(self._spec.name, self._context.rank, steps, self._model)
        if steps % self._spec.report_every == 0 or steps == self._spec.steps:
            self._context.send(self._progress(steps))

    def _progress(self, steps: int) -> Progress:
        assert self.loop is not None
        line, first = self.loop.timeline, max(0, steps - self._spec.report_every)
        times = sorted(line.itl_ns[first:steps])
        outcomes = self.fsm.health().num_outcomes if self.fsm is not None else {}
        return Progress(
            self._spec.name,
            steps,
            self.fsm.state.value if self.fsm is not None else "",
            float(times[len(times) // 2]) / 1e6,
            float(line.balancedness(first, steps).mean()),
            {name.lower(): count for name, count in outcomes.items() if count},
        )


def _warm_up(model: ParallelModel, spec: RunSpec, rank: int) -> None:
    """Decode a little on the fixed placement, so that no run pays for the first use of anything."""
    if spec.warm_up_steps:
        DecodeLoop(model, SlotRequests(spec.workload, rank, spec.batch), spec.warm_up_steps).run()
    gc.unfreeze()
    gc.collect()
    gc.freeze()  # a full collection of what lives for ever would stop the loop for tens of milliseconds
    dist.barrier()


def run_rank(context: RankContext, spec: RunSpec, tamper: Tamper | None = None) -> RankRun:
    """Make one run on this rank, in step with the others; blocks until it is done.

    Args:
        context: This rank.
        spec: The run, the same on all ranks.
        tamper: Damages something, for tests.

    Raises:
        EplbError: Something of the run cannot work, or a rank was lost.
    """
    model = ParallelModel(load_model(spec.weights), spec.placement, spec.batch, spec.workload.max_length)
    watch = _Watch(context, spec, model, tamper)
    requests = SlotRequests(spec.workload, context.rank, spec.batch)
    if spec.config is None:
        _warm_up(model, spec, context.rank)
        watch.loop = DecodeLoop(model, requests, spec.steps)
        return RankRun(timeline=watch.loop.run(watch.after_step), placement=spec.placement)
    trace = NdjsonTrace(spec.trace, context.rank) if spec.trace is not None else None
    try:
        engine = ReferenceEngine(context, model, spec.name, () if trace is None else (trace,))
        with closing(Session(engine, spec.config)) as session:
            session.start()
            fsm = session.fsm
            maps = fsm.maps()
            model.bind_maps(maps.logical_to_physical_map, maps.logical_replica_count)
            _warm_up(model, spec, context.rank)
            watch.fsm = fsm
            watch.loop = DecodeLoop(
                model, requests, spec.steps, rebalancer=fsm, state=lambda: fsm.state.value, lost_peers=fsm.lost_peers
            )
            fsm.arm()
            watch.loop.run(watch.after_step)
            return _measured(fsm, watch)
    finally:
        if trace is not None:
            trace.close()


def _measured(fsm: RebalanceFSM, watch: _Watch) -> RankRun:
    """Read the figures before close() ends the epoch that may be under way."""
    assert watch.loop is not None
    health = fsm.health()
    return RankRun(
        timeline=watch.loop.timeline,
        placement=fsm.placements[0],
        commit_steps=watch.commit_steps,
        outcomes=dict(health.num_outcomes),
        last_outcomes=fsm.outcomes,
        moved_bytes=health.moved_bytes,
        peer_bytes=health.peer_bytes,
        rounds=health.num_rounds,
        late_rounds=health.num_late_rounds,
        lag=health.lag,
        staging_bytes=health.staging_bytes,
        why_stopped=health.why_stopped,
    )
