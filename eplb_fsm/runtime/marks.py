"""Liveness marks: the second channel between the ranks, over the store.

A watchdog thread of each rank writes one small mark and reads all of them with one request, on a connection of
its own, so that a blocked engine collective, a broken vote group and a dead process can be told apart. The same
marks carry what resolves a lost decision (:mod:`eplb_fsm.core.resolution`).
"""

from __future__ import annotations

import json
import threading
from datetime import timedelta
from typing import NamedTuple, Protocol

import torch.distributed as dist

from eplb_fsm.core.resolution import Journal
from eplb_fsm.errors import ChannelError
from eplb_fsm.runtime.domain import Domain

_STORE_TIMEOUT = timedelta(seconds=5)


class Mark(NamedTuple):
    """What one rank shows of itself."""

    tick: int
    """Counts the watchdog's turns: it moves while the process lives."""
    step_idx: int
    """Moves while the decode loop lives."""
    is_suspended: bool
    """Starting or frozen: the steps may stand still."""
    journal: Journal
    has_left: bool = False
    """The last mark of a rank that was closed: it will not move again, and that is no fault."""


class MarkBoard(Protocol):
    """Where the ranks of a domain show their marks."""

    def publish(self, mark: Mark) -> None:
        """Show this rank's mark.

        Raises:
            ChannelError: If the board is lost.
        """
        ...

    def read(self) -> list[Mark | None]:
        """Return the mark of every rank, None for one that never showed any; same error as publish."""
        ...


class StoreMarkBoard:
    """Marks as keys of a store, on a connection of its own.

    A store that does not answer (its process is stopped) blocks here for ever: torch's timeout bounds waiting for a
    key, not for the server. So this is for a thread of its own; see :class:`BackgroundMarkBoard`.

    Args:
        domain: The ranks.
        store: Any store that can be cloned into a second connection (``TCPStore``, also behind a prefix).
    """

    def __init__(self, domain: Domain, store: dist.Store) -> None:
        connection: dist.Store = store.clone()  # type: ignore[attr-defined]  # the stubs leave it out
        connection.set_timeout(_STORE_TIMEOUT)
        self._view = domain.store(connection, "marks")
        self._rank = domain.rank
        self._keys = [str(rank) for rank in range(domain.world_size)]
        self._seen_all = False

    def publish(self, mark: Mark) -> None:
        """Write the key of this rank."""
        try:
            self._view.set(str(self._rank), json.dumps(mark))
        except RuntimeError as error:
            raise ChannelError(f"the store is lost: {error}") from error

    def read(self) -> list[Mark | None]:
        """Read all keys with one request; a key that is not there yet is never waited for."""
        try:
            if not self._seen_all:
                self._seen_all = self._view.check(self._keys)
            keys = self._keys if self._seen_all else [k for k in self._keys if self._view.check([k])]
            found = dict(zip(keys, self._view.multi_get(keys), strict=True)) if keys else {}
        except RuntimeError as error:
            raise ChannelError(f"the store is lost: {error}") from error
        return [_parse(found[key]) if key in found else None for key in self._keys]


def _parse(text: bytes) -> Mark:
    tick, step_idx, is_suspended, journal, has_left = json.loads(text)
    return Mark(tick, step_idx, is_suspended, Journal(*journal), has_left)


class BackgroundMarkBoard:
    """Another board behind a thread, so that neither call ever blocks: for resolving inside ``step()``.

    A thread runs only while a mark is being published; what :meth:`read` returns may be a turn old. What a journal
    says of a round stays true, so an old mark never misleads, it only says less.

    Args:
        board: Not used by anybody else.
        world_size: Number of ranks.
    """

    def __init__(self, board: MarkBoard, world_size: int) -> None:
        self._board = board
        self._marks: list[Mark | None] = [None] * world_size
        self._error: ChannelError | None = None
        self._thread: threading.Thread | None = None

    def publish(self, mark: Mark) -> None:
        """Have the mark shown and the others' read; skipped while the last turn has not ended."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._turn, args=(mark,), name="eplb-fsm-resolver", daemon=True)
            self._thread.start()

    def read(self) -> list[Mark | None]:
        """Return what the last turn has read, no mark of anybody before it."""
        if self._error is not None:
            raise self._error
        return self._marks

    def _turn(self, mark: Mark) -> None:
        try:
            self._board.publish(mark)
            self._marks = self._board.read()
            self._error = None
        except ChannelError as error:
            self._error = error


class InMemoryMarkBoard:
    """Marks in a list that the ranks of one process share.

    Args:
        marks: One entry for each rank, None at first.
        rank: The rank whose end this is.
    """

    def __init__(self, marks: list[Mark | None], rank: int) -> None:
        self._marks = marks
        self._rank = rank

    def publish(self, mark: Mark) -> None:
        """Show the mark at once."""
        self._marks[self._rank] = mark

    def read(self) -> list[Mark | None]:
        """Return all marks."""
        return list(self._marks)
