"""Mutants of what stages, commits and holds rows; those of the protocol are in `mutants.py`."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from eplb_fsm.core.rank import PlanTerms
from eplb_fsm.errors import TransferError
from eplb_fsm.placement import plan as placement_plan
from eplb_fsm.runtime import epoch as runtime_epoch
from eplb_fsm.runtime.device import SimulatedDevice
from eplb_fsm.runtime.epoch import EpochRunner
from eplb_fsm.runtime.jobs import Jobs
from eplb_fsm.runtime.pending import Done, Pending
from eplb_fsm.runtime.staging import CommitProgram, StagingArea
from eplb_fsm.runtime.transport import Transport

Patch = pytest.MonkeyPatch


def buffer_not_free(patch: Patch) -> None:
    """A chunk is staged into a buffer that holds one that is not committed yet."""
    begin_after = placement_plan.begin_after
    patch.setattr(placement_plan, "begin_after", lambda touched, buffers: begin_after(touched, len(touched)))


def rows_in_conflict(patch: Patch) -> None:
    """A chunk is staged while one before it, not committed yet, will write the rows that it reads."""
    patch.setattr(
        placement_plan,
        "begin_after",
        lambda touched, buffers: [max(-1, idx - buffers) for idx in range(len(touched))],
    )


def ignore_commit_event(patch: Patch) -> None:
    """Rows are sent, and buffers filled again, though the device has not executed the commit enqueued before."""
    stage = Jobs.stage
    patch.setattr(Jobs, "stage", lambda self, epoch, plan, chunk, after: stage(self, epoch, plan, chunk, Done()))


def sources_in_first_placement(patch: Patch) -> None:
    """A chunk reads rows where the experts were before the plan, not where the chunks before it left them."""
    stage = Jobs._stage

    def stage_from_base(self: Jobs, epoch: int, plan: Any, chunk: Any, after: Pending, tag: int) -> Any:
        base = plan.base[chunk.bank].physical_to_logical_map
        before = plan.placements_after(chunk.idx - 1)[chunk.bank].physical_to_logical_map
        moves = np.array(chunk.moves)
        for move in moves:
            layer, _, _, expert = move
            gone = np.flatnonzero((base[layer] == expert) & (before[layer] != expert))
            if len(gone):
                move[2] = gone[0]
        return stage(self, epoch, plan, replace(chunk, moves=moves), after, tag)

    patch.setattr(Jobs, "_stage", stage_from_base)


class _Hasty:
    """A transport for which everything is complete at once, failed or not."""

    def __init__(self, inner: Transport) -> None:
        self._inner = inner

    def begin(self, *what: Any) -> Pending:
        with contextlib.suppress(TransferError):
            self._inner.begin(*what).poll()
        return Done()


def count_incomplete(patch: Patch) -> None:
    """A transfer that failed, or has not ended, counts as one that succeeded."""
    stage = StagingArea.stage

    def stage_hastily(self: StagingArea, chunk: Any, after: Pending, tag: int, transport: Any, *rest: Any) -> Any:
        return stage(self, chunk, after, tag, _Hasty(transport), *rest)  # type: ignore[arg-type]

    patch.setattr(StagingArea, "stage", stage_hastily)
    no_hash(patch)


def no_hash(patch: Patch) -> None:
    """Rows carry no hash, so a damaged one is not seen."""
    patch.setattr(StagingArea, "_verify", lambda self, at, received: None)


def commit_overtaken(patch: Patch) -> None:
    """A commit and the forward pass after it are on two streams of a device, so that the pass may overtake it."""
    commits: list[object] = []
    enqueue, execute_one = runtime_epoch.enqueue_commit, SimulatedDevice.execute_one

    def enqueue_and_note(program: CommitProgram, device: Any) -> Pending:
        event = enqueue(program, device)
        commits.append(device._queue[-1] if device._queue else None)
        return event

    def execute_other(self: SimulatedDevice) -> bool:
        if len(self._queue) > 1 and any(self._queue[0] is commit for commit in commits):
            self._queue[0], self._queue[1] = self._queue[1], self._queue[0]
        return execute_one(self)

    patch.setattr(runtime_epoch, "enqueue_commit", enqueue_and_note)
    patch.setattr(SimulatedDevice, "execute_one", execute_other)


def believe_the_plan(patch: Patch) -> None:
    """The placement that a rank believes in is that of its plan before anything is committed."""
    accept_plan = EpochRunner.accept_plan

    def accept_and_believe(self: EpochRunner, plan: Any, *further: Any) -> PlanTerms:
        self.placements = plan.banks
        return accept_plan(self, plan, *further)

    patch.setattr(EpochRunner, "accept_plan", accept_and_believe)
