"""One TCP connection between this rank and every other: what has no threads, and so wakes none.

Ranks find each other through the store. Each listens at the address from which it reaches the store's host, or at that
of the interface which ``GLOO_SOCKET_IFNAME`` names, as for gloo. It tells the others, connects to the ranks below it
and is connected to by those above.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
import socket
import struct
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta

import torch.distributed as dist

from eplb_fsm.errors import ConfigError, ConsensusTimeout
from eplb_fsm.runtime.domain import Domain

_TOKEN_BYTES = 16
_HELLO = struct.Struct(f"!I{_TOKEN_BYTES}s")
"""What the one who connects says first: its rank, and the token of the one it connects to."""
_HELLO_TIMEOUT_S = 5.0
_ANY_PORT = 0
_INTERFACE_VARIABLE = "GLOO_SOCKET_IFNAME"
_SIOCGIFADDR = 0x8915
"""Linux's request for the IPv4 address of an interface (netdevice(7))."""
_IFREQ = struct.Struct("16s4x4s16x")
"""Its argument: the name, and an address at its place in a ``sockaddr_in``."""


def connect_peers(domain: Domain, store: dist.Store, purpose: str, timeout_s: float) -> dict[int, socket.socket]:
    """Connect every rank of a domain to every other; blocks until all have come.

    Args:
        domain: The ranks.
        store: Where they find each other; of a ``TCPStore``, also behind a prefix, the host tells which network to use
            where ``GLOO_SOCKET_IFNAME`` does not.
        purpose: Keeps the connections of a domain apart in the store.
        timeout_s: Longest wait for the others.

    Returns:
        By rank, a non-blocking socket that sends at once what it is given.

    Raises:
        ConsensusTimeout: Naming the ranks that could not be connected.
    """
    view = domain.store(store, purpose)
    deadline = time.monotonic() + timeout_s
    peers: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as opened:
        try:
            listener, token = _listen(_own_address(store)), secrets.token_bytes(_TOKEN_BYTES)
            with listener:
                view.set(str(domain.rank), json.dumps([*listener.getsockname()[:2], token.hex()]))
                for rank in range(domain.rank):
                    peers[rank] = opened.enter_context(_call(view, rank, domain.rank, deadline))
                while missing := _missing(domain, peers):
                    rank, peer = _answer(listener, token, missing, deadline)
                    peers[rank] = opened.enter_context(peer)
        except (OSError, RuntimeError) as error:  # torch's stores raise the latter
            missing = _missing(domain, peers)
            raise ConsensusTimeout(
                f"the {purpose} connections to ranks {missing} could not be made in {timeout_s} s ({error}); see the "
                "logs of the other ranks, and that they reach each other at the addresses they reach the store from "
                f"({_INTERFACE_VARIABLE} chooses others)",
                missing,
            ) from error
        opened.pop_all()
    for peer in peers.values():
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        peer.setblocking(False)
    return peers


def _missing(domain: Domain, peers: Mapping[int, socket.socket]) -> list[int]:
    """The ranks that are known not to have come."""
    for rank in range(domain.rank):
        if rank not in peers:
            return [rank]  # the ranks below are called one after the other: nothing is known of those after it
    return [rank for rank in range(domain.rank + 1, domain.world_size) if rank not in peers]


def check_address(store: dist.Store) -> None:
    """See that this rank finds an address to listen at, before it meets others.

    Raises:
        ConfigError: It does not.
    """
    try:
        _listen(_own_address(store)).close()
    except OSError as error:
        raise ConfigError(
            f"this rank has no address to connect to ({error}); let the store's host be one that this machine can "
            f"reach, or have {_INTERFACE_VARIABLE} name an interface"
        ) from error


def _own_address(store: dist.Store) -> str:
    """The address of this machine on the way to the store's host, or of the interface that was chosen."""
    interface = os.environ.get(_INTERFACE_VARIABLE, "").partition(",")[0]
    if interface and sys.platform == "linux":
        return _address_of(interface)
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    host, port = (store.host, store.port) if isinstance(store, dist.TCPStore) else (socket.gethostname(), 1)
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # of a datagram socket: finds the way, sends nothing
        return str(probe.getsockname()[0])


def _address_of(interface: str) -> str:
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe, _SIOCGIFADDR, _IFREQ.pack(interface.encode(), bytes(4)))
        except OSError as error:
            raise OSError(f"{_INTERFACE_VARIABLE} = {interface!r}: no such interface has an IPv4 address") from error
    return socket.inet_ntoa(_IFREQ.unpack(answer)[1])


def _listen(address: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server((address, _ANY_PORT), family=family, backlog=socket.SOMAXCONN)


def _call(view: dist.Store, rank: int, own_rank: int, deadline: float) -> socket.socket:
    view.wait([str(rank)], timedelta(seconds=_left(deadline)))
    address, port, token = json.loads(view.get(str(rank)))
    peer = socket.create_connection((address, port), timeout=_left(deadline))
    try:
        peer.sendall(_HELLO.pack(own_rank, bytes.fromhex(token)))
    except OSError:
        peer.close()
        raise
    return peer


def _answer(
    listener: socket.socket, token: bytes, missing: Sequence[int], deadline: float
) -> tuple[int, socket.socket]:
    """Take the next connection of a rank that is missing; one from anybody else is closed."""
    while True:
        listener.settimeout(_left(deadline))
        caller, _ = listener.accept()
        try:
            rank, said = _HELLO.unpack(_read_hello(caller, min(deadline, time.monotonic() + _HELLO_TIMEOUT_S)))
        except (OSError, struct.error):
            caller.close()
            continue
        if hmac.compare_digest(said, token) and rank in missing:
            return rank, caller
        caller.close()


def _read_hello(caller: socket.socket, deadline: float) -> bytes:
    hello = b""
    while len(hello) < _HELLO.size:  # MSG_WAITALL does not wait for all where there is a timeout
        caller.settimeout(_left(deadline))
        if not (piece := caller.recv(_HELLO.size - len(hello))):
            break
        hello += piece
    return hello


def _left(deadline: float) -> float:
    left_s = deadline - time.monotonic()
    if left_s <= 0:
        raise TimeoutError("time is up")
    return left_s
