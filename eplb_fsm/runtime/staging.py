"""Staging: packing rows to send, receiving rows, and the program that makes them live.

All buffers are allocated once. The rows that one peer sends in a chunk are one contiguous range of one buffer:
one message for each peer. A row is the tensors of one expert, padded to whole words, and its hash.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from eplb_fsm.errors import ConfigError, TransferError
from eplb_fsm.placement.placement import Placement
from eplb_fsm.placement.plan import Chunk
from eplb_fsm.runtime.bank import Bank, RowLayout
from eplb_fsm.runtime.device import DeviceOps
from eplb_fsm.runtime.maps import MapWriter
from eplb_fsm.runtime.pending import Pending
from eplb_fsm.runtime.routes import Route, find_routes
from eplb_fsm.runtime.rowhash import hash_keys, hash_rows
from eplb_fsm.runtime.transport import Parcel, Transport

_BLOCK_BYTES = 1 << 20
"""Rows are packed and hashed in blocks of about this size, so that the hash reads what is still in the cache."""


class IntegrityError(TransferError):
    """A received row does not have the hash that travelled with it."""


@dataclass(slots=True)
class CommitProgram:
    """All that a commit does, prepared so that nothing in it can fail.

    Attributes:
        chunk_idx: Chunk of the plan.
        num_bytes: Bytes that this rank writes; ``num_peer_bytes`` of them came from other ranks.
        placements: The placements of all banks once this chunk is live.
        digest: Their digest.
    """

    chunk_idx: int
    num_bytes: int
    num_peer_bytes: int
    placements: tuple[Placement, ...]
    digest: int
    live_rows: list[torch.Tensor]
    staged_rows: list[torch.Tensor]
    prepared_maps: object
    map_writer: MapWriter

    def run(self) -> None:
        """Copy the staged rows over the live ones and swap the maps; enqueued on the engine's stream."""
        if self.live_rows:
            torch._foreach_copy_(self.live_rows, self.staged_rows)
        self.map_writer.write(self.prepared_maps)


class _Place(NamedTuple):
    """Where the rows of a chunk are staged."""

    bank: int
    buffer_idx: int
    stride: int
    """Bytes from one row to the next."""


