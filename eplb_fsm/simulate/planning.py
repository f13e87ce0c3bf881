"""Plans of simulated ranks, each made and checked once: many runs ask the same question of pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from functools import lru_cache

import numpy as np

from eplb_fsm.placement.digest import Int64Array
from eplb_fsm.placement.placement import Placement
from eplb_fsm.placement.plan import Plan
from eplb_fsm.placement.task import EncodedPlan, PlanRequest, PlanTask, Speeds
from eplb_fsm.placement.worth import Costs
from eplb_fsm.runtime.maps import TensorMapWriter, table_rows

_NUM_KEPT = 4096


class RememberingTask(PlanTask):
    """A task that answers from memory what it was asked before, by this rank or another one, in this run or another.

    Policies of simulated runs must be pure: the same load and placements, the same plan.
    """

    __slots__ = ()

    @classmethod
    def like(cls, task: PlanTask) -> RememberingTask:
        """Return the task with a memory."""
        return cls(**{field.name: getattr(task, field.name) for field in fields(task)})

    def plan(self, request: PlanRequest) -> EncodedPlan:
        """Compute and encode a plan."""
        loads = tuple(load.tobytes() for load in request.loads)
        return _plan(self, loads, tuple(request.current), request.costs, request.speeds)

    def decode(self, encoded: EncodedPlan, current: tuple[Placement, ...]) -> Plan:
        """Read and check a plan."""
        return _decode(self, encoded.tobytes(), current)


class _SharedPlan(Plan):
    """A plan whose placements are made once, too, so that what derives from them is derived once."""

    def placements_after(self, idx: int) -> tuple[Placement, ...]:
        """Placement of each bank once chunk `idx` is committed."""
        return _placements_after(self, idx)

    def made_after(self, idx: int) -> tuple[Placement, ...]:
        """Make these placements."""
        return super().placements_after(idx)


class RememberingMapWriter(TensorMapWriter):
    """A map writer that works the rows out once for each placement and its layers."""

    def _rows(self, bank: int, placement: Placement, layers: Sequence[int]) -> tuple[Int64Array, ...]:
        return _map_rows(placement, self._widths[bank], tuple(layers))


@lru_cache(_NUM_KEPT)
def _map_rows(placement: Placement, width: int, layers: tuple[int, ...]) -> tuple[Int64Array, ...]:
    return table_rows(placement, width, layers)


@lru_cache(_NUM_KEPT)
def _plan(
    task: PlanTask, loads: tuple[bytes, ...], current: tuple[Placement, ...], costs: Costs | None, speeds: Speeds
) -> EncodedPlan:
    arrays = [
        np.frombuffer(load, np.int64).reshape(placement.num_moe_layers, -1)
        for load, placement in zip(loads, current, strict=True)
    ]
    return PlanTask.plan(task, PlanRequest(arrays, current, costs, speeds))


@lru_cache(_NUM_KEPT)
def _decode(task: PlanTask, encoded: bytes, current: tuple[Placement, ...]) -> Plan:
    plan = PlanTask.decode(task, np.frombuffer(encoded, np.int64), current)
    return _SharedPlan(**{field.name: getattr(plan, field.name) for field in fields(plan)})


@lru_cache(_NUM_KEPT)
def _placements_after(plan: _SharedPlan, idx: int) -> tuple[Placement, ...]:
    return plan.made_after(idx)


def forget_plans() -> None:
    """Forget all answers: for whoever changes what plans are made of."""
    for remembered in (_map_rows, _plan, _decode, _placements_after):
        remembered.cache_clear()
