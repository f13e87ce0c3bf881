"""Everything a RebalanceFSM works with, and how it is put together."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from eplb_fsm.config import RebalanceConfig
from eplb_fsm.core.resolution import Journal
from eplb_fsm.errors import ConfigError, UsageError
from eplb_fsm.load.recorder import LoadRecorder, LoadSource
from eplb_fsm.observe.events import Observer
from eplb_fsm.observe.health import Peer
from eplb_fsm.placement.estimate import LoadEstimator
from eplb_fsm.placement.placement import Placement
from eplb_fsm.placement.shapes import Budget
from eplb_fsm.placement.task import PlanTask
from eplb_fsm.runtime.bank import Bank
from eplb_fsm.runtime.channel import VoteChannel
from eplb_fsm.runtime.clock import Clock, monotonic
from eplb_fsm.runtime.device import CpuDevice, DeviceOps, operations_on
from eplb_fsm.runtime.domain import Domain
from eplb_fsm.runtime.epoch import EpochRunner
from eplb_fsm.runtime.failstop import FailStopAction, exit_process
from eplb_fsm.runtime.gauge import StepGauge
from eplb_fsm.runtime.jobs import Jobs
from eplb_fsm.runtime.maps import BankMaps, MapWriter, TensorMapWriter
from eplb_fsm.runtime.marks import MarkBoard
from eplb_fsm.runtime.planner import Planner
from eplb_fsm.runtime.rounds import Rounds
from eplb_fsm.runtime.staging import StagingArea
from eplb_fsm.runtime.tables import Tables
from eplb_fsm.runtime.transport import Transport
from eplb_fsm.runtime.watchdog import Watchdog
from eplb_fsm.runtime.worker import Mailbox, Pace, Worker

logger = logging.getLogger(__name__)

_NAP_S = 0.001
"""Deadlines count steps, so a step of a standing loop must not be much shorter than one of a loop that decodes."""


@dataclass(slots=True, kw_only=True)
class EngineSide:
    """What the engine brings: its expert tensors, its stream, its tables, and how it is ended.

    Attributes:
        banks: The expert tensors of each model.
        placements: What each bank's slots hold now.
        load_source: Counts tokens; None: a :class:`LoadRecorder` on the device of the first bank.
        map_writer: Writes the engine's tables; None: a :class:`TensorMapWriter`, read with ``fsm.maps()``.
        device: The engine's stream; None: the host, or the current stream of the accelerator that the first bank is on.
        fail_stop: Ends this rank's serving; the default ends the process.
        observers: Take every event, on the decode thread.
        clock: Seconds.
    """

    banks: Sequence[Bank]
    placements: Sequence[Placement]
    load_source: LoadSource | None = None
    map_writer: MapWriter | None = None
    device: DeviceOps | None = None
    fail_stop: FailStopAction = exit_process
    observers: Sequence[Observer] = ()
    clock: Clock = monotonic

    def stream(self) -> DeviceOps:
        """Return :attr:`device`; made if need be, once the banks have been checked.

        Raises:
            ConfigError: The engine brought one of the host for experts that are elsewhere.
        """
        where = self.banks[0].device
        if self.device is None:
            self.device = operations_on(where)
        if where.type != "cpu" and isinstance(self.device, CpuDevice):
            raise ConfigError(f"device = CpuDevice() and the experts are on {where}: leave `device` out")
        return self.device


@dataclass(slots=True, kw_only=True)
class Links:
    """How the ranks reach each other.

    Attributes:
        channel: Carries votes.
        transport: Carries load, plans and rows.
        board: Shows marks, for resolving a lost decision; not shared with another thread.
        meet: Blocks until all ranks have called it with the same word; UsageError if their step indices differ.
        lag: Agreed steps between posting and reading a round, at start.
    """

    channel: VoteChannel
    transport: Transport
    board: MarkBoard
    meet: Callable[[str, int], None]
    lag: int


@dataclass(slots=True, kw_only=True)
class Parts:
    """What one rank's machine is made of.

    Attributes:
        lag: Agreed steps between posting and reading a round, at start.
        meet: As in :class:`Links`.
        watchdog: None where liveness is watched otherwise (simulation).
        own_maps: The library's own map writer; None where the engine brought one.
        closers: Called by :meth:`close`, in order.
    """

    domain: Domain
    config: RebalanceConfig
    lag: int
    banks: Sequence[Bank]
    transport: Transport
    runner: EpochRunner
    rounds: Rounds
    load_source: LoadSource
    mailbox: Mailbox
    gauge: StepGauge
    clock: Clock
    meet: Callable[[str, int], None]
    fail_stop: FailStopAction
    observers: tuple[Observer, ...] = ()
    watchdog: Watchdog | None = None
    own_maps: TensorMapWriter | None = None
    staging_bytes: int = 0
    closers: list[Callable[[], None]] = field(default_factory=list)

    is_suspended: bool = True
    """The steps may stand still: before arm() and while frozen."""
    leave: Callable[[BaseException], None] = lambda error: None
    """Tells ranks that wait for this one in :attr:`meet` that it will not come."""
    steps: Callable[[], int] = lambda: 0
    """Where the decode loop is; any thread."""

    def show(self) -> tuple[int, bool, Journal]:
        """What the watchdog shows of this rank; any thread."""
        return self.steps(), self.is_suspended, self.rounds.journal

    def maps(self, bank: int) -> BankMaps:
        """Return the library's own tables of a bank."""
        if self.own_maps is None:
            raise UsageError("the engine brought a map writer of its own; read the maps from it")
        return self.own_maps.maps[bank]

    def peers(self) -> tuple[Peer, ...]:
        """What the watchdog knows of the others."""
        reports = self.watchdog.peers() if self.watchdog else []
        return tuple(Peer(report.rank, report.silent_s, report.stuck_s) for report in reports)

    def missing_ranks(self, round_idx: int) -> tuple[int, ...]:
        """The ranks that, as far as the watchdog has seen, have not posted a vote in this round."""
        reports = self.watchdog.peers() if self.watchdog else []
        return tuple(report.rank for report in reports if report.posted_round < round_idx)

    def watch_closely(self) -> None:
        """Have the watchdog name ranks without signs of life within the vote timeout: the votes stopped coming."""
        if self.watchdog is not None:
            self.watchdog.watch_closely(max(self.config.vote_timeout_s / 2, 4 * self.watchdog.interval_s))

    def watch_peers(self, within_s: float) -> tuple[int, ...]:
        """Watch the marks for a while; return the ranks whose mark stands still, none if the store is lost."""
        if self.watchdog is None:
            return ()
        silence_s = min(within_s, max(within_s / 2, 4 * self.watchdog.interval_s))
        deadline = time.monotonic() + within_s
        while not (silent := self.watchdog.silent_ranks(silence_s)) and time.monotonic() < deadline:
            time.sleep(self.watchdog.interval_s / 2)
        if not silent and self.watchdog.is_board_lost:
            logger.error("rank %d: the store is lost too, so lost ranks cannot be named", self.domain.rank)
        return tuple(silent)

    def nap(self) -> None:
        """Let the worker and the other ranks get on while the decode loop stands still."""
        time.sleep(_NAP_S)

    def close(self) -> None:
        """End threads, processes and groups; idempotent."""
        closers, self.closers = self.closers, []
        for close in closers:
            try:
                close()
            except Exception:  # whatever it is, the others are released too
                logger.exception("rank %d: a part did not close", self.domain.rank)


