"""A rebalance inside an engine that somebody else wrote: it is connected, steps, stands still, and begins anew."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
import torch.distributed as dist

from eplb_fsm.config import RebalanceConfig
from eplb_fsm.engines.contract import EngineContract, Meeting
from eplb_fsm.errors import EplbError, UsageError
from eplb_fsm.fsm import RebalanceFSM
from eplb_fsm.runtime.domain import Domain, Handshake
from eplb_fsm.runtime.parts import EngineSide

logger = logging.getLogger(__name__)


def _no_step() -> None:
    """There is nothing to step."""


def refuse_to_meet(meeting: Meeting, error: EplbError, generation: int = 0) -> None:
    """Tell the others why this rank will not connect, so that they do not wait for it.

    Args:
        meeting: Where they wait.
        error: What they are told.
        generation: Which of the machines that meet there it would have been.
    """
    domain = Domain(meeting.rank, meeting.world_size, generation, meeting.name)
    Handshake(meeting.store, domain, timeout_s=0.0).fail(error)


class Session:
    """The machines of one rank, one after the other: a new one each time that the engine itself has written a map.

    All methods belong to the decode thread.

    Args:
        engine: What the engine brings.
        config: Equal on all ranks.

    Attributes:
        config: As given.
        step: Call it after every forward pass; blocks as :meth:`.RebalanceFSM.step`, at its first call until all ranks
            have made that pass. It is the machine's own method where there is a machine, so that nothing is added to
            an idle step.
    """

    def __init__(self, engine: EngineContract, config: RebalanceConfig) -> None:
        self._engine = engine
        self.config = config
        self._fsm: RebalanceFSM | None = None
        self._store: dist.Store | None = None
        self._generation = 0
        self._freezes: list[str] = []
        self.step: Callable[[], None] = _no_step

    def start(self) -> None:
        """Connect to the other ranks and try the banks out; before the first forward pass that counts.

        Blocks until all ranks have come, at most ``start_timeout_s``.

        Raises:
            EplbError: As :meth:`.RebalanceFSM.connect` and :meth:`.RebalanceFSM.verify_bank`.
        """
        # An engine may start inside a forward pass, and the worker cannot write tensors of inference mode.
        with torch.inference_mode(False):
            side = self._connect()
            for bank in range(len(side.banks)):
                probe = self._engine.probe(bank)
                if probe is not None:
                    self.fsm.verify_bank(probe, bank)

    @property
    def fsm(self) -> RebalanceFSM:
        """The machine.

        Raises:
            UsageError: Before :meth:`start` or after :meth:`abandon`.
        """
        if self._fsm is None:
            raise UsageError("there is no machine: start() was not called, or it was abandoned and nothing adopted yet")
        return self._fsm

    @property
    def is_abandoned(self) -> bool:
        """No machine is there: rebalancing was abandoned, or has not been started."""
        return self._fsm is None

    @property
    def is_recording(self) -> bool:
        """Whether the load of the next pass may be part of the window that a plan is made from."""
        return self._fsm is not None and self._fsm.is_window_open

    # -- standing still -------------------------------------------------------------------------------------

    def request_freeze(self, reason: str) -> None:
        """Have no epoch under way from an agreed step on; never blocks. Once for each reason."""
        if reason not in self._freezes:
            self._freezes.append(reason)
            if self._fsm is not None:
                self._fsm.request_freeze()

    def freeze_now(self, reason: str) -> None:
        """The same, here and now: blocks, and is legal only where all ranks stand at the same step.

        Raises:
            EplbError: As :meth:`.RebalanceFSM.quiesce_now`.
        """
        if self._fsm is not None:
            self._fsm.quiesce_now()
        self.request_freeze(reason)

    def unfreeze(self, reason: str) -> None:
        """Take a freeze back; rebalancing goes on once no reason is left, on no rank."""
        if reason in self._freezes:
            self._freezes.remove(reason)
            if not self._freezes and self._fsm is not None:
                self._fsm.request_unfreeze()

    def request_abort(self) -> None:
        """Abort the epoch under way at an agreed step; never blocks."""
        if self._fsm is not None:
            self._fsm.request_abort()

    # -- the engine's own recovery --------------------------------------------------------------------------

    def abandon(self, reason: str) -> None:
        """Give the machine up at once, without asking anyone: the engine writes weights and maps itself now.

        Only where every surviving rank does so after the same step: then no chunk can be committed without this one.
        """
        if self._fsm is not None:
            logger.warning("rebalancing in the background is abandoned: %s", reason)
            self._fsm.close()
            self._fsm = None
            self.step = _no_step

    def adopt(self) -> None:
        """Read back the map that the engine wrote, and begin anew with it; on all ranks after the same step.

        Blocks until all ranks have come, at most ``start_timeout_s``.

        Raises:
            EplbError: As :meth:`.RebalanceFSM.connect`, for example if the ranks read different maps.
            UsageError: Unless abandoned.
        """
        if self._fsm is not None:
            raise UsageError("adopt() reads a map that the engine wrote: abandon() the machine before it writes one")
        with torch.inference_mode(False):  # as in start()
            self._connect()
        if self._freezes:
            self.fsm.request_freeze()

    def close(self) -> None:
        """End rebalancing because this rank serves no more; idempotent."""
        if self._fsm is not None:
            self._fsm.close()
            self._fsm = None
        self.step = _no_step

    def _connect(self) -> EngineSide:
        meeting = self._engine.meeting()
        # A store that was made for a new membership is as new to ranks that have just come.
        self._generation = self._generation + 1 if meeting.store is self._store else 0
        self._store = meeting.store
        return self._connect_at(meeting)

    def _connect_at(self, meeting: Meeting) -> EngineSide:
        try:
            side = self._engine.side()
        except EplbError as error:
            refuse_to_meet(meeting, error, self._generation)
            raise
        self._fsm = RebalanceFSM.connect_side(
            meeting.store,
            meeting.rank,
            meeting.world_size,
            side,
            self.config,
            name=meeting.name,
            generation=self._generation,
        )
        self.step = self._first_step
        return side

    def _first_step(self) -> None:
        fsm = self.fsm
        fsm.arm()
        self.step = fsm.step
        fsm.step()
