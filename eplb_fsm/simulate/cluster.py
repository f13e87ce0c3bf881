"""A deterministic cluster: N ranks, one seed, every interleaving of steps, workers, devices and marks."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cache
from typing import NamedTuple, NoReturn

import torch

from eplb_fsm.config import RebalanceConfig
from eplb_fsm.core.invariants import Forward
from eplb_fsm.errors import EplbError
from eplb_fsm.fsm import RebalanceFSM
from eplb_fsm.observe.events import Observer
from eplb_fsm.placement.placement import Placement
from eplb_fsm.runtime.assembly import check_banks, check_links, plan_task
from eplb_fsm.runtime.channel import InMemoryBallotBox, InMemoryVoteChannel
from eplb_fsm.runtime.device import SimulatedDevice
from eplb_fsm.runtime.domain import Domain
from eplb_fsm.runtime.maps import BankMaps
from eplb_fsm.runtime.marks import InMemoryMarkBoard, Mark
from eplb_fsm.runtime.parts import EngineSide, Links, Parts, assemble, make_pace, make_staging
from eplb_fsm.runtime.transport import InMemoryExchange
from eplb_fsm.runtime.worker import CooperativeWorker, Mailbox
from eplb_fsm.simulate.clock import VirtualClock
from eplb_fsm.simulate.engine import Shape, SimulatedEngine, WrongForwardError
from eplb_fsm.simulate.faults import Faults, FaultyMapWriter, FaultyPlanner, FaultyTransport
from eplb_fsm.simulate.planning import RememberingMapWriter, RememberingTask

_ACTION_SECONDS = 1e-5
_VAIN_SHARE = 0.2
"""Share of the steps of ranks that would have to wait which are tried nevertheless: that is how time passes."""


class Action(IntEnum):
    """What the scheduler can let a rank do."""

    STEP = 0
    """Its forward pass and its ``step()``, as far as they get."""
    WORK = 1
    """Its worker goes on to its next wait."""
    DEVICE = 2
    """Its device executes one operation."""
    MARK = 3
    """Its watchdog shows its mark."""


class Choice(NamedTuple):
    """One decision of the scheduler."""

    rank: int
    action: Action


class FailStopError(Exception):
    """What a simulated rank raises that must not run another forward pass."""

    def __init__(self, error: EplbError) -> None:
        super().__init__(str(error))
        self.error = error


@cache
def _initial(shape: Shape, num_ranks: int) -> Placement:
    return Placement.initial(shape.num_moe_layers, shape.num_logical_experts, shape.num_physical_experts, num_ranks)


def _fail_stop(error: EplbError) -> NoReturn:
    raise FailStopError(error)


@dataclass(slots=True)
class SimulatedRank:
    """One rank of the cluster and what the scheduler can do to it.

    Attributes:
        is_alive: False after a crash, a fail-stop or :meth:`SimulatedCluster.close`: it makes no further step,
            forward pass or work.
        failure: What ended it, if it did not just crash.
        faults: What goes wrong on it.
    """

    rank: int
    fsm: RebalanceFSM
    parts: Parts
    engine: SimulatedEngine
    maps: BankMaps
    device: SimulatedDevice
    worker: CooperativeWorker
    channel: InMemoryVoteChannel
    board: InMemoryMarkBoard
    faults: Faults
    is_alive: bool = True
    is_waiting: bool = False
    failure: Exception | None = None
    num_passes: int = 0
    num_vain_polls: int = 0
    num_marks: int = 0
    skipped_steps: int = 0
    """Forward passes still to be made without a step()."""
    doubled_steps: int = 0
    """Forward passes still to be followed by one step() too many."""
    plans: dict[int, list[Callable[[SimulatedRank], None]]] = field(default_factory=dict)
    """By step: what happens to this rank before the forward pass of that step."""


class SimulatedCluster:
    """N ranks of one domain under a seeded scheduler.

    Args:
        num_ranks: Ranks.
        config: Equal for all; mode ``"async"``.
        seed: Decides every choice: one seed replays one run.
        shape: Size of the model.
        lag: Steps between posting and reading a round.
        is_lockstep: A forward pass needs every rank in it, as with an all-to-all in each layer; else each rank runs
            as far ahead as the rounds allow.
        is_one_sided: Receivers pull (RDMA reads) instead of taking what was sent.
        max_passes_ahead: Forward passes that each device may be behind its host.
        checks_forwards: Check weights and maps in every forward pass.
        has_pass_ids: The engine hands the number of the forward pass to ``step()``.
        observers: For each rank its observers.

    Attributes:
        worker_share: Share of actions that go to a worker, if it can go on.
        device_share: Share of actions that go to a device, if it has anything to execute.
        max_vain_polls: Polls in a row of one waiting rank, after which only time can help.
        mark_share: Share of actions that show a rank's mark, as its watchdog would.
        torn: A forward pass of each of two ranks that used different maps, for every pass where that happened.
    """

    def __init__(
        self,
        num_ranks: int,
        config: RebalanceConfig,
        *,
        seed: int = 0,
        shape: Shape | None = None,
        lag: int = 2,
        is_lockstep: bool = True,
        is_one_sided: bool = False,
        max_passes_ahead: int = 0,
        checks_forwards: bool = True,
        has_pass_ids: bool = False,
        observers: Callable[[int], Sequence[Observer]] = lambda rank: (),
    ) -> None:
        self.clock = VirtualClock()
        self.random = random.Random(seed)
        self.shape = shape or Shape()
        self.config = config
        self.worker_share = 0.4
        self.device_share = 0.2
        self.mark_share = 0.02
        self.max_vain_polls = 100
        self.torn: list[tuple[Forward, Forward]] = []
        self._used_maps: dict[int, list[Forward]] = {}
        self._is_lockstep = is_lockstep
        self._least_passes = 0
        self._checks_forwards = checks_forwards
        self._has_pass_ids = has_pass_ids
        self._choices = tuple(tuple(Choice(rank, action) for action in Action) for rank in range(num_ranks))
        self._box = InMemoryBallotBox(num_ranks)
        self._exchange = InMemoryExchange(num_ranks, is_one_sided=is_one_sided)
        self._marks: list[Mark | None] = [None] * num_ranks
        self._lag = lag
        self._max_passes_ahead = max_passes_ahead
        self.ranks = [self._make_rank(rank, num_ranks, observers(rank)) for rank in range(num_ranks)]
        self.living = list(self.ranks)
        """The ranks that still run."""
        for rank in self.ranks:
            rank.fsm.arm()
            self.show_mark(rank)

    def _make_rank(self, rank: int, num_ranks: int, observers: Sequence[Observer]) -> SimulatedRank:
        shape, config = self.shape, self.config
        placement = _initial(shape, num_ranks)
        engine = SimulatedEngine(rank, shape, placement)
        engine.on_forward = lambda pass_id, used_map: self._note_forward(Forward(rank, pass_id, used_map))
        domain = Domain(rank, num_ranks)
        device = SimulatedDevice(self._max_passes_ahead)
        banks = [engine.bank()]
        faults = Faults()
        maps = RememberingMapWriter([placement])
        side = EngineSide(
            banks=banks,
            placements=[placement],
            map_writer=FaultyMapWriter(maps, faults),
            device=device,
            fail_stop=_fail_stop,
            observers=observers,
            clock=self.clock,
        )
        channel = InMemoryVoteChannel(self._box)
        board = InMemoryMarkBoard(self._marks, rank)
        transport = FaultyTransport(self._exchange, rank, faults)
        check_banks(config, domain, banks, [placement])
        check_links(config, banks, transport, channel)
        task = RememberingTask.like(plan_task(config, domain, banks))
        mailbox = Mailbox()
        worker = CooperativeWorker(mailbox)
        pace = make_pace(config, side)
        parts = assemble(
            domain,
            config,
            side,
            Links(channel=channel, transport=transport, board=board, meet=lambda word, step_idx: None, lag=self._lag),
            task,
            staging=make_staging(config, task.budget, rank, side, pace),
            pace=pace,
            mailbox=mailbox,
            worker=worker,
            planner=FaultyPlanner(task, faults),
        )
        fsm = RebalanceFSM(parts)
        return SimulatedRank(rank, fsm, parts, engine, maps.maps[0], device, worker, channel, board, faults)

    # -- scheduling -----------------------------------------------------------------------------------------

    def run_steps(self, num_steps: int, max_actions: int = 10_000_000) -> None:
        """Run until every living rank has made ``num_steps`` more steps; may raise as :meth:`run_until`."""
        if self.living:
            goal = min(rank.fsm.step_idx for rank in self.living) + num_steps
            self.run_until(lambda: self._have_reached(goal), max_actions)

    def run_until(self, is_done: Callable[[], bool], max_actions: int = 10_000_000) -> None:
        """Take random actions until ``is_done``, or until no rank runs any more.

        Raises:
            TimeoutError: After ``max_actions``; says where each rank stands.
        """
        for _ in range(max_actions):
            if is_done() or not self.living:
                return
            self.act()
        where = [(rank.rank, rank.fsm.state.value, rank.fsm.step_idx, rank.is_waiting) for rank in self.ranks]
        raise TimeoutError(f"not done after {max_actions} actions: {where}")

    def _have_reached(self, step_idx: int) -> bool:
        return all(rank.fsm.step_idx >= step_idx and not rank.is_waiting for rank in self.living)

    def act(self) -> None:
        """Let one randomly chosen rank take one randomly chosen action."""
        self.take(self.choose())

    def choose(self) -> Choice:
        """Choose a living rank and an action, both at random; one that could only wait is rarely chosen."""
        draw = self.random.random
        living = self.living
        position = int(draw() * len(living))
        rank, choice = living[position], draw()
        if choice < self.worker_share:
            if not rank.worker.is_idle:
                return self._choices[rank.rank][Action.WORK]
        elif choice < self.worker_share + self.device_share:
            if rank.device.num_pending:
                return self._choices[rank.rank][Action.DEVICE]
        elif choice > 1 - self.mark_share:
            return self._choices[rank.rank][Action.MARK]
        if self._would_wait(rank) and draw() > _VAIN_SHARE:
            others = living[position + 1 :] + living[:position]
            rank = next((other for other in others if not self._would_wait(other)), rank)
        return self._choices[rank.rank][Action.STEP]

    def _would_wait(self, rank: SimulatedRank) -> bool:
        """Whether a step of a rank has to wait, for a round that is late or for others' passes."""
        return rank.is_waiting or not self._may_pass(rank)

    def take(self, choice: Choice) -> Action | None:
        """Let a living rank take an action; where its worker or device has nothing to do, it makes a step instead.

        Returns:
            What it did; None where it could only wait.
        """
        rank, action = self.ranks[choice.rank], choice.action
        if action is Action.STEP:
            return action if self.step(rank) else None
        if action is Action.WORK and not rank.faults.is_worker_stuck and rank.worker.advance():
            return action
        if action is Action.DEVICE and self._execute_one(rank):
            return action
        if action is Action.MARK:
            self.show_mark(rank)
            return action
        return Action.STEP if self.step(rank) else None

    def at(self, rank: int, step_idx: int, happens: Callable[[SimulatedRank], None]) -> None:
        """Let something happen to one rank just before the forward pass of one of its steps."""
        self.ranks[rank].plans.setdefault(step_idx, []).append(happens)

    def step(self, rank: SimulatedRank) -> bool:
        """Let one rank try to make a step: run its forward pass, then ``step()``, as far as it gets.

        Returns:
            False if it could only wait.
        """
        self.clock.advance(_ACTION_SECONDS)
        was_waiting = rank.is_waiting
        if not was_waiting:
            if not self._may_pass(rank):
                return False
            for happens in rank.plans.pop(rank.fsm.step_idx + 1, ()):
                happens(rank)
            if rank.is_alive:
                self._forward(rank)
            if not rank.is_alive:
                return True
        if rank.skipped_steps and not rank.is_waiting:
            rank.skipped_steps -= 1
            return True
        self._poll(rank)
        if rank.doubled_steps and not rank.is_waiting:
            rank.doubled_steps -= 1
            self._poll(rank)
        return not (was_waiting and rank.is_waiting)

    def _poll(self, rank: SimulatedRank) -> None:
        pass_id = rank.num_passes if self._has_pass_ids else None
        try:
            rank.is_waiting = rank.fsm.poll_step(pass_id, self.clock()) is not None
        except FailStopError as stop:
            self._fail(rank, stop.error)
            return
        rank.num_vain_polls = rank.num_vain_polls + 1 if rank.is_waiting else 0
        if rank.num_vain_polls > self.max_vain_polls:
            rank.num_vain_polls = 0
            self.clock.advance(self.config.vote_timeout_s / 3)

    def crash(self, rank: int) -> None:
        """End a rank at once: no step, no work, no vote, no mark from here on."""
        self.ranks[rank].is_alive = False
        self.living = [other for other in self.ranks if other.is_alive]

    def close(self, rank: int) -> None:
        """Close a rank that serves no more; its watchdog shows a last mark."""
        self.ranks[rank].fsm.close()
        self.show_mark(self.ranks[rank])
        self.crash(rank)

    def show_mark(self, rank: SimulatedRank) -> None:
        """Show a rank's mark, as a turn of its watchdog does."""
        rank.num_marks += 1
        step_idx, is_suspended, journal = rank.parts.show()
        rank.board.publish(Mark(rank.num_marks, step_idx, is_suspended, journal))

    def settle(self) -> None:
        """Let all devices catch up."""
        for rank in self.living:
            while self._execute_one(rank):
                pass

    def _fail(self, rank: SimulatedRank, error: Exception) -> None:
        rank.failure = error
        self.crash(rank.rank)

    def _execute_one(self, rank: SimulatedRank) -> bool:
        """Run one operation of a device; one that raises ends its rank, as an error of a real device does."""
        try:
            return rank.device.execute_one()
        except WrongForwardError:
            raise
        except Exception as error:
            self._fail(rank, error)
            return False

    def _may_pass(self, rank: SimulatedRank) -> bool:
        """In lockstep a pass needs every rank in it; a dead one blocks the others for ever."""
        if not self._is_lockstep:
            return True
        return rank.num_passes <= self._least_passes

    def _forward(self, rank: SimulatedRank) -> None:
        rank.num_passes += 1
        self._least_passes = min([other.num_passes for other in self.ranks])
        if self._checks_forwards:
            pass_id = rank.num_passes
            rank.device.enqueue(lambda: rank.engine.forward(pass_id, rank.maps))
        while rank.device.num_pending > 0 and self._is_too_far_behind(rank):
            if not self._execute_one(rank):
                return

    def _is_too_far_behind(self, rank: SimulatedRank) -> bool:
        """A host waits once it is ``max_passes_ahead`` passes ahead of its device."""
        return rank.engine.num_forwards < rank.num_passes - self._max_passes_ahead

    def feed(self, rank: SimulatedRank, topk_ids: torch.Tensor) -> None:
        """Count tokens of every layer on one rank, int64 ``(num_tokens, top_k)``."""
        for layer in range(self.shape.num_moe_layers):
            rank.fsm.record(layer, topk_ids)

    # -- what must hold -------------------------------------------------------------------------------------

    def _note_forward(self, forward: Forward) -> None:
        """Compare the map with the one that another rank used in the same pass (``NoTornForward``)."""
        same_pass = self._used_maps.setdefault(forward.pass_idx, [])
        if same_pass and same_pass[0].used_map != forward.used_map:
            self.torn.append((same_pass[0], forward))
        same_pass.append(forward)
        if len(same_pass) >= len(self.ranks):
            del self._used_maps[forward.pass_idx]

    def torn_passes(self) -> list[int]:
        """Return the forward passes in which two ranks used different maps (``NoTornForward``)."""
        return sorted({forward.pass_idx for forward, _ in self.torn})