def assemble(
    domain: Domain,
    config: RebalanceConfig,
    engine: EngineSide,
    links: Links,
    task: PlanTask,
    *,
    staging: StagingArea,
    pace: Pace,
    mailbox: Mailbox,
    worker: Worker,
    planner: Planner | None,
) -> Parts:
    """Put the parts of one rank together; the real engine and the simulation both come through here."""
    is_weighted = config.replica_split == "weighted"
    load_source, own_maps = _fill_engine_side(engine, is_weighted=is_weighted)
    map_writer = engine.map_writer or own_maps
    assert map_writer is not None
    jobs = Jobs(
        domain=domain,
        config=config,
        task=task,
        transport=links.transport,
        staging=staging,
        tables=Tables(map_writer, is_weighted=is_weighted, node=domain.rank // task.topology.ranks_per_node),
        planner=planner,
        pace=pace,
        mailbox=mailbox,
        estimator=LoadEstimator(config.load_decay),
    )
    runner = EpochRunner(jobs, worker, engine.stream(), load_source, engine.placements)
    # In sync mode ranks come to a round when their part of the work is done, so the phase's own limits add up.
    phase_limit_s = config.plan_timeout_s + config.transfer_timeout_s if config.mode == "sync" else 0.0
    rounds = Rounds(
        links.channel,
        links.board,
        wait_limit_s=config.vote_timeout_s + phase_limit_s,
        resolve_limit_s=config.resolve_timeout_s,
    )
    return Parts(
        domain=domain,
        config=config,
        lag=links.lag,
        banks=engine.banks,
        transport=links.transport,
        runner=runner,
        rounds=rounds,
        load_source=load_source,
        mailbox=mailbox,
        gauge=StepGauge(pace, config.max_slowdown if _is_paced(config) else 0.0),
        clock=engine.clock,
        meet=links.meet,
        fail_stop=engine.fail_stop,
        observers=tuple(engine.observers),
        own_maps=own_maps,
        staging_bytes=staging.num_bytes,
        closers=[
            runner.close,
            links.channel.close,
            links.transport.close,
            worker.join,
            engine.stream().close,
            staging.release,  # here, and not when a collector comes by: an engine may connect anew at once
        ],
    )


def _fill_engine_side(engine: EngineSide, *, is_weighted: bool) -> tuple[LoadSource, TensorMapWriter | None]:
    """Make what the engine did not bring; tables only then, since they take memory on its device."""
    device = engine.banks[0].device
    shapes = [(bank.num_moe_layers, bank.num_logical_experts) for bank in engine.banks]
    load_source = engine.load_source or LoadRecorder(shapes, device=device)
    if engine.map_writer:
        return load_source, None
    return load_source, TensorMapWriter(engine.placements, device, is_weighted=is_weighted)


def _is_paced(config: RebalanceConfig) -> bool:
    """A rebalance that blocks the loop anyway is not slowed down on top of that."""
    return config.mode == "async"


def make_pace(config: RebalanceConfig, engine: EngineSide) -> Pace:
    """Return the pace of one rank's worker."""
    return Pace(config.max_transfer_mb_s if _is_paced(config) else 0.0, engine.clock)


def make_staging(config: RebalanceConfig, budget: Budget, rank: int, engine: EngineSide, pace: Pace) -> StagingArea:
    """Allocate the staging buffers of one rank.

    Raises:
        ConfigError: If one expert does not fit ``commit_bytes``.
    """
    return StagingArea(
        engine.banks,
        rank,
        num_buffers=config.staging_buffers,
        commit_bytes=budget.commit_bytes,
        integrity=config.integrity,
        device=engine.stream(),
        between_pieces=pace.let_step_end,
    )
