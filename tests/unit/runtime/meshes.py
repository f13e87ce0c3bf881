"""Ranks of a mesh as threads of one process, over real sockets and a real store."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import torch.distributed as dist

from eplb_fsm.core.votes import Tally, Vote
from eplb_fsm.runtime.domain import Domain
from eplb_fsm.runtime.mesh import MeshVoteChannel

PATIENT_S = 60.0
"""More than anything here takes; what is not there by then fails the test."""


_numbers = itertools.count()


class Meeting:
    """A part of the store that no other test uses, behind a launcher's prefix."""

    def __init__(self) -> None:
        self._number = next(_numbers)

    def store(self, who: int) -> dist.Store:
        """The store as a rank, or any other number, has it: a wait of one must not hold up another one."""
        return dist.PrefixStore(f"launcher/{self._number}", _client(who))


@functools.cache
def _server() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=PATIENT_S), wait_for_workers=False)


@functools.cache
def _client(who: int) -> dist.TCPStore:
    # Made once: torch looks the host's name up each time, which takes seconds where nobody answers.
    return dist.TCPStore("127.0.0.1", _server().port, None, False, timedelta(seconds=PATIENT_S), wait_for_workers=False)


@contextlib.contextmanager
def meshed(world_size: int) -> Iterator[list[MeshVoteChannel]]:
    """Connect the channels of so many ranks, and close them."""
    meeting = Meeting()
    stores = [meeting.store(rank) for rank in range(world_size)]

    def connect(rank: int) -> MeshVoteChannel:
        return MeshVoteChannel(Domain(rank, world_size), stores[rank], start_timeout_s=PATIENT_S)

    with ThreadPoolExecutor(world_size) as threads:
        channels = list(threads.map(connect, range(world_size)))
    try:
        yield channels
    finally:
        for channel in channels:
            channel.close()


def vote_of(round_idx: int, **words: int) -> Vote:
    """A vote whose other words are all one."""
    return Vote(**(dict.fromkeys(Vote._fields, 1) | {"round_idx": round_idx} | words))


def read(channel: MeshVoteChannel, round_idx: int) -> Tally | None:
    """Wait for a round, as a step does that is late, and read it."""
    channel.wait(round_idx, PATIENT_S)
    return channel.poll(round_idx)
