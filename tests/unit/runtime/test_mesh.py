"""Votes over a mesh: every rank comes to the same tally, and who is lost shows at once and by name."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eplb_fsm.core.votes import NUM_VOTE_WORDS, Tally, Vote, tally_votes
from eplb_fsm.errors import ChannelError
from eplb_fsm.runtime.mesh import MeshVoteChannel, _Peer
from tests.unit.runtime.meshes import PATIENT_S, meshed, read, vote_of

_LARGEST = 2**63 - 1
_SMALL_BUFFER = 4096


def _message(vote: Vote) -> bytes:
    """What goes over a connection."""
    return struct.pack(f"<{NUM_VOTE_WORDS}q", *vote)


def _socket_to(channel: MeshVoteChannel, rank: int) -> socket.socket:
    return next(peer._connection for peer in channel._peers if peer.rank == rank)


def test_all_ranks_come_to_the_tally_of_all_votes() -> None:
    """Votes that differ in every way, the largest and smallest words among them, give one tally on every rank."""
    votes = [vote_of(7, progress=rank, live_digest=-rank, stop=rank % 2) for rank in range(4)]
    votes[2] = votes[2]._replace(plan_digest=_LARGEST, config_fingerprint=-_LARGEST - 1)
    with meshed(4) as channels:
        for channel, vote in zip(channels, votes, strict=True):
            channel.post(vote)
        assert [read(channel, 7) for channel in channels] == [tally_votes(votes)] * 4


def test_votes_that_are_alike_are_their_own_tally() -> None:
    """An idle round, in which all say the same, round after round; of rounds that were read nothing is kept."""
    with meshed(3) as channels:
        for round_idx in range(5):
            for channel in channels:
                channel.post(vote_of(round_idx))
            tally = Tally(vote_of(round_idx), vote_of(round_idx))
            assert [read(channel, round_idx) for channel in channels] == [tally] * 3
        assert [channel._rounds for channel in channels] == [{}] * 3


def test_a_round_is_not_there_before_its_last_vote_is() -> None:
    """However often it is asked, poll() says nothing and does not block until every rank has voted."""
    with meshed(3) as channels:
        for channel in channels[:2]:
            channel.post(vote_of(1))
        for channel in channels[:2] * 3:
            assert channel.poll(1) is None
        channels[2].post(vote_of(1, abort=5))
        for channel in channels:
            tally = read(channel, 1)
            assert tally is not None
            assert (tally.largest.abort, tally.smallest.abort) == (5, 1)


def test_votes_that_come_early_are_kept_for_their_round() -> None:
    """A rank that is rounds ahead, with a last vote after them, is in the tally of each of these rounds."""
    with meshed(2) as channels:
        for round_idx in range(1, 4):
            channels[1].post(vote_of(round_idx, stop=round_idx))
        for round_idx in range(1, 4):
            channels[0].post(vote_of(round_idx))
            assert read(channels[0], round_idx) == tally_votes([vote_of(round_idx), vote_of(round_idx, stop=round_idx)])


def test_a_vote_for_a_round_that_was_given_up_is_dropped() -> None:
    """The votes of a round that this rank went past take no memory, also where they come after all."""
    with meshed(2) as channels:
        channels[0].post(vote_of(1))
        channels[0].post(vote_of(2))
        channels[1].post(vote_of(2))
        assert read(channels[0], 2) is not None
        channels[1].post(vote_of(1))
        channels[1].post(vote_of(4))  # so that the one before it has arrived when this one has
        channels[0].post(vote_of(3))
        while len(channels[0]._rounds) < 2:
            assert channels[0].poll(3) is None
        assert sorted(channels[0]._rounds) == [3, 4]


def test_a_closed_rank_is_named_once_its_votes_have_been_read() -> None:
    """What a rank sent before it closed counts; in the round that it has no vote in it is lost, by name."""
    with meshed(3) as channels:
        channels[2].post(vote_of(1, stop=2))
        channels[2].post(vote_of(2))
        channels[2].close()
        for round_idx in (1, 2):
            for channel in channels[:2]:
                channel.post(vote_of(round_idx))
            tallies = [read(channel, round_idx) for channel in channels[:2]]
            assert all(tally is not None and tally.largest.stop == 3 - round_idx for tally in tallies)
        for channel in channels[:2]:
            channel.post(vote_of(3))
        for channel in channels[:2]:
            channel.wait(3, PATIENT_S)
            with pytest.raises(ChannelError, match="the vote connection to rank 2 is lost: closed by that rank"):
                channel.poll(3)


def test_a_last_vote_reaches_who_is_left_after_another_rank_has_gone() -> None:
    """A rank that cannot send to one any more still sends its STOP to the others, and post() raises nothing."""
    with meshed(3) as channels:
        for round_idx in (1, 2, 3):
            channels[0].post(vote_of(round_idx))  # the first that the others send to
        channels[0].close()
        for round_idx, stop in ((1, 1), (2, 1), (3, 77)):  # the first vote to a closed connection breaks it
            channels[1].post(vote_of(round_idx, stop=stop))
            channels[2].post(vote_of(round_idx))
            for channel in channels[1:]:
                tally = read(channel, round_idx)
                assert tally is not None
                assert tally.largest.stop == stop


def test_a_vote_that_comes_in_pieces_is_put_together() -> None:
    """A vote whose last byte is late is not read before, and is read whole with the start of the next one behind it."""
    first, second = _message(vote_of(1, stop=9)), _message(vote_of(2, stop=8))
    with meshed(2) as channels:
        raw = _socket_to(channels[1], 0)
        channels[0].post(vote_of(1))
        raw.sendall(first[:-1])
        channels[0].wait(1, 0.05)
        assert channels[0].poll(1) is None
        raw.sendall(first[-1:] + second[:3])
        assert read(channels[0], 1) == tally_votes([vote_of(1), vote_of(1, stop=9)])
        channels[0].post(vote_of(2))
        assert channels[0].poll(2) is None
        raw.sendall(second[3:])
        assert read(channels[0], 2) == tally_votes([vote_of(2), vote_of(2, stop=8)])


@given(st.lists(st.integers(1, 3 * 8 * NUM_VOTE_WORDS - 1), max_size=6, unique=True))
def test_wherever_messages_are_cut_they_arrive_whole_and_in_order(cuts: list[int]) -> None:
    """Three votes cut anywhere: after each piece those are there that are complete, and nothing else."""
    messages = [_message(vote_of(idx, stop=idx << 40)) for idx in range(3)]
    sent, received = b"".join(messages), []
    left, right = socket.socketpair()
    with left, right:
        right.setblocking(False)
        peer = _Peer(1, right)
        for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(sent)], strict=True):
            left.sendall(sent[start:end])
            received += peer.receive()
            assert received == messages[: end // len(messages[0])]


def test_a_wait_ends_when_the_last_vote_comes() -> None:
    """A wait of an hour for two votes ends with the second of them."""
    with meshed(3) as channels, ThreadPoolExecutor(1) as threads:
        channels[0].post(vote_of(1))
        reading = threads.submit(lambda: (channels[0].wait(1, 3600.0), channels[0].poll(1))[1])
        for channel in channels[1:]:
            channel.post(vote_of(1))
        assert reading.result(PATIENT_S) is not None


@pytest.mark.parametrize("timeout_s", [0.02, 0.0, -1.0])
def test_a_wait_ends_at_its_timeout(timeout_s: float) -> None:
    """Where a vote does not come wait() returns without it, also where its time is up before it begins."""
    with meshed(3) as channels:
        for channel in channels[:2]:
            channel.post(vote_of(1))
        channels[0].wait(1, timeout_s)
        assert channels[0].poll(1) is None


def test_a_wait_ends_where_a_rank_is_lost() -> None:
    """A wait of an hour does not go on for a rank that has gone, though another one is still to vote."""
    with meshed(3) as channels:
        channels[1].close()
        channels[0].post(vote_of(1))
        for _ in range(2):
            channels[0].wait(1, 3600.0)
            with pytest.raises(ChannelError, match="rank 1"):
                channels[0].poll(1)


def test_a_reset_connection_is_lost() -> None:
    """A connection that ends with an error, as when a machine restarts, is a lost rank with that error in the text."""
    with meshed(2) as channels:
        raw = _socket_to(channels[1], 0)
        channels[0].post(vote_of(1))
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close() resets
        raw.close()
        channels[0].wait(1, 3600.0)
        with pytest.raises(ChannelError, match=r"rank 1 is lost: .*reset"):
            channels[0].poll(1)


def test_only_rounds_that_were_posted_can_be_read() -> None:
    """Polling a round that this rank has not voted in, or has read already, is an error and not a wait."""
    with meshed(2) as channels:
        channels[1].post(vote_of(1))
        with pytest.raises(ChannelError, match="round 1 was never posted"):
            channels[0].poll(1)
        channels[0].post(vote_of(1))
        assert read(channels[0], 1) is not None
        with pytest.raises(ChannelError, match="round 1 was never posted"):
            channels[0].poll(1)


def test_one_rank_alone_reads_its_own_vote() -> None:
    """A domain of one rank needs no connection and no wait."""
    with meshed(1) as channels:
        channels[0].post(vote_of(3, stop=4))
        channels[0].wait(3, 3600.0)
        assert channels[0].poll(3) == Tally(vote_of(3, stop=4), vote_of(3, stop=4))


def test_closing_again_does_nothing() -> None:
    """close() may be called twice, and with votes in it that nobody has read."""
    with meshed(2) as channels:
        channels[1].post(vote_of(1))
        channels[0].close()
        channels[0].close()


@pytest.fixture
def narrow() -> Iterator[tuple[_Peer, _Peer]]:
    """The two ends of a TCP connection that takes few votes before its reader reads them."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SMALL_BUFFER)
        left = socket.create_connection(listener.getsockname())
        right, _ = listener.accept()
    left.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SMALL_BUFFER)
    with left, right:
        left.setblocking(False)
        right.setblocking(False)
        yield _Peer(1, left), _Peer(0, right)


