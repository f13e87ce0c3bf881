"""The watchdog and the boards it looks at: whom they call lost, and whom never."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

import pytest
import torch.distributed as dist

from eplb_fsm.core.resolution import Journal, resolve
from eplb_fsm.errors import ChannelError
from eplb_fsm.runtime.domain import Domain
from eplb_fsm.runtime.marks import BackgroundMarkBoard, InMemoryMarkBoard, Mark, StoreMarkBoard
from eplb_fsm.runtime.watchdog import Watchdog

_TURN_S = 0.01


class _Board(InMemoryMarkBoard):
    """A board that a test can lose or block."""

    def __init__(self, marks: list[Mark | None]) -> None:
        super().__init__(marks, 0)
        self.is_lost = False
        self.free = threading.Event()
        self.free.set()

    def read(self) -> list[Mark | None]:
        self.free.wait(20)
        if self.is_lost:
            raise ChannelError("the store is lost: this test took it away")
        return super().read()


def _watch(board: _Board, on_peer_lost: Callable[[Sequence[int]], None], timeout_s: float = 0.3) -> Watchdog:
    watchdog = Watchdog(
        board,
        lambda: (0, False, Journal()),
        Domain(0, 3),
        interval_s=_TURN_S,
        timeout_s=timeout_s,
        on_peer_lost=on_peer_lost,
    )
    watchdog.start()
    return watchdog


def _until(condition: Callable[[], object], timeout_s: float = 10.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return bool(condition())


class _Peers:
    """Moves the marks of ranks 1 and 2 as their watchdogs would."""

    def __init__(self, marks: list[Mark | None]) -> None:
        self._marks = marks
        self.alive = {1, 2}
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        tick = 0
        while not self._ending.wait(_TURN_S / 2):
            tick += 1
            for rank in tuple(self.alive):
                self._marks[rank] = Mark(tick, tick, False, Journal())

    def close(self) -> None:
        """End the thread."""
        self._ending.set()
        self._thread.join()


def test_a_rank_that_shows_no_life_is_reported_once_and_seen_to_come_back() -> None:
    """on_peer_lost is called once with the silent rank only, whatever it raises, and again after it came back."""
    marks: list[Mark | None] = [None] * 3
    peers = _Peers(marks)
    lost: list[tuple[int, ...]] = []

    def on_peer_lost(ranks: Sequence[int]) -> None:
        lost.append(tuple(ranks))
        raise ValueError("the engine's callback is broken")

    watchdog = _watch(_Board(marks), on_peer_lost)
    peers.alive.discard(2)
    assert _until(lambda: lost)
    peers.alive.add(2)
    assert _until(lambda: not watchdog.silent_ranks(0.3))
    peers.alive.discard(2)
    assert _until(lambda: len(lost) == 2)
    assert lost == [(2,), (2,)]
    watchdog.close()
    peers.close()
    own = marks[0]
    assert own is not None
    assert own.has_left


def test_a_rank_that_was_closed_is_not_lost() -> None:
    """The last mark of a closed rank says that it has left, and its silence is no fault."""
    marks: list[Mark | None] = [None] * 3
    peers = _Peers(marks)
    lost: list[tuple[int, ...]] = []
    watchdog = _watch(_Board(marks), lambda ranks: lost.append(tuple(ranks)))
    peers.alive.discard(1)
    time.sleep(2 * _TURN_S)
    marks[1] = Mark(10**6, 5, False, Journal(), has_left=True)
    peers.alive.discard(2)
    assert _until(lambda: lost)
    watchdog.close()
    peers.close()
    assert lost == [(2,)]


@pytest.mark.parametrize("how", ["lost", "blocked"])
def test_nobody_is_called_lost_while_nobody_can_be_seen(how: str) -> None:
    """A store that is lost, or does not answer, makes no rank silent, and neither does its coming back."""
    marks: list[Mark | None] = [None] * 3
    peers = _Peers(marks)
    lost: list[tuple[int, ...]] = []
    board = _Board(marks)
    watchdog = _watch(board, lambda ranks: lost.append(tuple(ranks)))
    assert _until(lambda: all(marks))
    if how == "lost":
        board.is_lost = True
        assert _until(lambda: watchdog.is_board_lost)
    else:
        board.free.clear()
    time.sleep(0.8)
    assert watchdog.silent_ranks(0.3) == []
    board.is_lost = False
    board.free.set()
    time.sleep(0.1)
    watchdog.close()
    peers.close()
    assert lost == []


def test_a_closer_watch_names_a_rank_sooner() -> None:
    """After the votes stopped coming, a rank is reported long before the liveness timeout."""
    marks: list[Mark | None] = [None, Mark(1, 1, False, Journal()), None]
    peers = _Peers(marks)
    peers.alive.discard(1)
    lost: list[tuple[int, ...]] = []
    watchdog = _watch(_Board(marks), lambda ranks: lost.append(tuple(ranks)), timeout_s=1000)
    watchdog.watch_closely(0.3)
    assert _until(lambda: lost)
    watchdog.close()
    peers.close()
    assert lost == [(1,)]


def test_a_background_board_never_blocks_and_decides_nothing_before_it_has_looked() -> None:
    """publish() and read() return while the store does not answer; no resolution follows from not having looked."""
    journal = Journal(posted_round=3, posted_staged=True, gave_up_round=3)
    marks: list[Mark | None] = [None, Mark(1, 1, False, journal), Mark(1, 1, False, journal)]
    slow = _Board(marks)
    slow.free.clear()
    board = BackgroundMarkBoard(slow, 3)
    for _ in range(5):
        board.publish(Mark(-3, 0, False, journal))
        assert resolve([mark.journal if mark else None for mark in board.read()], 3) is None
    slow.free.set()
    assert _until(lambda: all(board.read()))
    assert resolve([mark.journal if mark else None for mark in board.read()], 3) == 0
    slow.is_lost = True
    board.publish(Mark(-3, 0, False, journal))
    assert _until(lambda: _raises(board))
    slow.is_lost = False
    assert _until(lambda: board.publish(Mark(-3, 0, False, journal)) or not _raises(board))


def _raises(board: BackgroundMarkBoard) -> bool:
    try:
        board.read()
    except ChannelError:
        return True
    return False


def test_marks_travel_through_a_prefixed_store() -> None:
    """What one rank publishes another reads, None where a rank never did; a lost store is a ChannelError."""
    server = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=5), wait_for_workers=False)
    boards = [StoreMarkBoard(Domain(rank, 3), dist.PrefixStore("launcher", server)) for rank in range(2)]
    mark = Mark(7, 12, True, Journal(posted_round=4, posted_staged=True), has_left=True)
    boards[0].publish(mark)
    assert boards[1].read() == [mark, None, None]
    boards[1].publish(mark)
    assert boards[0].read() == [mark, mark, None]