class StagingArea:
    """The staging buffers of one rank; worker thread only, but for the commit program it hands out.

    Args:
        banks: All banks of the domain.
        rank: This rank.
        num_buffers: Chunks that may be staged at a time.
        commit_bytes: Most bytes that this rank writes, or sends, in one chunk.
        integrity: ``"off"``, or a kind of checking for which rows carry their hash.

    Raises:
        ConfigError: If one expert does not fit ``commit_bytes``; says how much it takes.
    """

    def __init__(
        self, banks: Sequence[Bank], rank: int, *, num_buffers: int, commit_bytes: int, integrity: str
    ) -> None:
        largest = max(bank.layout.stride for bank in banks)
        if commit_bytes < largest:
            raise ConfigError(
                f"commit_bytes = {commit_bytes}: one expert takes {largest} bytes; raise commit_bytes to at least that"
            )
        self._banks = banks
        self._rank = rank
        self._is_hashed = integrity != "off"
        self._keys = [hash_keys(bank.layout.payload_bytes // 8) for bank in banks]
        self._receive, self._send = _allocate(commit_bytes, num_buffers)
        self._views: dict[tuple[int, int, bool, int], list[torch.Tensor]] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes allocated for staging."""
        return sum(buffer.numel() for buffer in self._receive + self._send)

    def stage(
        self,
        chunk: Chunk,
        after: Pending,
        tag: int,
        transport: Transport,
        map_writer: MapWriter,
        placements: tuple[Placement, ...],
    ) -> Generator[Pending, None, CommitProgram]:
        """Stage one chunk; a job of the worker that returns the :class:`CommitProgram`.

        Order: ``after`` is the event of the last commit before it; no row is read before it is done.

        Raises:
            IntegrityError: If a received row does not match its hash.
            TransferError: If the exchange failed.
        """
        yield after
        bank = self._banks[chunk.bank]
        routes = find_routes(chunk, self._rank, bank.num_local_physical_experts)
        at = _Place(chunk.bank, chunk.idx % len(self._send), bank.layout.stride)
        for route in routes.sends:
            self._pack(at, route)
        arriving = _parcels(self._receive[at.buffer_idx], routes.receives, at.stride)
        yield transport.begin(_parcels(self._send[at.buffer_idx], routes.sends, at.stride), arriving, tag)
        self._verify(at, arriving)
        # Local copies are staged like receives: all reads of a chunk come before any of its writes.
        self._copy_live(at, routes.local.sources, routes.local.rows, is_send=False)
        live, staged = self._copies(at, [*routes.receives, routes.local])
        return CommitProgram(
            chunk_idx=chunk.idx,
            num_bytes=sum(row.numel() for row in live),
            num_peer_bytes=routes.local.first_row * at.stride,
            placements=placements,
            digest=chunk.digest_after,
            live_rows=live,
            staged_rows=staged,
            prepared_maps=map_writer.prepare(chunk.bank, chunk.layers, placements[chunk.bank]),
            map_writer=map_writer,
        )

    def verify_live(self, program: CommitProgram) -> None:
        """Compare committed rows with the staged ones they were copied from (``integrity="slot"``).

        Raises:
            IntegrityError: If a live row differs.
        """
        for live, staged in zip(program.live_rows, program.staged_rows, strict=True):
            if not torch.equal(live, staged):
                raise IntegrityError("a committed row differs from what was staged for it")

    def _pack(self, at: _Place, route: Route) -> None:
        """Copy the rows of a route into the send buffer, each with its hash."""
        per_block = max(1, _BLOCK_BYTES // at.stride)
        for first in range(0, len(route.rows), per_block):
            rows = route.rows[first : first + per_block]
            self._copy_live(at, route.sources[first : first + per_block], rows, is_send=True)
            if self._is_hashed:
                words = _words(_span(self._send[at.buffer_idx], rows, at.stride), at.stride)
                words[:, -1] = hash_rows(words[:, :-1], self._keys[at.bank])

    def _verify(self, at: _Place, received: Sequence[Parcel]) -> None:
        if not self._is_hashed:
            return
        for peer, packed in received:
            words = _words(packed, at.stride)
            if not torch.equal(hash_rows(words[:, :-1], self._keys[at.bank]), words[:, -1]):
                raise IntegrityError(f"an expert of bank {self._banks[at.bank].name!r} from rank {peer} was damaged")

    def _copy_live(self, at: _Place, sources: Sequence[tuple[int, int]], rows: range, *, is_send: bool) -> None:
        """Copy live experts to rows of a staging buffer, in few operations that leave the interpreter lock alone."""
        live = [view for source in sources for view in self._banks[at.bank].live_row(*source)]
        if live:
            torch._foreach_copy_([view for row in rows for view in self._row(at, row, is_send=is_send)], live)

    def _copies(self, at: _Place, routes: Sequence[Route]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return live rows and the staged rows that a commit copies over them."""
        live: list[torch.Tensor] = []
        staged: list[torch.Tensor] = []
        for route in routes:
            for row, (layer, _), targets in zip(route.rows, route.sources, route.targets, strict=True):
                for slot in targets:
                    live += self._banks[at.bank].live_row(layer, slot)
                    staged += self._row(at, row, is_send=False)
        return live, staged

    def _row(self, at: _Place, row: int, *, is_send: bool) -> list[torch.Tensor]:
        """Return views on the tensors of one staged row; made once, since making views holds the GIL."""
        key = (at.bank, at.buffer_idx, is_send, row)
        views = self._views.get(key)
        if views is None:
            buffer = (self._send if is_send else self._receive)[at.buffer_idx]
            layout: RowLayout = self._banks[at.bank].layout
            offset = row * at.stride
            views = [buffer[offset + begin : offset + begin + length] for begin, length in layout.segments]
            self._views[key] = views
        return views


def _allocate(commit_bytes: int, num_buffers: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    try:
        receive = [torch.zeros(commit_bytes, dtype=torch.uint8) for _ in range(num_buffers)]
        return receive, [torch.zeros(commit_bytes, dtype=torch.uint8) for _ in range(num_buffers)]
    except RuntimeError as error:
        raise ConfigError(
            f"staging takes 2 * staging_buffers * commit_bytes = {2 * num_buffers * commit_bytes} bytes, which "
            "cannot be allocated; lower commit_bytes or staging_buffers"
        ) from error


def _span(buffer: torch.Tensor, rows: range, stride: int) -> torch.Tensor:
    return buffer[rows.start * stride : rows.stop * stride]


def _words(packed: torch.Tensor, stride: int) -> torch.Tensor:
    """View whole rows as int64 ``(rows, words)``, the hash last."""
    return packed.view(torch.int64).view(-1, stride // 8)


def _parcels(buffer: torch.Tensor, routes: Sequence[Route], stride: int) -> list[Parcel]:
    return [(route.peer, _span(buffer, route.rows, stride)) for route in routes]


def enqueue_commit(program: CommitProgram, device: DeviceOps) -> Pending:
    """Enqueue a commit and return the event after which its buffer and rows may be touched again."""
    device.enqueue(program.run)
    return device.record_event()
