"""Vote channels: how the votes of a round reach every rank.

A channel carries rounds in order. Posting never blocks; whether a round is complete can be asked without
blocking. Votes are posted from the decode thread only, over connections of their own.

:class:`~eplb_fsm.runtime.mesh.MeshVoteChannel` is the default up to 16 ranks, :class:`GlooVoteChannel` beyond.
"""

from __future__ import annotations

import struct
from collections import deque
from datetime import timedelta
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist

from eplb_fsm.core.votes import NUM_VOTE_WORDS, Tally, Vote, decode_tally, encode_vote, tally_votes
from eplb_fsm.errors import ChannelError
from eplb_fsm.runtime.domain import Domain
from eplb_fsm.runtime.gloo import make_group

_WORDS = struct.Struct(f"{2 * NUM_VOTE_WORDS}q")


class VoteChannel(Protocol):
    """The seam to whatever carries votes."""

    def post(self, vote: Vote) -> None:
        """Send this rank's vote; decode thread, never blocks.

        Raises:
            ChannelError: If the channel is lost.
        """
        ...

    def poll(self, round_idx: int) -> Tally | None:
        """Return the tally of a round once the votes of all ranks are there, else None; never blocks.

        Raises:
            ChannelError: If the channel is lost.
        """
        ...

    def wait(self, round_idx: int, timeout_s: float) -> None:
        """Block until :meth:`poll` has something to say, at most ``timeout_s``; raises nothing."""
        ...

    def close(self) -> None:
        """Release the channel; votes that were posted may still be delivered."""
        ...


class _Ballot(NamedTuple):
    """Words for an all-reduce, and the memory under them: reading and writing there costs less than any tensor call."""

    buffer: bytearray
    words: torch.Tensor

    @classmethod
    def make(cls) -> _Ballot:
        buffer = bytearray(_WORDS.size)
        return cls(buffer, torch.frombuffer(buffer, dtype=torch.int64))


class _Posted(NamedTuple):
    vote: Vote
    sent: bytes
    ballot: _Ballot
    work: Any


class GlooVoteChannel:
    """One asynchronous MAX all-reduce of ``2 * NUM_VOTE_WORDS`` int64 on a gloo group of its own.

    The group's own timeout is kept far above the vote timeout: a gloo group is broken for good after a timeout
    of its own, while a bounded wait on a work leaves it usable, so that a last STOP vote still gets through. Once a
    rank has ended it is broken, too, and reaches nobody.

    One of its threads reads and writes, and may turn idly for milliseconds where cores are few; see
    :class:`~eplb_fsm.runtime.mesh.MeshVoteChannel`.

    Args:
        domain: Ranks of the group.
        store: Where they find each other. Blocks until all ranks have connected.
        timeout_s: The group's own timeout.
        start_timeout_s: Longest wait for the others here; None: ``timeout_s``.
    """

    def __init__(
        self, domain: Domain, store: dist.Store, timeout_s: float, *, start_timeout_s: float | None = None
    ) -> None:
        self._group = make_group(domain, store, "vote", timeout_s, start_timeout_s=start_timeout_s)
        options: Any = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MAX
        self._options = options
        self._pending: deque[_Posted] = deque()
        self._spare: list[_Ballot] = []
        """Of rounds that are complete."""

    def post(self, vote: Vote) -> None:
        """Enqueue the all-reduce of this round."""
        ballot = self._spare.pop() if self._spare else _Ballot.make()
        sent = _WORDS.pack(*encode_vote(vote))
        ballot.buffer[:] = sent
        try:
            work = self._group.allreduce([ballot.words], self._options)
        except RuntimeError as error:
            raise ChannelError(f"the vote group is lost: {error}") from error
        self._pending.append(_Posted(vote, sent, ballot, work))

    def poll(self, round_idx: int) -> Tally | None:
        """Return the tally once the all-reduce is complete."""
        posted = self._find(round_idx)
        if not posted.work.is_completed():
            return None
        try:
            posted.work.wait()
        except RuntimeError as error:
            raise ChannelError(f"the vote group is lost: {error}") from error
        buffer = posted.ballot.buffer
        # Most rounds are idle ones in which all vote alike: then the votes' maximum is what was sent.
        alike = buffer == posted.sent
        tally = Tally(posted.vote, posted.vote) if alike else decode_tally(_WORDS.unpack_from(buffer))
        while self._pending and self._pending[0].vote.round_idx <= round_idx:
            read = self._pending.popleft()
            if read is posted or read.work.is_completed():  # else gloo may still write it
                self._spare.append(read.ballot)
        return tally

    def wait(self, round_idx: int, timeout_s: float) -> None:
        """Wait for the all-reduce; a failure shows in the next :meth:`poll`."""
        try:
            self._find(round_idx).work.wait(timedelta(seconds=max(timeout_s, 0.001)))
        except RuntimeError:
            return

    def _find(self, round_idx: int) -> _Posted:
        for posted in self._pending:
            if posted.vote.round_idx == round_idx:
                return posted
        raise ChannelError(f"round {round_idx} was never posted on this channel")

    def close(self) -> None:
        """Drop the group; a vote under way is finished by its own thread first where the peers are there."""
        for posted in self._pending:
            try:
                posted.work.wait(timedelta(seconds=0.2))
            except RuntimeError:
                break
        self._pending.clear()
        self._group.shutdown()


