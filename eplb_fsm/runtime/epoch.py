"""Carries out on one rank what the rounds decide: jobs, staged programs, commits, the live placements."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from eplb_fsm.core.rank import PlanTerms
from eplb_fsm.errors import ConfigError
from eplb_fsm.load.recorder import LoadSource
from eplb_fsm.observe.gains import GainWatch, Seen
from eplb_fsm.placement.placement import Placement
from eplb_fsm.placement.plan import Plan, live_digest
from eplb_fsm.placement.topology import check_speed
from eplb_fsm.runtime.costs import Measured
from eplb_fsm.runtime.device import DeviceOps
from eplb_fsm.runtime.jobs import Jobs, PlanInput
from eplb_fsm.runtime.pending import Done, Pending
from eplb_fsm.runtime.staging import CommitProgram, enqueue_commit
from eplb_fsm.runtime.worker import Job, Worker


class EpochRunner:
    """The epoch under way on one rank; decode thread only.

    Attributes:
        placements: The live placement of each bank: what the maps say once the device has caught up.
        live_digest: Their digest.
        moved_bytes: Bytes that this rank has committed since the start; ``peer_bytes`` of them came from others.
        gains: What committed plans promised, and what came of it.
    """

    def __init__(
        self,
        jobs: Jobs,
        worker: Worker,
        device: DeviceOps,
        load_source: LoadSource,
        placements: Sequence[Placement],
    ) -> None:
        self._jobs = jobs
        self._worker = worker
        self._device = device
        self._load = load_source
        self.placements = tuple(placements)
        self.live_digest = live_digest(self.placements)
        self.gains = GainWatch(is_telling=jobs.domain.rank == 0)
        self._speed = 1.0
        self.plan: Plan | None = None
        self.moved_bytes = 0
        self.peer_bytes = 0
        self._num_open_jobs = 0
        self._queued: list[Job] = []
        self._epoch = 0
        self._programs: dict[int, CommitProgram] = {}
        self._last_commit: Pending = Done()
        self._num_begun = 0
        self._num_committed = 0

    @property
    def is_worker_alive(self) -> bool:
        """False when submitted jobs will never end."""
        return self._worker.is_alive

    def run_inline(self) -> None:
        """Let the worker run on this thread if that is its way (sync mode)."""
        self.end_step()
        self._worker.run_inline()

    def begin_step(self) -> None:
        """Have the worker pause: while it runs, it takes core and interpreter from the step."""
        self._jobs.pace.is_in_step = True

    def end_step(self) -> None:
        """Have the worker go on, with the jobs that the step has made."""
        self._jobs.pace.is_in_step = False
        for job in self._queued:
            self._worker.submit(job)
        self._queued.clear()

    def rotate_window(self) -> None:
        """Close a bucket of the load window, in stream order."""
        self._device.enqueue(self._load.rotate)

    def start(self, epoch: int, measured: Measured) -> None:
        """Take the load window and begin making a plan in the background, with what is known of the cost of moving."""
        self._epoch = epoch
        self._device.enqueue(self._load.snapshot)
        taken = self._device.record_event()
        brought = PlanInput(
            self._load.snapshots, taken, self.placements, measured, self._speed, self.gains.trust, self.gains.unmoved
        )
        self._submit(self._jobs.make_plan(epoch, brought))

    def set_speed(self, speed: float) -> None:
        """Give this rank a speed for the next plan.

        Raises:
            ConfigError: It is out of range, or the policy treats all ranks alike.
        """
        task = self._jobs.task
        if not task.minds_speeds:
            raise ConfigError(
                f"policy {task.policy!r} treats all ranks alike, so the speed of a rank changes nothing; "
                "choose policy 'movement_aware'"
            )
        self._speed = check_speed(speed)

    def write_tables(self, prepared: Sequence[object]) -> None:
        """Write new shares for the live placement, in stream order."""
        for tables in prepared:
            self._device.enqueue(partial(self._jobs.tables.write, tables))

    def accept_plan(self, plan: Plan, seen: Seen | None, lag: int) -> PlanTerms:
        """Keep a plan, and what was seen of the last one, and return what the core must know of it."""
        self.plan = plan
        self.gains.planned(plan, seen)
        self._num_begun = 0
        self._num_committed = 0
        self._programs.clear()
        config = self._jobs.config
        moving_steps = -(-plan.busiest_rank_bytes // config.transfer_floor_bytes_per_step)
        voting_steps = 2 * (lag + 1) * len(plan.chunks)
        return PlanTerms(
            digest=plan.digest,
            num_chunks=len(plan.chunks),
            deadline_steps=moving_steps + voting_steps + config.transfer_slack_steps,
            skip=bool(plan.skip_reason),
        )

    def begin(self) -> None:
        """Begin staging the chunks that wait for no commit."""
        self._stage_up_to(-1)

    def keep_staged(self, program: CommitProgram) -> None:
        """Keep a program until its round is decided."""
        self._programs[program.chunk_idx] = program

    def commit(self) -> None:
        """Make the next staged chunk live, and begin staging the chunks that waited for it."""
        chunk_idx = self._num_committed
        self._num_committed += 1
        program = self._programs.pop(chunk_idx)
        self._last_commit = enqueue_commit(program, self._device)
        self.placements = program.placements
        self.live_digest = program.digest
        self.moved_bytes += program.num_bytes
        self.peer_bytes += program.num_peer_bytes
        if self._jobs.config.integrity == "slot":
            self._submit(self._jobs.verify(self._epoch, program, self._last_commit))
        self._stage_up_to(chunk_idx)
        if self.plan is not None and self._num_committed == len(self.plan.chunks):
            self.gains.committed(self._epoch, self.plan)

    def drop(self) -> None:
        """Forget plan and staged chunks; jobs under way go on to their end, and nobody takes their results."""
        self.plan = None
        self._programs.clear()

    def job_done(self) -> None:
        """Count the end of a job."""
        self._num_open_jobs -= 1

    @property
    def load_predictability(self) -> float | None:
        """How well the load before foretold the last window's; any thread."""
        return self._jobs.estimator.predictability

    @property
    def is_drained(self) -> bool:
        """True when no job is under way: no peer reads this rank's rows or writes its buffers."""
        return self._num_open_jobs == 0

    def close(self) -> None:
        """End worker and planner."""
        self.drop()
        self._jobs.pace.close()
        self._worker.close()
        if self._jobs.planner is not None:
            self._jobs.planner.close()

    def _stage_up_to(self, committed: int) -> None:
        """Begin, in order, all chunks whose ``begin_after`` is committed. Agreed: the same on all ranks."""
        assert self.plan is not None
        chunks = self.plan.chunks
        while self._num_begun < len(chunks) and chunks[self._num_begun].begin_after <= committed:
            chunk = chunks[self._num_begun]
            self._num_begun += 1
            self._submit(self._jobs.stage(self._epoch, self.plan, chunk, self._last_commit))

    def _submit(self, job: Job) -> None:
        self._num_open_jobs += 1
        self._queued.append(job)
