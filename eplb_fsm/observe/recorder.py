"""Makes the events of one rank out of what its core does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eplb_fsm.core.rank import RankCore
from eplb_fsm.core.votes import Vote
from eplb_fsm.observe.events import Event, Observer, Observers


class EventRecorder:
    """Numbers the events of one rank, and puts the projected state of its core into each; decode thread only.

    Args:
        core: The rank.
        observers: Who wants the events; with nobody, nothing is made.
    """

    def __init__(self, core: RankCore, observers: Sequence[Observer]) -> None:
        self._core = core
        self._observers = Observers(tuple(observers))
        self._num_events = 0

    def __bool__(self) -> bool:
        """False when nobody listens: then :meth:`record` does nothing."""
        return bool(self._observers)

    def record(self, action: str, **detail: Any) -> None:
        """Hand on one event.

        Args:
            action: Its name in the spec.
            **detail: What it was about.
        """
        if not self._observers:
            return
        core = self._core
        self._num_events += 1
        self._observers.on_event(
            Event(
                seq=self._num_events,
                rank=core.rank,
                step_idx=core.step_idx,
                action=action,
                state=core.state.value,
                epoch=core.epoch,
                round_idx=core.round_idx,
                chunk_idx=core.chunk_idx,
                num_staged=core.num_staged,
                is_drained=core.drained,
                is_frozen=core.is_frozen,
                live_digest=core.live_digest,
                detail=detail,
            )
        )

    def record_init(self, num_ranks: int) -> None:
        """Record what a trace is checked with: the number of ranks, and the options that the protocol follows."""
        core, config = self._core, self._core.config
        self.record(
            "Init",
            num_ranks=num_ranks,
            generation=core.generation,
            lag=core.lag,
            staging_buffers=config.staging_buffers,
            idle_interval=core.idle_interval,
            collecting_deadline_steps=config.collecting_deadline_steps,
            computing_deadline_steps=config.computing_deadline_steps,
            awaiting_consensus_deadline_steps=config.awaiting_consensus_deadline_steps,
            drain_deadline_steps=config.drain_deadline_steps,
            backoff_steps=config.backoff_steps,
            max_backoff_steps=config.max_backoff_steps,
            cooldown_steps=config.cooldown_steps,
        )

    def record_vote(self, vote: Vote) -> None:
        """Record a vote: the words that do not follow from the projected state."""
        self.record(
            "PostVote",
            progress=vote.progress,
            pass_id=vote.pass_id,
            abort=vote.abort,
            stop=vote.stop,
            request=vote.request,
            freeze=vote.freeze,
            earliest_next_step=vote.earliest_next_step,
            lag=vote.lag,
        )