class PiggybackVoteChannel:
    """Votes that ride on a collective which the engine runs in every forward pass anyway.

    The engine puts :meth:`outgoing` into its collective and hands the words of all ranks to :meth:`deliver`.
    It must cover exactly the ranks of the domain: an all-gather, or a SUM over one-hot columns made with
    :meth:`outgoing_columns`. For an int32 collective split words with :func:`split_int32`.
    """

    def __init__(self, domain: Domain) -> None:
        self._domain = domain
        self._outgoing = torch.zeros(NUM_VOTE_WORDS, dtype=torch.int64)
        self._votes: dict[int, dict[int, Vote]] = {}
        self._posted: deque[Vote] = deque()
        self._overdue_round = -1

    def post(self, vote: Vote) -> None:
        """Keep the vote for the next collective."""
        self._posted.append(vote)

    def outgoing(self) -> torch.Tensor:
        """Return this rank's words, int64 ``(NUM_VOTE_WORDS,)``; all zero when there is nothing to say.

        Decode thread, before the engine's collective of a pass; valid until the next call.
        """
        if self._posted:
            self._outgoing.copy_(torch.tensor(self._posted.popleft(), dtype=torch.int64))
        else:
            self._outgoing.zero_()
        return self._outgoing

    def outgoing_columns(self) -> torch.Tensor:
        """Return ``(world_size, NUM_VOTE_WORDS)`` int64, zero but for this rank's row, for a SUM."""
        columns = torch.zeros(self._domain.world_size, NUM_VOTE_WORDS, dtype=torch.int64)
        columns[self._domain.rank] = self.outgoing()
        return columns

    def deliver(self, gathered: torch.Tensor) -> None:
        """Take the words of all ranks, int64 ``(world_size, NUM_VOTE_WORDS)``; decode thread.

        Raises:
            ChannelError: If it does not hold one row for each rank of the domain.
        """
        wanted = (self._domain.world_size, NUM_VOTE_WORDS)
        if tuple(gathered.shape) != wanted:
            raise ChannelError(
                f"the engine's collective delivered words of shape {tuple(gathered.shape)}, not {wanted}: it must "
                "cover exactly the ranks of the domain; use the mesh or gloo channel where it does not"
            )
        rows: list[list[int]] = gathered.tolist()
        for rank, row in enumerate(rows):
            if any(row):  # a rank that stops says so in a pass in which the others have nothing to say
                vote = Vote(*row)
                self._votes.setdefault(vote.round_idx, {})[rank] = vote

    def poll(self, round_idx: int) -> Tally | None:
        """Return the tally of a round once the votes of all ranks were delivered."""
        votes = self._votes.get(round_idx, {})
        if len(votes) < self._domain.world_size:
            if round_idx == self._overdue_round:
                raise ChannelError(
                    f"the engine's collective has not delivered the votes of round {round_idx}: it must carry "
                    "outgoing() to deliver() in every forward pass, before step(); raise lag if it delivers later"
                )
            return None
        for old in [idx for idx in self._votes if idx <= round_idx]:
            del self._votes[old]
        return tally_votes(votes.values())

    def wait(self, round_idx: int, timeout_s: float) -> None:
        """Return at once, and let :meth:`poll` give up: the collective runs in the forward pass, not here."""
        self._overdue_round = round_idx

    def close(self) -> None:
        """Forget what was delivered; a last vote still leaves with the next collective."""
        self._votes.clear()


def split_int32(words: torch.Tensor) -> torch.Tensor:
    """Return int64 words of shape ``(..., n)`` as int32 ``(..., 2 * n)``, low half first in each pair."""
    return words.contiguous().view(torch.int32)


def join_int32(halves: torch.Tensor) -> torch.Tensor:
    """Return the int64 words of :func:`split_int32`."""
    return halves.to(torch.int32).contiguous().view(torch.int64)


class InMemoryBallotBox:
    """Where the in-memory channels of one domain meet; one process, any scheduler."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._votes: dict[int, list[Vote]] = {}
        self._tallies: dict[int, Tally] = {}
        self._num_readers: dict[int, int] = {}

    def put(self, vote: Vote) -> None:
        """Add one rank's vote to its round."""
        self._votes.setdefault(vote.round_idx, []).append(vote)

    def tally(self, round_idx: int) -> Tally | None:
        """Return the tally once all ranks have voted."""
        tally = self._tallies.get(round_idx)
        votes = self._votes.get(round_idx, ())
        if tally is None and len(votes) == self.world_size:
            tally = self._tallies[round_idx] = tally_votes(votes)
        return tally

    def forget(self, round_idx: int) -> None:
        """Note that one more rank has read the round; its votes go when all have."""
        readers = self._num_readers.get(round_idx, 0) + 1
        if readers == self.world_size:
            self._votes.pop(round_idx, None)
            self._tallies.pop(round_idx, None)
            self._num_readers.pop(round_idx, None)
        else:
            self._num_readers[round_idx] = readers


class InMemoryVoteChannel:
    """One rank's end of an :class:`InMemoryBallotBox`.

    Attributes:
        is_lost: Set it to make the channel fail, as a broken group would.
        held_from: Rounds from this one on do not reach this rank, as on a slow network.
    """

    def __init__(self, box: InMemoryBallotBox) -> None:
        self._box = box
        self.is_lost = False
        self.held_from = 1 << 62

    def post(self, vote: Vote) -> None:
        """Put the vote into the box."""
        if self.is_lost:
            raise ChannelError("the in-memory channel was cut")
        self._box.put(vote)

    def poll(self, round_idx: int) -> Tally | None:
        """Return the tally once it is complete and has been delivered to this rank."""
        if self.is_lost:
            raise ChannelError("the in-memory channel was cut")
        if round_idx >= self.held_from:
            return None
        tally = self._box.tally(round_idx)
        if tally is not None:
            self._box.forget(round_idx)
        return tally

    def wait(self, round_idx: int, timeout_s: float) -> None:
        """Return at once: the scheduler decides when the others run."""

    def close(self) -> None:
        """Nothing to release."""
