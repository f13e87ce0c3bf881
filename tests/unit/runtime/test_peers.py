"""Connecting ranks to each other: who belongs to them, who does not, and who does not come."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch.distributed as dist

from eplb_fsm.errors import ConfigError, ConsensusTimeout
from eplb_fsm.runtime import peers
from eplb_fsm.runtime.domain import Domain
from tests.unit.runtime.meshes import PATIENT_S, Meeting

_Peers = dict[int, socket.socket]
_OWN = -1
"""The test's own connection to the store."""


class _Ranks:
    """Threads that connect, each as one rank."""

    def __init__(self, world_size: int) -> None:
        self._meeting = Meeting()
        self._world_size = world_size
        self._threads = ThreadPoolExecutor(world_size)
        self._started: list[Future[_Peers]] = []

    def start(self, rank: int, timeout_s: float = PATIENT_S) -> Future[_Peers]:
        """Connect one rank in a thread."""
        domain = Domain(rank, self._world_size)
        future = self._threads.submit(peers.connect_peers, domain, self._meeting.store(rank), "vote", timeout_s)
        self._started.append(future)
        return future

    def where(self, rank: int) -> tuple[tuple[str, int], bytes]:
        """Wait until a rank has said where it listens; return address and token, as only who reads the store has it."""
        view = Domain(rank, self._world_size).store(self._meeting.store(_OWN), "vote")
        address, port, token = json.loads(view.get(str(rank)))
        return (address, port), bytes.fromhex(token)

    def close(self) -> None:
        """Wait for the threads and close what they have connected."""
        self._threads.shutdown()
        for future in self._started:
            if future.exception() is None:
                for connection in future.result().values():
                    connection.close()


@contextlib.contextmanager
def _ranks(world_size: int) -> Iterator[_Ranks]:
    with contextlib.closing(_Ranks(world_size)) as ranks:
        yield ranks


def _is_turned_away(intruder: socket.socket) -> bool:
    intruder.settimeout(PATIENT_S)
    try:
        return intruder.recv(1) == b""
    except ConnectionResetError:
        return True


def test_every_rank_is_connected_to_every_other() -> None:
    """What a rank sends to another arrives there, on the connection that stands for the first; none of them blocks."""
    with _ranks(4) as ranks:
        connected = [future.result() for future in [ranks.start(rank) for rank in range(4)]]
        for rank, found in enumerate(connected):
            assert sorted(found) == [other for other in range(4) if other != rank]
            for other, connection in found.items():
                assert connection.getblocking() is False
                assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                connection.send(bytes([rank, other]))
        for rank, found in enumerate(connected):
            for other, connection in found.items():
                connection.settimeout(PATIENT_S)
                assert connection.recv(2) == bytes([other, rank])


def test_a_rank_alone_is_connected_to_nobody() -> None:
    """A domain of one rank starts without a wait."""
    with _ranks(1) as ranks:
        assert ranks.start(0).result() == {}


