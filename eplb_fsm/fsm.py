"""RebalanceFSM: what an engine embeds."""

from __future__ import annotations

import atexit
import logging
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from eplb_fsm.config import RebalanceConfig
from eplb_fsm.core.rank import NEVER, Outcome
from eplb_fsm.core.states import State
from eplb_fsm.errors import UsageError
from eplb_fsm.observe.health import Health
from eplb_fsm.placement.placement import Placement
from eplb_fsm.runtime.bank import Bank
from eplb_fsm.runtime.channel import VoteChannel
from eplb_fsm.runtime.connect import connect_parts
from eplb_fsm.runtime.domain import Domain
from eplb_fsm.runtime.driver import Driver
from eplb_fsm.runtime.maps import BankMaps
from eplb_fsm.runtime.parts import EngineSide, Parts
from eplb_fsm.runtime.rounds import Wait
from eplb_fsm.runtime.transport import Transport
from eplb_fsm.runtime.verify import Probe, verify_bank

# transitions logs every transition twice at INFO; the library's own events and log lines say it better.
logging.getLogger("transitions.core").setLevel(logging.WARNING)


class RebalanceFSM:
    """The rebalance of one rank, driven by :meth:`step` after each forward pass.

    Make it with :meth:`connect`, or from :class:`~eplb_fsm.runtime.parts.Parts` of one's own. All methods belong to
    the decode thread unless they say otherwise. Errors of the background never come out of :meth:`step`: they
    become outcomes with a reason. What can come out is what ``fail_stop`` raises; any other exception is a bug.

    Args:
        parts: The engine's side and the runtime's parts.
    """

    # Every step reads some of these with cold caches, and without a dictionary there is less to read.
    __slots__ = (
        "_core",
        "_driver",
        "_is_armed",
        "_is_in_step",
        "_next_due",
        "_num_quiesced",
        "_parts",
        "_pass_before",
        "_step_idx",
        "_window_lead",
    )

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._driver = Driver(parts)
        self._core = self._driver.core
        self._step_idx = 0
        self._pass_before: int | None = None
        self._next_due = NEVER
        self._is_armed = False
        self._is_in_step = False
        self._num_quiesced = 0
        config = parts.config
        self._window_lead = config.step_interval - config.window_size if config.step_interval else 0
        parts.steps = lambda: self._step_idx
        if parts.watchdog is not None:
            parts.watchdog.start()

    @classmethod
    def connect(
        cls,
        store: dist.Store,
        rank: int,
        world_size: int,
        banks: Sequence[Bank],
        placements: Sequence[Placement],
        config: RebalanceConfig,
        *,
        name: str = "eplb",
        generation: int = 0,
        channel: VoteChannel | None = None,
        transport: Transport | None = None,
        on_peer_lost: Callable[[Sequence[int]], None] | None = None,
        **engine_side: Any,
    ) -> RebalanceFSM:
        """Connect to the other ranks over a store, and build every part that is not given.

        Blocks until all ranks have come, at most ``start_timeout_s``.

        Args:
            store: Where the ranks find each other; a ``TCPStore``, also behind a prefix.
            rank: This rank.
            world_size: Number of ranks of the agreement domain.
            banks: The expert tensors of each model.
            placements: What each bank's slots hold now; equal on all ranks.
            config: Equal on all ranks.
            name: Prefix of this domain in the store, where several share one.
            generation: Number of this membership.
            channel: Carries votes; None: connections of its own, and beyond 16 ranks gloo, on a group of its own.
            transport: Moves rows; None: gloo, on a group of its own.
            on_peer_lost: Called from the watchdog's thread with ranks that show no life; None: a log line only.
            **engine_side: Further fields of :class:`~eplb_fsm.runtime.parts.EngineSide`: ``load_source``,
                ``map_writer``, ``device``, ``fail_stop``, ``observers``, ``clock``.

        Raises:
            ConfigError: An option cannot work.
            ConfigMismatch: On every rank, naming what differs between the ranks.
            BankError: A bank cannot be moved as registered.
            PlacementError: A placement does not fit its bank.
            ConsensusTimeout: Naming the ranks that did not come.
            PeerFailed: Another rank raised one of these; with its message.
            ChannelError: The store is lost.
        """
        side = EngineSide(banks=banks, placements=placements, **engine_side)
        further = {"channel": channel, "transport": transport, "on_peer_lost": on_peer_lost}
        return cls.connect_side(store, rank, world_size, side, config, name=name, generation=generation, **further)

    @classmethod
    def connect_side(
        cls,
        store: dist.Store,
        rank: int,
        world_size: int,
        side: EngineSide,
        config: RebalanceConfig,
        *,
        name: str = "eplb",
        generation: int = 0,
        **further: Any,
    ) -> RebalanceFSM:
        """The same for an engine that hands over all that it brings in one piece.

        Args:
            store: As in :meth:`connect`, which also says what is raised.
            rank: This rank.
            world_size: Number of ranks of the agreement domain.
            side: What the engine brings.
            config: Equal on all ranks.
            name: As in :meth:`connect`.
            generation: Number of this membership.
            **further: ``channel``, ``transport`` and ``on_peer_lost`` of :meth:`connect`.
        """
        domain = Domain(rank, world_size, generation, name)
        fsm = cls(connect_parts(store, domain, side, config, **further))
        # A daemon thread inside a C++ call when the interpreter is finalized would abort the process.
        atexit.register(fsm.close)
        return fsm

    def verify_bank(self, probe: Probe, bank: int = 0) -> None:
        """Try out whether moving a bank's registered tensors moves its experts; before :meth:`arm`, on every rank.

        One expert of each layer goes to the next rank and back; blocks.

        Args:
            probe: Runs a fixed input through one local slot with the engine's own kernel.
            bank: Index of the bank.

        Raises:
            BankError: On every rank alike, naming the layers whose expert gave another output elsewhere.
            UsageError: After :meth:`arm`.
        """
        if self._is_armed:
            raise UsageError("verify_bank() writes live weights, so call it before arm() and before the first request")
        parts = self._parts
        verify_bank(parts.banks[bank], parts.domain, parts.transport, probe, parts.config.start_timeout_s)

    # -- the decode loop ------------------------------------------------------------------------------------

    def arm(self) -> None:
        """Make this the agreed step 0; blocks until all ranks are here.

        Call it after warm-up and graph capture: :meth:`step` does nothing and counts nothing before.

        Raises:
            ConsensusTimeout: Naming the ranks that did not come within ``start_timeout_s``.
            PeerFailed: Another rank was closed before it came.
        """
        if self._is_armed or self._core.state is State.STOPPED:
            return
        self._parts.meet("arm", 0)
        self._is_armed = True
        self._parts.is_suspended = False
        self._step_idx = 0
        self._pass_before = None
        self._next_due = self._core.next_due
        self._driver.arm()

    def record(
        self,
        layer: int,
        topk_ids: torch.Tensor,
        valid: torch.Tensor | None = None,
        bank: int = 0,
        prefill: torch.Tensor | bool = False,
    ) -> None:
        """Count the tokens of one MoE layer; inside the forward pass, never blocks, no host sync.

        Args:
            layer: Index of the MoE layer in its bank.
            topk_ids: Logical experts, int32 or int64 ``(num_tokens, top_k)``; -1 is not counted.
            valid: bool ``(num_tokens,)``, False for padding; None: all count.
            bank: Index of the bank.
            prefill: Which tokens are of prompts, bool ``(num_tokens,)``, or one for all of them; ``load_phases`` says
                which of the two are counted.
        """
        phases = self._parts.config.load_phases
        if phases != "together":
            if isinstance(prefill, bool):
                if prefill != (phases == "prefill"):
                    return
            else:
                wanted = prefill if phases == "prefill" else ~prefill
                valid = wanted if valid is None else valid & wanted
        self._parts.load_source.record(bank, layer, topk_ids, valid)

    def step(self, pass_id: int | None = None) -> None:
        """Count one forward pass, and do what is due; after every pass, real or dummy, on every rank.

        Blocks only for a round that is late (at most ``vote_timeout_s``) and for the resolution of a lost decision
        (at most ``resolve_timeout_s``); in sync mode for the whole rebalance.

        Args:
            pass_id: The engine's number of the pass, where it has one that all ranks share and that grows by one with
                every pass: it is the clock then. A pass that was counted before counts for nothing.

        Raises:
            ConsensusTimeout: Only through a ``fail_stop`` that raises: this rank must not run another forward pass.
            FailStop: Likewise.
        """
        step_idx = self._step_idx + 1 if pass_id is None else self._step_of(pass_id)
        self._step_idx = step_idx
        if step_idx >= self._next_due:
            self._is_in_step = True
            while (wait := self.poll_step(pass_id, self._parts.clock())) is not None:
                self._parts.rounds.block(wait, self._parts.clock())

    def poll_step(self, pass_id: int | None, now: float) -> Wait | None:
        """The same without blocking: None when the step is done, else what it waits for; then call it again.

        Args:
            pass_id: As in :meth:`step`.
            now: Seconds of the caller's clock.
        """
        if not self._is_in_step:
            self._step_idx = self._step_idx + 1 if pass_id is None else self._step_of(pass_id)
            if self._step_idx < self._next_due:
                return None
            self._is_in_step = True
        wait = self._driver.run(self._step_idx, pass_id or 0, now)
        if wait is None:
            self._is_in_step = False
            self._next_due = self._driver.next_due
        return wait

    def _step_of(self, pass_id: int) -> int:
        """Return the step of a pass: never behind the last one, and further than the next where a call was left out."""
        if self._pass_before is None:
            self._pass_before = pass_id - self._step_idx - 1
        return max(pass_id - self._pass_before, self._step_idx)

    # -- requests -------------------------------------------------------------------------------------------

    def request_rebalance(self) -> None:
        """Ask for an epoch; any thread, any rank, never blocks. It starts at an agreed step."""
        self._driver.ask("Request", self._core.request_rebalance)

    def request_abort(self) -> None:
        """Ask to abort the epoch under way; decode thread, any rank, never blocks."""
        self._driver.ask_now("AskAbort", self._core.request_abort)

    def request_freeze(self) -> None:
        """Ask for a freeze; any thread, any rank, never blocks.

        From an agreed step on ``health().is_frozen`` is true on all ranks: no epoch is under way, all transfers are
        drained, and none starts until every rank that asked has called :meth:`request_unfreeze`. A rank that is
        STOPPED is frozen once it is drained.
        """
        self._driver.ask("Freeze", self._core.request_freeze)

    def request_unfreeze(self) -> None:
        """Take this rank's :meth:`request_freeze` back; any thread, never blocks."""
        self._driver.ask("Unfreeze", self._core.request_unfreeze)

    def quiesce_now(self) -> None:
        """Freeze here, between two forward passes, for an engine that cannot go on stepping; decode thread.

        Blocks until no epoch is under way and all transfers are drained, on every rank. Legal only where all ranks
        stand at the same step, which is checked first. The steps that the freeze takes are made here, as many on every
        rank. :meth:`request_unfreeze` takes it back.

        Raises:
            UsageError: On every rank, with the steps: they differ. Nothing has changed.
            ConsensusTimeout: Naming the ranks that did not call it within ``start_timeout_s``.
            PeerFailed: Another rank was closed.
            ChannelError: The store is lost.
        """
        if not self._is_armed:
            return
        self._num_quiesced += 1
        self._parts.meet(f"quiesce_now() number {self._num_quiesced}", self._step_idx)
        self.request_freeze()
        while not self._driver.is_frozen:
            if self._pass_before is not None:
                self._pass_before -= 1  # a step that no pass of the engine has
            self.step()
            self._parts.nap()

    def request_stop(self) -> None:
        """Ask to end rebalancing for good; any thread, any rank, never blocks. Serving goes on.

        From an agreed step on all ranks are STOPPED, with the maps they have.
        """
        self._driver.ask("AskStop", self._core.request_stop)

    def set_speed(self, speed: float) -> None:
        """Say how fast this rank is, from the next plan on; decode thread, any rank, never blocks.

        Call it for a rank that has become slow, is of another kind than the others, or shall give its experts away.

        Args:
            speed: Tokens that it works off in the time in which others work off one, 0.01 to 100, counted in
                millionths; 1 until it is called; 0: it shall hold no expert.

        Raises:
            ConfigError: Another speed, or the policy treats all ranks alike.
        """
        self._parts.runner.set_speed(speed)

    # -- what there is to see -------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """The state of this rank."""
        return self._core.state

    @property
    def step_idx(self) -> int:
        """Steps since :meth:`arm`."""
        return self._step_idx

    @property
    def placements(self) -> tuple[Placement, ...]:
        """The live placement of each bank."""
        return self._parts.runner.placements

    @property
    def is_window_open(self) -> bool:
        """Whether the next step may be part of the window that a plan is made from; an engine need not count in others.

        That is so within ``window_size`` steps of an epoch that the interval starts, and while this rank wants one, as
        after an abort: an epoch that is asked for is planned from what was counted since.
        """
        core = self._core
        return self._step_idx >= core.epoch_start_step + self._window_lead or core.wishes[0]

    @property
    def moved_bytes(self) -> int:
        """Bytes of weights that this rank has written in commits."""
        return self._parts.runner.moved_bytes

    @property
    def late_rounds(self) -> int:
        """Rounds that were not there when they were due."""
        return self._parts.rounds.num_late

    @property
    def outcomes(self) -> tuple[Outcome, ...]:
        """How the last 64 epochs ended, oldest first."""
        return tuple(self._driver.outcomes)

    def maps(self, bank: int = 0) -> BankMaps:
        """Return the live tables that a forward pass reads; written in place at commits.

        Raises:
            UsageError: If the engine brought a map writer of its own.
        """
        return self._parts.maps(bank)

    def health(self) -> Health:
        """Say where this rank is, for how long, and what is wrong; any thread, never blocks."""
        core = self._core
        reason = core.stop_reason.name if core.stop_reason else ""
        return Health(
            rank=core.rank,
            state=core.state.value,
            step_idx=self._step_idx,
            steps_in_state=self._step_idx - core.state_entered_step,
            epoch=core.epoch,
            is_frozen=self._driver.is_frozen,
            is_drained=self._parts.runner.is_drained,
            is_worker_alive=self._parts.runner.is_worker_alive,
            last_outcome=core.last_outcome,
            num_outcomes=dict(self._driver.num_outcomes),
            last_gain=self._parts.runner.gains.last,
            load_predictability=self._parts.runner.load_predictability,
            why_stopped=self._driver.failure or (f"{reason}: {core.stop_detail}" if reason else ""),
            num_rounds=self._parts.rounds.num_read,
            num_late_rounds=self._parts.rounds.num_late,
            lag=core.lag,
            staging_bytes=self._parts.staging_bytes,
            moved_bytes=self._parts.runner.moved_bytes,
            peer_bytes=self._parts.runner.peer_bytes,
            peers=self._parts.peers(),
        )

    def lost_peers(self, within_s: float) -> tuple[int, ...]:
        """Find out which ranks are gone, after the engine's own collective failed; blocks for ``within_s``.

        Args:
            within_s: Time to watch; a rank whose liveness mark does not move in it is named.
        """
        return self._parts.watch_peers(within_s)

    def close(self) -> None:
        """End rebalancing because this rank serves no more; local, blocks for a few seconds at most. Idempotent.

        The others read a last STOP vote and serve on with the maps they have. No forward pass may follow here: a
        chunk could be committed without this rank. To end rebalancing and serve on, :meth:`request_stop`. What was
        made by :meth:`connect` and never closed is closed when the interpreter exits.
        """
        if not self._is_armed:
            self._parts.leave(UsageError("closed before arm()"))
        self._driver.close(self._step_idx, is_armed=self._is_armed)
        self._next_due = NEVER
        self._parts.close()
        atexit.unregister(self.close)

    def __enter__(self) -> RebalanceFSM:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()
