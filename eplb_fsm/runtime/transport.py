"""Transports: how load, plans and expert rows travel between the workers of the ranks.

A transport is used from the worker thread only, on a group of its own. Nothing is cancelled: what was begun is
waited for, on both sides, also when its epoch was aborted. Only then is a rank drained.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from eplb_fsm.errors import TransferError, TransportLost
from eplb_fsm.runtime.domain import Domain
from eplb_fsm.runtime.gloo import make_group
from eplb_fsm.runtime.pending import Done, Pending

_UNANSWERED_TAG = (1 << 31) - 1
"""Of no exchange: those are counted from 1."""

Parcel = tuple[int, torch.Tensor]
"""The other rank, and one flat contiguous uint8 buffer."""


@dataclass(frozen=True, slots=True)
class TransportFlags:
    """What a transport is like, for the checks at construction.

    Attributes:
        is_one_sided: Receivers pull; a sent buffer is released once its readers reported done.
        enqueues_on_decode_thread: It must be driven from ``step()``, at agreed steps.
        is_device_direct: It moves device memory without a copy through the host.
    """

    is_one_sided: bool = False
    enqueues_on_decode_thread: bool = False
    is_device_direct: bool = False


class Transport(Protocol):
    """The seam to a data plane; worker thread only, and nothing here blocks.

    Every method, and what it returns, raises ``TransferError`` on failure, and ``TransportLost`` where nothing can be
    sent any more.
    """

    @property
    def flags(self) -> TransportFlags:
        """What this transport is like."""
        ...

    def begin(self, sends: Sequence[Parcel], receives: Sequence[Parcel], tag: int) -> Pending:
        """Start one exchange; done once every receive is complete and no send is read any more.

        Args:
            sends: For each receiving rank its parcel; not written until done.
            receives: For each sending rank where its parcel goes; not read until done.
            tag: Number of the exchange, counted alike on all ranks.
        """
        ...

    def all_reduce_sum(self, tensor: torch.Tensor) -> Pending:
        """Sum an int64 tensor over the ranks, in place."""
        ...

    def broadcast(self, tensor: torch.Tensor, root: int) -> Pending:
        """Give root's tensor to all ranks, in place; equal shape and dtype everywhere."""
        ...

    def close(self) -> None:
        """Release the group; what still waits on it ends with an error. Any thread."""
        ...


class GlooTransport:
    """The reference transport: one gloo group of its own, CPU memory.

    Args:
        domain: Ranks of the group.
        store: Where they find each other. Blocks until all ranks have connected.
        timeout_s: Longest time for one operation; after it the group is lost.
        start_timeout_s: Longest wait for the others here; None: ``timeout_s``.
    """

    flags = TransportFlags()

    def __init__(
        self, domain: Domain, store: dist.Store, timeout_s: float, *, start_timeout_s: float | None = None
    ) -> None:
        self._group = make_group(domain, store, "transfer", timeout_s, start_timeout_s=start_timeout_s)
        self._world_size = domain.world_size
        self._other_rank = (domain.rank + 1) % domain.world_size

    def begin(self, sends: Sequence[Parcel], receives: Sequence[Parcel], tag: int) -> Pending:
        """Post all receives, then all sends: one message for each peer."""
        works = [self._start(self._group.recv, [buffer], peer, tag) for peer, buffer in receives]
        works += [self._start(self._group.send, [buffer], peer, tag) for peer, buffer in sends]
        return _Works(works)

    def all_reduce_sum(self, tensor: torch.Tensor) -> Pending:
        """Sum in place."""
        return _Works([self._start(self._group.allreduce, [tensor], dist.AllreduceOptions())])

    def broadcast(self, tensor: torch.Tensor, root: int) -> Pending:
        """Broadcast in place."""
        options = dist.BroadcastOptions()
        options.rootRank = root
        return _Works([self._start(self._group.broadcast, [tensor], options)])

    def close(self) -> None:
        """Drop the group, and end what still waits on it with an error.

        Gloo can neither cancel a wait nor end one by closing its group. What it does is to close all connections of a
        group in which one receive has timed out; so one is posted that nobody answers.
        """
        if self._world_size > 1:
            nothing = torch.empty(1, dtype=torch.uint8)
            with contextlib.suppress(RuntimeError):
                self._group.recv([nothing], self._other_rank, _UNANSWERED_TAG).wait(timedelta(milliseconds=1))
        self._group.shutdown()

    @staticmethod
    def _start(operation: Callable[..., Any], *args: object) -> Any:
        try:
            return operation(*args)
        except RuntimeError as error:
            raise TransportLost(f"the transfer group is lost: {error}") from error


class _Works:
    """Several gloo works. Point-to-point works report completion only to who waits, so poll() cannot."""

    def __init__(self, works: list[Any]) -> None:
        self._works = works

    def poll(self) -> bool:
        return all(work.is_completed() for work in self._works)

    def wait(self, timeout_s: float) -> None:
        for work in self._works:
            try:
                work.wait(timedelta(seconds=timeout_s))
            except RuntimeError as error:
                raise TransportLost(f"a transfer failed or took more than {timeout_s} s: {error}") from error