@pytest.mark.parametrize("what", ["another token", "garbage", "too little", "nothing", "nothing, and goes"])
def test_an_intruder_is_turned_away_and_the_ranks_find_each_other(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever does not know the token, says something else or says nothing, is closed, and the start goes on."""
    monkeypatch.setattr(peers, "_HELLO_TIMEOUT_S", 0.1)
    says = {
        "another token": struct.pack("!I16s", 1, b"\0" * 16),
        "garbage": b"GET / HTTP/1.1\r\nHost: somebody\r\n\r\n" * 100,
        "too little": b"\0\0\0\1abc",
    }
    with _ranks(2) as ranks:
        first = ranks.start(0)
        address, _ = ranks.where(0)
        with socket.create_connection(address) as intruder, contextlib.suppress(ConnectionError):
            intruder.sendall(says.get(what, b""))
            if what == "nothing, and goes":
                intruder.close()
            else:
                assert _is_turned_away(intruder)
        second = ranks.start(1)
        first.result()[1].send(b"!")
        second.result()[0].settimeout(PATIENT_S)
        assert second.result()[0].recv(1) == b"!"


def test_who_knocks_first_does_not_keep_the_ranks_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several that only stand there, before and while the ranks come, do not take anybody's place."""
    monkeypatch.setattr(peers, "_HELLO_TIMEOUT_S", 0.1)
    with _ranks(3) as ranks, contextlib.ExitStack() as intruders:
        started = [ranks.start(0)]
        for rank in (1, 2):
            for _ in range(3):
                intruders.enter_context(socket.create_connection(ranks.where(0)[0]))
            started.append(ranks.start(rank))
        assert [sorted(future.result()) for future in started] == [[1, 2], [0, 2], [0, 1]]


def test_a_rank_whose_hello_comes_in_pieces_is_taken() -> None:
    """A network that cuts the hello in two turns no rank away: it would not knock again."""
    with _ranks(2) as ranks:
        first = ranks.start(0, timeout_s=10.0)
        address, token = ranks.where(0)
        hello = struct.pack("!I16s", 1, token)
        with socket.create_connection(address) as peer:
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for piece in (hello[:3], hello[3:19], hello[19:]):
                peer.sendall(piece)
                time.sleep(0.05)
            first.result()[1].send(b"!")
            peer.settimeout(PATIENT_S)
            assert peer.recv(1) == b"!"


@pytest.mark.parametrize("absent", [0, 2])
def test_a_rank_that_does_not_come_is_named(absent: int) -> None:
    """Every rank that came names the one that did not, and nobody else."""
    with _ranks(4) as ranks:
        for future in [ranks.start(rank, timeout_s=2.0) for rank in range(4) if rank != absent]:
            with pytest.raises(ConsensusTimeout, match=rf"the vote connections to ranks \[{absent}\] could") as caught:
                future.result()
            assert caught.value.ranks == (absent,)


def test_after_a_failed_start_nothing_is_left_open() -> None:
    """A rank that gave up listens no more, and has closed what it had connected."""
    with _ranks(3) as ranks:
        first = ranks.start(0, timeout_s=1.0)
        address, token = ranks.where(0)
        with socket.create_connection(address) as second:
            second.sendall(struct.pack("!I16s", 1, token))
            with pytest.raises(ConsensusTimeout):
                first.result()
            assert _is_turned_away(second)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)


def test_the_network_is_that_on_which_the_store_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """The address is looked for behind every prefix that a launcher has put before the store."""
    monkeypatch.setattr(socket, "gethostname", lambda: pytest.fail("the name of this host is not asked for"))
    behind = Meeting().store(_OWN)
    for store in (behind.underlying_store, behind, dist.PrefixStore("more", behind)):
        assert peers._own_address(store) == "127.0.0.1"


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the address")
def test_the_interface_of_gloo_is_that_of_the_votes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks listen at its address, whatever the store's host is called; one that has none is named."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo,eth7")
    find = socket.getaddrinfo

    def know_no_store(*args: Any, **kwargs: Any) -> Any:
        assert kwargs.get("type") != socket.SOCK_DGRAM, "asked for the way to the store's host"
        return find(*args, **kwargs)

    monkeypatch.setattr(peers.socket, "getaddrinfo", know_no_store)
    with _ranks(2) as ranks:
        ranks.start(0)
        assert ranks.where(0)[0][0] == "127.0.0.1"
        ranks.start(1).result()
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-one")
    with _ranks(2) as ranks, pytest.raises(ConsensusTimeout, match="IFNAME = 'no-such-one': no such interface"):
        ranks.start(0).result()


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the address")
def test_an_address_is_looked_for_before_ranks_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong with this rank alone is its own error, before others wait for it."""
    store = Meeting().store(_OWN)
    peers.check_address(store)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-one")
    with pytest.raises(ConfigError, match=r"no such interface has an IPv4 address.*or have GLOO_SOCKET_IFNAME name"):
        peers.check_address(store)