def test_votes_that_the_system_does_not_take_are_sent_later(narrow: tuple[_Peer, _Peer]) -> None:
    """With a full send buffer send() keeps the votes; once the other side reads they all arrive, whole and in order."""
    sender, reader = narrow
    sent = []
    while len(sender._unsent) < 10_000:
        sent.append(_message(vote_of(len(sent))))
        sender.send(sent[-1])
    received: list[bytes] = []
    while len(received) < len(sent):
        received += reader.receive()
        assert reader.error == ""
        sender.send()
    assert received == sent
    assert sender._unsent == b""


def test_what_was_sent_before_close_arrives_though_something_was_unread(narrow: tuple[_Peer, _Peer]) -> None:
    """Votes that the system still holds when a rank closes arrive, also where votes of others are unread there."""
    sender, reader = narrow
    message, num_sent = _message(vote_of(1)), 0
    while not sender._unsent:
        sender.send(message)
        num_sent += 1
    reader.send(message)
    sender.close()
    received: list[bytes] = []
    while not reader.error:
        received += reader.receive()
    assert reader.error == "closed by that rank"
    assert num_sent - len(received) in (0, 1)  # the last one was kept, and leaves if there is room at the close


class _Reluctant:
    """A connection that takes nothing at first, and then a few bytes of the first message."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._takes = [0, 0, 5]

    def send(self, data: bytes) -> int:
        if not self._takes:
            return self._connection.send(data)
        if not (size := self._takes.pop(0)):
            raise BlockingIOError
        return self._connection.send(data[:size])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)


@pytest.mark.parametrize("how", ["poll", "wait"])
def test_a_vote_that_was_kept_leaves_when_the_round_is_read(how: str) -> None:
    """A rank that has all votes still sends its own, which the system did not take when it was posted."""
    with meshed(2) as channels:
        peer = channels[0]._peers[0]
        peer._connection = _Reluctant(peer._connection)  # type: ignore[assignment]
        channels[0].post(vote_of(1, stop=3))
        if how == "wait":
            channels[0].wait(1, 0.05)
        else:
            assert [channels[0].poll(1) for _ in range(3)] == [None] * 3
        assert peer._unsent == b""
        channels[1].post(vote_of(1))
        assert read(channels[1], 1) == tally_votes([vote_of(1), vote_of(1, stop=3)])
