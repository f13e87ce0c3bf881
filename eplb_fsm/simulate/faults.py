"""Faults of one simulated rank: parts that work like the real ones until they are told to fail."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from eplb_fsm.core.reasons import AbortReason
from eplb_fsm.errors import TransferError, TransportLost
from eplb_fsm.placement.placement import Placement
from eplb_fsm.placement.task import EncodedPlan, PlanRequest, PlanTask
from eplb_fsm.placement.validate import Float64Array
from eplb_fsm.runtime.maps import MapWriter
from eplb_fsm.runtime.pending import Pending
from eplb_fsm.runtime.planner import InlinePlanner
from eplb_fsm.runtime.transport import InMemoryExchange, InMemoryTransport, Parcel
from eplb_fsm.runtime.worker import WorkError


@dataclass(slots=True)
class Faults:
    """What goes wrong on one rank; set and taken back by the scheduler at any time.

    Attributes:
        is_worker_stuck: The worker makes no progress.
        policy_error: The policy raises this, if not empty.
        load_change: Added to the first expert's load before this rank plans, so that its plan differs.
        failing: Operations of the transport that raise: ``"begin"``, ``"all_reduce_sum"``, ``"broadcast"``.
        is_transport_lost: They raise that the whole transfer group is gone.
        is_planner_stuck: The policy has not returned yet.
        damages_parcels: One byte of every received parcel is flipped.
        map_error: Operations of the map writer that raise: ``"prepare"``, ``"write"``.
    """

    is_worker_stuck: bool = False
    policy_error: str = ""
    load_change: int = 0
    failing: list[str] = field(default_factory=list)
    is_transport_lost: bool = False
    is_planner_stuck: bool = False
    damages_parcels: bool = False
    map_error: list[str] = field(default_factory=list)


class FaultyTransport(InMemoryTransport):
    """An in-memory transport that fails when told to."""

    def __init__(self, exchange: InMemoryExchange, rank: int, faults: Faults) -> None:
        super().__init__(exchange, rank)
        self._faults = faults

    def begin(self, sends: Sequence[Parcel], receives: Sequence[Parcel], tag: int) -> Pending:
        """Exchange parcels, or raise, or damage what arrives."""
        self._check("begin")
        pending = super().begin(sends, receives, tag)
        return _Damaging(pending, receives) if self._faults.damages_parcels else pending

    def all_reduce_sum(self, tensor: torch.Tensor) -> Pending:
        """Sum, or raise."""
        self._check("all_reduce_sum")
        return super().all_reduce_sum(tensor)

    def broadcast(self, tensor: torch.Tensor, root: int) -> Pending:
        """Broadcast, or raise."""
        self._check("broadcast")
        return super().broadcast(tensor, root)

    def _check(self, operation: str) -> None:
        if operation not in self._faults.failing:
            return
        if self._faults.is_transport_lost:
            raise TransportLost(f"the simulated transfer group is gone in {operation}")
        raise TransferError(f"the simulated transport fails in {operation}")


class _Damaging:
    def __init__(self, inner: Pending, receives: Sequence[Parcel]) -> None:
        self._inner = inner
        self._receives = receives

    def poll(self) -> bool:
        if not self._inner.poll():
            return False
        for _, buffer in self._receives:
            buffer[0] ^= 1
        return True

    def wait(self, timeout_s: float) -> None:
        self._inner.wait(timeout_s)


@dataclass(frozen=True, slots=True)
class _Planned:
    """Done as soon as the policy returns, which a fault can put off for ever."""

    faults: Faults

    def poll(self) -> bool:
        return not self.faults.is_planner_stuck

    def wait(self, timeout_s: float) -> None:
        """Return at once: the scheduler decides when the policy returns."""


class FaultyPlanner:
    """A planner on the worker's own thread that fails, or does not return, when told to."""

    def __init__(self, task: PlanTask, faults: Faults) -> None:
        self._planner = InlinePlanner(task)
        self._faults = faults

    def submit(self, request: PlanRequest) -> Pending:
        """Plan, perhaps from another load."""
        if self._faults.load_change:
            loads = [load.copy() for load in request.loads]
            loads[0][:, 0] += self._faults.load_change
            request = request._replace(loads=loads)
        self._planner.submit(request)
        return _Planned(self._faults)

    def result(self) -> EncodedPlan:
        """Return the plan, or raise."""
        if self._faults.policy_error:
            raise WorkError(AbortReason.POLICY_ERROR, self._faults.policy_error)
        return self._planner.result()

    def close(self) -> None:
        """Nothing to release."""


class FaultyMapWriter:
    """A map writer that fails when told to."""

    def __init__(self, inner: MapWriter, faults: Faults) -> None:
        self._inner = inner
        self._faults = faults

    def prepare(
        self, bank: int, layers: Sequence[int], placement: Placement, shares: Float64Array | None = None
    ) -> object:
        """Compute the rows, or raise."""
        self._check("prepare")
        return self._inner.prepare(bank, layers, placement, shares)

    def write(self, prepared: object) -> None:
        """Write the rows, or raise."""
        self._check("write")
        self._inner.write(prepared)

    def _check(self, operation: str) -> None:
        if operation in self._faults.map_error:
            raise RuntimeError(f"the simulated map writer fails in {operation}")
