"""Votes from every rank to every other, over connections that the decode thread itself writes and reads.

Nothing here has a thread. A gloo group has three, and where cores are few they cost the step what they were to save
it: whoever waits for a core meanwhile gets it when they wake, and one of them turns idly, for as long as the scheduler
lets it, while another that was interrupted holds the lock it wants (``docs/decisions/0013-votes-over-a-mesh.md``).
"""

from __future__ import annotations

import select
import socket
import struct
import time
from collections.abc import Mapping

import torch.distributed as dist

from eplb_fsm.core.votes import NUM_VOTE_WORDS, Tally, Vote, tally_votes
from eplb_fsm.errors import ChannelError
from eplb_fsm.runtime.domain import Domain
from eplb_fsm.runtime.peers import connect_peers

_WORDS = struct.Struct(f"<{NUM_VOTE_WORDS}q")
_ROUND_IDX = struct.Struct("<q")
_ROUND_IDX_OFFSET = _ROUND_IDX.size * Vote._fields.index("round_idx")
_RECEIVE_BYTES = 64 * _WORDS.size


class MeshVoteChannel:
    """Each vote as one small message to every other rank; each rank makes the tally of a round itself.

    A step sends and reads as many messages as there are other ranks: from 8 ranks on a reduction costs a step less in
    the median, and more in the worst case (:class:`~eplb_fsm.runtime.channel.GlooVoteChannel`).

    Args:
        domain: Ranks of the mesh.
        store: Where they find each other. Blocks until all ranks have connected.
        start_timeout_s: Longest wait for the others here.

    Raises:
        ConsensusTimeout: The ranks could not be connected.
    """

    def __init__(self, domain: Domain, store: dist.Store, *, start_timeout_s: float) -> None:
        self._rank = domain.rank
        self._world_size = domain.world_size
        peers = connect_peers(domain, store, "vote", start_timeout_s)
        self._peers = [_Peer(rank, peers[rank]) for rank in sorted(peers)]
        self._rounds: dict[int, dict[int, bytes]] = {}
        """By round and rank, the votes that are there, as they were sent."""
        self._last_read = -1

    def post(self, vote: Vote) -> None:
        """Send the vote to every rank that can be reached; who cannot shows when the round is read."""
        message = _WORDS.pack(*vote)
        self._rounds.setdefault(vote.round_idx, {})[self._rank] = message
        for peer in self._peers:
            peer.send(message)

    def poll(self, round_idx: int) -> Tally | None:
        """Return the tally once the votes of all ranks are there."""
        votes = self._rounds.get(round_idx, {})
        own = votes.get(self._rank)
        if own is None:
            raise ChannelError(f"round {round_idx} was never posted on this channel")
        for peer in self._peers:
            peer.send()  # who has all votes does not wait, while the others may wait for what is still unsent here
            if peer.rank not in votes:
                self._receive(peer)
        if len(votes) < self._world_size:
            self._check(votes)
            return None
        self._forget(round_idx)
        # Most rounds are idle ones in which all vote alike.
        if all(message == own for message in votes.values()):
            vote = Vote(*_WORDS.unpack(own))
            return Tally(vote, vote)
        return tally_votes([Vote(*_WORDS.unpack(message)) for message in votes.values()])

    def wait(self, round_idx: int, timeout_s: float) -> None:
        """Wait for the votes that are missing, or for a connection that ends."""
        votes = self._rounds.get(round_idx, {})
        deadline = time.monotonic() + max(timeout_s, 0.001)
        while missing := [peer for peer in self._peers if peer.rank not in votes]:
            if any(peer.error for peer in missing) or (left_s := deadline - time.monotonic()) <= 0:
                return
            waiting = select.poll()
            for peer in self._peers:
                peer.register(waiting, is_read=peer in missing)
            waiting.poll(left_s * 1e3)
            for peer in self._peers:
                peer.send()
            for peer in missing:
                self._receive(peer)

    def close(self) -> None:
        """Close the connections; votes that were sent are still delivered."""
        for peer in self._peers:
            peer.close()

    def _receive(self, peer: _Peer) -> None:
        for message in peer.receive():
            (round_idx,) = _ROUND_IDX.unpack_from(message, _ROUND_IDX_OFFSET)
            if round_idx > self._last_read:
                self._rounds.setdefault(round_idx, {})[peer.rank] = message

    def _check(self, votes: Mapping[int, bytes]) -> None:
        for peer in self._peers:
            if peer.error and peer.rank not in votes:
                raise ChannelError(f"the vote connection to rank {peer.rank} is lost: {peer.error}")

    def _forget(self, round_idx: int) -> None:
        self._last_read = round_idx
        for old in [idx for idx in self._rounds if idx <= round_idx]:
            del self._rounds[old]


class _Peer:
    """The connection to one rank.

    Attributes:
        error: Why it has ended, empty while it has not; found by :meth:`receive` after all that had arrived before.
    """

    def __init__(self, rank: int, connection: socket.socket) -> None:
        self.rank = rank
        self.error = ""
        self._connection = connection
        self._takes_votes = True
        self._unsent = b""
        self._incomplete = b""

    def send(self, message: bytes = b"") -> None:
        """Send, after what the system did not take before; what it does not take now is kept for the next call."""
        unsent = self._unsent + message
        if not unsent or not self._takes_votes:
            return
        try:
            num_sent = self._connection.send(unsent)
        except BlockingIOError:
            num_sent = 0
        except OSError:  # what that rank has sent can still be read, so that only receiving tells that it is lost
            self._takes_votes, num_sent = False, len(unsent)
        self._unsent = unsent[num_sent:]

    def receive(self) -> list[bytes]:
        """Return the whole messages that have arrived."""
        if self.error:  # asked again, the system would not give it again
            return []
        try:
            arrived = self._connection.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return []
        except OSError as error:
            self.error = str(error)
            return []
        if not arrived:
            self.error = "closed by that rank"
            return []
        arrived = self._incomplete + arrived
        end = len(arrived) - len(arrived) % _WORDS.size
        self._incomplete = arrived[end:]
        return [arrived[i : i + _WORDS.size] for i in range(0, end, _WORDS.size)]

    def register(self, waiting: select.poll, *, is_read: bool) -> None:
        """Have a wait end when there is something to receive, or room for what could not be sent."""
        events = (select.POLLIN if is_read else 0) | (select.POLLOUT if self._unsent else 0)
        if events:
            waiting.register(self._connection, events)

    def close(self) -> None:
        """Close the connection, after a try to send what is left."""
        self.send()
        # A connection closed with something unread in it is reset, and what was sent on it may get lost.
        while self.receive():
            pass
        self._connection.close()
