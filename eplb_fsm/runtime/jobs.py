"""The two jobs of an epoch: make the plan, and stage a chunk."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from eplb_fsm.config import RebalanceConfig
from eplb_fsm.core.reasons import AbortReason
from eplb_fsm.observe.gains import Seen
from eplb_fsm.placement.digest import Int64Array
from eplb_fsm.placement.estimate import LoadEstimator
from eplb_fsm.placement.placement import Placement
from eplb_fsm.placement.plan import Chunk, Plan
from eplb_fsm.placement.task import EncodedPlan, PlanRequest, PlanTask
from eplb_fsm.runtime.costs import Measured, costs_of
from eplb_fsm.runtime.domain import Domain
from eplb_fsm.runtime.pending import Pending
from eplb_fsm.runtime.planner import Planner
from eplb_fsm.runtime.staging import CommitProgram, IntegrityError, StagingArea
from eplb_fsm.runtime.sums import SumVector
from eplb_fsm.runtime.tables import Tables
from eplb_fsm.runtime.transport import Transport
from eplb_fsm.runtime.worker import (
    ChunkStaged,
    Job,
    LoadCollected,
    Mailbox,
    Pace,
    PlanReady,
    SlotDamaged,
    WorkError,
)

_PLANNING_RANK = 0
"""The lowest rank plans for all (``plan_source="lowest_rank"``)."""


class PlanInput(NamedTuple):
    """What a rank brings to a plan, taken at the agreed step at which its epoch starts.

    Attributes:
        snapshots: Its load of each bank, int64 ``(num_moe_layers, num_logical_experts)``, on the device; not read
            before ``taken``.
        taken: The event of the snapshot.
        current: The live placement of each bank.
        measured: What it knows of the cost of moving.
        speed: How fast it is.
        trust: Share of predicted gains that came true lately; the same on all ranks.
        unmoved: What the last committed epoch began with; None where there is none, or its gain is measured.
    """

    snapshots: Sequence[torch.Tensor]
    taken: Pending
    current: tuple[Placement, ...]
    measured: Measured
    speed: float
    trust: float
    unmoved: tuple[Placement, ...] | None


@dataclass(slots=True)
class Jobs:
    """Makes the jobs of one rank, and holds what they work with.

    Attributes:
        planner: None on ranks that receive their plan.
        estimator: Remembers the load of earlier epochs, on every rank alike; worker thread only.
    """

    domain: Domain
    config: RebalanceConfig
    task: PlanTask
    transport: Transport
    staging: StagingArea
    tables: Tables
    planner: Planner | None
    pace: Pace
    mailbox: Mailbox
    estimator: LoadEstimator
    num_exchanges: int = 0

    def make_plan(self, epoch: int, brought: PlanInput) -> Job:
        """Return the job that sums the load of all ranks and ends with a validated plan on each."""
        body = self._make_plan(epoch, brought)
        return Job(epoch, AbortReason.LOAD_ERROR, body, self._wait_limit_s)

    def stage(self, epoch: int, plan: Plan, chunk: Chunk, after: Pending) -> Job:
        """Return the job that stages one chunk once ``after``, the event of the last commit, is done."""
        self.num_exchanges += 1
        body = self._stage(epoch, plan, chunk, after, self.num_exchanges)
        return Job(epoch, AbortReason.TRANSFER_ERROR, body, self._wait_limit_s)

    def verify(self, epoch: int, program: CommitProgram, committed: Pending) -> Job:
        """Return the job that reads committed rows back (``integrity="slot"``)."""
        return Job(epoch, AbortReason.WORKER_ERROR, self._verify(program, committed), self._wait_limit_s)

    @property
    def _vector(self) -> SumVector:
        num_nodes = self.task.topology.num_nodes if self.tables.is_weighted else 1
        return SumVector(self.domain.rank, self.domain.world_size, num_nodes)

    @property
    def _wait_limit_s(self) -> float:
        return self.config.transfer_timeout_s + self.config.plan_timeout_s

    def _make_plan(self, epoch: int, brought: PlanInput) -> Iterator[Pending]:
        snapshots, taken, current, measured, speed, trust, unmoved = brought
        yield taken
        total = self._vector.pack(snapshots, measured, speed)
        yield self.transport.all_reduce_sum(total)
        self.mailbox.put(LoadCollected(epoch))
        yield self.pace.breathe()
        sums = self._vector.unpack(total, current)
        seen = self._see(sums.of_nodes, current, unmoved)
        loads = self.estimator.update(sums.window)
        costs = costs_of(sums.measured, self.domain.world_size, self.config, trust)
        request = PlanRequest(loads, current, costs, sums.speeds)
        if self.config.plan_source == "every_rank":
            encoded = yield from self._compute(request)
        else:
            encoded = yield from self._receive_plan(request)
        yield self.pace.breathe()
        plan = self.task.decode(encoded, current)
        self.tables.follow(loads, self.task.topology_with(sums.speeds).counted_speeds, sums.of_nodes)
        self.mailbox.put(PlanReady(epoch, plan, self.tables.prepare_shares(current), seen))

    def _see(
        self, window: Sequence[Int64Array], live: tuple[Placement, ...], unmoved: tuple[Placement, ...] | None
    ) -> Seen | None:
        if unmoved is None or not any(load.any() for load in window):
            return None
        return Seen(self.tables.balancedness(window, live), self.tables.balancedness(window, unmoved))

    def _compute(self, request: PlanRequest) -> Generator[Pending, None, EncodedPlan]:
        assert self.planner is not None
        yield self.planner.submit(request)
        return self.planner.result()

    def _receive_plan(self, request: PlanRequest) -> Generator[Pending, None, EncodedPlan]:
        """One rank computes; its failure is broadcast like a plan, so that nobody waits for it in vain."""
        is_planning = self.domain.rank == _PLANNING_RANK
        failure: WorkError | None = None
        encoded: EncodedPlan = np.zeros(0, dtype=np.int64)
        if is_planning:
            try:
                encoded = yield from self._compute(request)
            except WorkError as error:
                failure = error
            except Exception as error:  # whatever it is, the others are waiting for a plan or a failure
                failure = WorkError(AbortReason.POLICY_ERROR, f"{type(error).__name__}: {error}")
            yield self.pace.breathe()
        length = torch.tensor([-1 if failure else encoded.size], dtype=torch.int64)
        yield self.transport.broadcast(length, _PLANNING_RANK)
        if failure:
            raise failure
        if length.item() < 0:
            raise WorkError(AbortReason.POLICY_ERROR, f"the policy failed on rank {_PLANNING_RANK}; see its log")
        words = torch.from_numpy(encoded.copy()) if is_planning else torch.empty(int(length), dtype=torch.int64)
        yield self.transport.broadcast(words, _PLANNING_RANK)
        return words.numpy()

    def _stage(self, epoch: int, plan: Plan, chunk: Chunk, after: Pending, tag: int) -> Iterator[Pending]:
        yield self.pace.wait_for(chunk.bytes_from(self.domain.rank))
        placements = plan.placements_after(chunk.idx)
        program = yield from self.staging.stage(chunk, after, tag, self.transport, self.tables, placements)
        self.mailbox.put(ChunkStaged(epoch, program))

    def _verify(self, program: CommitProgram, committed: Pending) -> Iterator[Pending]:
        yield committed
        try:
            self.staging.verify_live(program)
        except IntegrityError as error:
            self.mailbox.put(SlotDamaged(str(error)))
