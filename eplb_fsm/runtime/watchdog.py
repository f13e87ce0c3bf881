"""The watchdog: sees off the decode thread which ranks show signs of life, and whose decode loop stands still."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from eplb_fsm.core.resolution import Journal
from eplb_fsm.errors import ChannelError
from eplb_fsm.runtime.domain import Domain
from eplb_fsm.runtime.marks import Mark, MarkBoard

logger = logging.getLogger(__name__)

_BLIND_AFTER_TURNS = 3
"""A longer pause between two looks is this process's own: it says nothing about the others."""


class PeerReport(NamedTuple):
    """What the watchdog knows of one rank."""

    rank: int
    silent_s: float
    """Seconds for which its mark was seen to stand still: a dead or stopped process."""
    stuck_s: float
    """Seconds for which its step counter was seen to stand still."""
    posted_round: int


class Watchdog:
    """Shows this rank's mark and watches the others', in a thread of its own.

    Silence is counted over the time in which this thread could look: not while the store is lost or does not
    answer, nor while this process itself stood still. A rank that was closed is not silent.

    Args:
        board: Where the marks are.
        show: Returns the current step, whether steps may stand still, and the journal; any thread.
        domain: The ranks.
        interval_s: Seconds between turns.
        timeout_s: A rank whose mark has not moved for this long is lost.
        on_peer_lost: Called from the watchdog's thread with the ranks newly lost.
    """

    def __init__(
        self,
        board: MarkBoard,
        show: Callable[[], tuple[int, bool, Journal]],
        domain: Domain,
        *,
        interval_s: float,
        timeout_s: float,
        on_peer_lost: Callable[[Sequence[int]], None],
    ) -> None:
        self._board = board
        self._show = show
        self._domain = domain
        self._interval_s = interval_s
        self._timeout_s = timeout_s
        self._on_peer_lost = on_peer_lost
        self._closing = threading.Event()
        self._lost: set[int] = set()
        self._left: set[int] = set()
        self._tick = 0
        now = time.monotonic()
        self._looked_at = now
        self._moved = [(-1, -1, now, now, 0)] * domain.world_size
        self._is_board_lost = False
        self._thread = threading.Thread(target=self._run, name="eplb-fsm-watchdog", daemon=True)

    def start(self) -> None:
        """Show the first mark, then start the thread."""
        self._turn()
        self._thread.start()

    def close(self) -> None:
        """Show a last mark and end the thread; blocks for at most a second."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(timeout=1.0)

    def peers(self) -> list[PeerReport]:
        """Return what is known of every other rank; any thread, never blocks."""
        looked_at = self._looked_at
        return [
            PeerReport(rank, max(0.0, looked_at - ticked), max(0.0, looked_at - stepped), posted)
            for rank, (_, _, ticked, stepped, posted) in enumerate(self._moved)
            if rank != self._domain.rank
        ]

    def silent_ranks(self, for_s: float) -> list[int]:
        """Return the ranks whose mark has not moved for ``for_s`` seconds; any thread."""
        return [peer.rank for peer in self.peers() if peer.silent_s >= for_s and peer.rank not in self._left]

    def watch_closely(self, timeout_s: float) -> None:
        """Report lost ranks after this long already, because the votes have stopped coming; any thread."""
        self._timeout_s = min(self._timeout_s, timeout_s)

    @property
    def is_board_lost(self) -> bool:
        """Whether the store could not be reached the last time, so that nobody can be seen."""
        return self._is_board_lost

    @property
    def interval_s(self) -> float:
        """Seconds between turns."""
        return self._interval_s

    def _run(self) -> None:
        while not self._closing.wait(self._interval_s):
            self._turn()
        self._turn()

    def _turn(self) -> None:
        self._tick += 1
        step_idx, is_suspended, journal = self._show()
        try:
            self._board.publish(Mark(self._tick, step_idx, is_suspended, journal, self._closing.is_set()))
            marks = self._board.read()
        except ChannelError:
            if not self._is_board_lost and not self._closing.is_set():
                logger.warning("rank %d: the store is lost, so the ranks cannot see each other", self._domain.rank)
            self._is_board_lost = True
            return
        self._is_board_lost = False
        self._note(marks)
        if not is_suspended:
            self._report_lost()

    def _note(self, marks: Sequence[Mark | None]) -> None:
        now = time.monotonic()
        if now - self._looked_at > _BLIND_AFTER_TURNS * self._interval_s:
            self._moved = [(tick, step, now, now, posted) for tick, step, _, _, posted in self._moved]
        self._looked_at = now
        for rank, mark in enumerate(marks):
            if mark is None:
                continue
            if mark.has_left:
                self._left.add(rank)
            tick, step_idx, ticked, stepped, _ = self._moved[rank]
            if mark.tick != tick:
                ticked = now
            # A rank that resolves publishes from inside step(), without a step of its own.
            new_step_idx = step_idx if mark.tick < 0 else mark.step_idx
            if new_step_idx != step_idx or mark.is_suspended:
                stepped = now
            self._moved[rank] = (mark.tick, new_step_idx, ticked, stepped, mark.journal.posted_round)

    def _report_lost(self) -> None:
        silent = set(self.silent_ranks(self._timeout_s))
        newly_lost = sorted(silent - self._lost)
        self._lost = silent
        if newly_lost:
            logger.error(
                "rank %d: no sign of life from ranks %s for %.1f s",
                self._domain.rank,
                newly_lost,
                self._timeout_s,
            )
            try:
                self._on_peer_lost(newly_lost)
            except Exception:  # the engine's code; the watchdog goes on
                logger.exception("rank %d: on_peer_lost raised", self._domain.rank)