class InMemoryExchange:
    """Where the in-memory transports of one domain meet; copies happen when both sides are there.

    Args:
        world_size: Number of ranks.
        is_one_sided: Receivers pull from the sender's parcel, which is released when they have; else the
            sender's parcel is copied out as soon as it is sent.
    """

    def __init__(self, world_size: int, *, is_one_sided: bool = False) -> None:
        self.world_size = world_size
        self.is_one_sided = is_one_sided
        self.parcels: dict[tuple[int, int, int], torch.Tensor] = {}
        """By (tag, sender, receiver): sent and not received yet."""
        self.offers: dict[tuple[str, int], dict[int, torch.Tensor]] = {}
        """Tensors of a collective, by its name and number, from each rank that has joined it."""


class InMemoryTransport:
    """One rank's end of an :class:`InMemoryExchange`."""

    def __init__(self, exchange: InMemoryExchange, rank: int) -> None:
        self._exchange = exchange
        self._rank = rank
        self._num_collectives = 0
        self.flags = TransportFlags(is_one_sided=exchange.is_one_sided)

    def begin(self, sends: Sequence[Parcel], receives: Sequence[Parcel], tag: int) -> Pending:
        """Offer the sends; the receives are made when their senders have offered."""
        for peer, buffer in sends:
            parcel = buffer if self._exchange.is_one_sided else buffer.clone()
            self._exchange.parcels[tag, self._rank, peer] = parcel
        kept = [(tag, self._rank, peer) for peer, _ in sends] if self._exchange.is_one_sided else []
        wanted = {(tag, peer, self._rank): buffer for peer, buffer in receives}
        return _InMemoryParcels(self._exchange, wanted, kept)

    def all_reduce_sum(self, tensor: torch.Tensor) -> Pending:
        """Sum once all ranks have joined."""
        return self._join("sum", tensor, lambda offers: torch.stack(list(offers.values())).sum(0))

    def broadcast(self, tensor: torch.Tensor, root: int) -> Pending:
        """Take root's tensor once all ranks have joined."""
        return self._join("broadcast", tensor, lambda offers: offers[root])

    def _join(
        self, name: str, tensor: torch.Tensor, combine: Callable[[dict[int, torch.Tensor]], torch.Tensor]
    ) -> Pending:
        if self._exchange.world_size == 1:
            return Done()
        key = (name, self._num_collectives)
        self._num_collectives += 1
        offers = self._exchange.offers.setdefault(key, {})
        offers[self._rank] = tensor.clone()
        return _InMemoryCollective(self._exchange, key, self._rank, tensor, combine)

    def close(self) -> None:
        """Nothing to release."""


class _Cooperative:
    """Waiting makes sense only where another thread could make progress, and here there is none."""

    def poll(self) -> bool:
        raise NotImplementedError

    def wait(self, timeout_s: float) -> None:
        if not self.poll():
            raise TransferError("an in-memory transfer was waited for before the other ranks had joined it")


class _InMemoryParcels(_Cooperative):
    def __init__(
        self,
        exchange: InMemoryExchange,
        wanted: dict[tuple[int, int, int], torch.Tensor],
        kept: list[tuple[int, int, int]],
    ) -> None:
        self._exchange = exchange
        self._wanted = wanted
        self._kept = kept

    def poll(self) -> bool:
        for key in list(self._wanted):
            parcel = self._exchange.parcels.get(key)
            if parcel is not None:
                self._wanted.pop(key).copy_(parcel)
                del self._exchange.parcels[key]
        return not self._wanted and not any(key in self._exchange.parcels for key in self._kept)


class _InMemoryCollective(_Cooperative):
    def __init__(
        self,
        exchange: InMemoryExchange,
        key: tuple[str, int],
        rank: int,
        tensor: torch.Tensor,
        combine: Callable[[dict[int, torch.Tensor]], torch.Tensor],
    ) -> None:
        self._exchange = exchange
        self._key = key
        self._rank = rank
        self._tensor = tensor
        self._combine = combine
        self._is_done = False

    def poll(self) -> bool:
        if self._is_done:
            return True
        offers = self._exchange.offers[self._key]
        if len(offers) < self._exchange.world_size:
            return False
        self._tensor.copy_(self._combine(offers))
        self._is_done = True
        self._leave(offers)
        return True

    def _leave(self, offers: dict[int, torch.Tensor]) -> None:
        """Forget the collective once every rank has its result."""
        left = self._exchange.offers.setdefault(("left", self._key[1]), {})
        left[self._rank] = self._tensor
        if len(left) == len(offers):
            del self._exchange.offers[self._key], self._exchange.offers["left", self._key[1]]
