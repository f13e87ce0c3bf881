"""Posting and reading rounds: what is late, what is lost, and how a lost decision is resolved."""

from __future__ import annotations

import logging
import time
from typing import NamedTuple

from eplb_fsm.core.reasons import StopReason
from eplb_fsm.core.resolution import Journal, resolve
from eplb_fsm.core.votes import Tally, Vote
from eplb_fsm.errors import ChannelError
from eplb_fsm.runtime.channel import VoteChannel
from eplb_fsm.runtime.marks import Mark, MarkBoard

logger = logging.getLogger(__name__)

_RESOLVE_POLL_S = 0.01


class Wait(NamedTuple):
    """``step()`` has to wait: for a round that is late, or for the resolution of a lost decision."""

    round_idx: int
    deadline: float
    is_resolving: bool


class Lost(NamedTuple):
    """The round will not be read; outside the window, so nothing can have been committed without this rank."""

    reason: StopReason
    detail: str


class Resolved(NamedTuple):
    """The round was lost inside the window, and resolved over the store."""

    num_chunks: int
    """How many chunks the round committed, 0 for none."""
    lost: Lost


class Unresolved(NamedTuple):
    """The round was lost inside the window, and these ranks never said what they know: fail-stop."""

    silent_ranks: tuple[int, ...]
    lost: Lost


class Rounds:
    """The rounds of one rank; decode thread only, but for :attr:`journal`, which any thread may read.

    Args:
        channel: Carries the votes.
        board: A mark board with a connection of its own, for resolving.
        wait_limit_s: Longest wait for a late round.
        resolve_limit_s: Longest wait for a resolution.

    Attributes:
        journal: What this rank tells the others about its rounds; replaced, never changed.
        num_late: Rounds that were not there when they were due.
        num_read: Rounds read.
    """

    def __init__(self, channel: VoteChannel, board: MarkBoard, *, wait_limit_s: float, resolve_limit_s: float) -> None:
        self._channel = channel
        self._board = board
        self._wait_limit_s = wait_limit_s
        self._resolve_limit_s = resolve_limit_s
        self._late_since: float | None = None
        self._lost: Lost | None = None
        self._resolve_deadline = 0.0
        self.journal = Journal()
        self.num_late = 0
        self.num_read = 0

    def post(self, vote: Vote) -> None:
        """Post a vote. A lost channel shows when the round is read."""
        # The journal comes first: once the vote is out, a commit may be decided at any time.
        _, _, read_round, read_commits, *ends = self.journal
        self.journal = Journal(vote.round_idx, vote.promises_commit, read_round, read_commits, *ends)
        self._lost = None
        try:
            self._channel.post(vote)
        except ChannelError as error:
            self._lost = Lost(StopReason.TRANSPORT, str(error))

    def post_last(self, vote: Vote) -> None:
        """Post a vote that says STOP and that nobody here will read."""
        self.journal = self.journal._replace(stopped_from_round=vote.round_idx)
        try:
            self._channel.post(vote)
        except ChannelError as error:
            logger.debug("the last STOP vote could not be posted: %s", error)

    def give_up_reading(self, round_idx: int) -> None:
        """Show that this rank will never read a round; binding. The others may resolve it without this rank."""
        self.journal = self.journal._replace(gave_up_round=round_idx)

    def stop_from(self, round_idx: int) -> None:
        """Show that this rank votes no more from this round on."""
        self.journal = self.journal._replace(stopped_from_round=round_idx)

    def note_decision(self, round_idx: int, num_chunks: int) -> None:
        """Show what this rank read: how many chunks the round committed, 0 for any other decision."""
        self.num_read += 1
        posted_round, posted_staged, _, _, *ends = self.journal
        self.journal = Journal(posted_round, posted_staged, round_idx, num_chunks, *ends)

    def read(
        self, round_idx: int, now: float, *, in_window: bool, counts_late: bool
    ) -> Tally | Wait | Lost | Resolved | Unresolved:
        """Return the tally of a round that is due, or what to do instead; never blocks on a peer.

        Args:
            round_idx: The round.
            now: Seconds of the injected clock.
            in_window: Whether this rank voted staged in it.
            counts_late: Whether waiting for it is worth counting.
        """
        if self.journal.gave_up_round == round_idx:
            return self._resolve(round_idx, now)
        lost = self._lost
        if lost is None:
            try:
                tally = self._channel.poll(round_idx)
            except ChannelError as error:
                lost = Lost(StopReason.TRANSPORT, str(error))
            else:
                if tally is not None:
                    self._late_since = None
                    return tally
                lost = self._wait_or_give_up(now, counts_late)
                if lost is None:
                    assert self._late_since is not None
                    return Wait(round_idx, self._late_since + self._wait_limit_s, is_resolving=False)
        self._late_since = None
        if not in_window:
            return lost
        self._lost = lost
        self.give_up_reading(round_idx)
        self._resolve_deadline = now + self._resolve_limit_s
        return self._resolve(round_idx, now)

    def block(self, wait: Wait, now: float) -> None:
        """Block for what :meth:`read` waits for, at most until its deadline; the only waits in ``step()``."""
        if wait.is_resolving:
            time.sleep(_RESOLVE_POLL_S)
        else:
            self._channel.wait(wait.round_idx, wait.deadline - now)

    def _wait_or_give_up(self, now: float, counts_late: bool) -> Lost | None:
        if self._late_since is None:
            self._late_since = now
            self.num_late += counts_late
        if now < self._late_since + self._wait_limit_s:
            return None
        return Lost(StopReason.TIMEOUT, f"the votes of a round were not there after {self._wait_limit_s} s")

    def _resolve(self, round_idx: int, now: float) -> Wait | Resolved | Unresolved:
        assert self._lost is not None
        journals: list[Journal | None] = []
        try:
            # The tick is the watchdog's business; what counts here is that the others see the journal.
            self._board.publish(Mark(-round_idx, 0, False, self.journal))
            journals = [mark.journal if mark else None for mark in self._board.read()]
            verdict = resolve(journals, round_idx)
        except ChannelError:
            verdict = None
        if verdict is not None:
            return Resolved(verdict, self._lost)
        if now < self._resolve_deadline:
            return Wait(round_idx, self._resolve_deadline, is_resolving=True)
        return Unresolved(_silent(journals, round_idx), self._lost)


def _silent(journals: list[Journal | None], round_idx: int) -> tuple[int, ...]:
    """The ranks that said nothing about the round."""
    return tuple(
        rank
        for rank, journal in enumerate(journals)
        if journal is None or (journal.gave_up_round != round_idx and journal.read_round != round_idx)
    )
