"""Staging: packing rows to send, receiving rows, and the program that makes them live.

All buffers are allocated once. The rows that one peer sends in a chunk are one contiguous range of one buffer:
one message for each peer. A row is the tensors of one expert, padded to whole words, and its hash. Messages are in host
memory; of experts on an accelerator, rows are copied there to be sent, and back once they are received and verified, so
that a commit copies within the accelerator.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from eplb_fsm.errors import ConfigError, TransferError
from eplb_fsm.placement.placement import Placement
from eplb_fsm.placement.plan import Chunk
from eplb_fsm.runtime.bank import Bank
from eplb_fsm.runtime.device import CpuDevice, DeviceOps
from eplb_fsm.runtime.pending import Pending
from eplb_fsm.runtime.routes import Route, find_routes
from eplb_fsm.runtime.rowhash import Words, combine_blocks, hash_blocks, hash_keys
from eplb_fsm.runtime.rowlayout import WORD_BYTES, Piece, RowLayout
from eplb_fsm.runtime.tables import Tables
from eplb_fsm.runtime.transport import Parcel, Transport


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
    prepared_tables: object
    tables: Tables

    def run(self) -> None:
        """Copy the staged rows over the live ones and swap the maps; enqueued on the engine's stream."""
        if self.live_rows:
            torch._foreach_copy_(self.live_rows, self.staged_rows)
        self.tables.write(self.prepared_tables)


class _Place(NamedTuple):
    """Where the rows of a chunk are staged."""

    bank: int
    buffer_idx: int
    layout: RowLayout


class StagingArea:
    """The staging buffers of one rank; worker thread only, but for the commit program it hands out.

    Args:
        banks: All banks of the domain.
        rank: This rank.
        num_buffers: Chunks that may be staged at a time.
        commit_bytes: Most bytes that this rank writes, or sends, in one chunk.
        integrity: ``"off"``, or a kind of checking for which rows carry their hash.
        device: Of the banks.
        between_pieces: Called before each piece of work that takes a part of a millisecond; it may wait.

    Raises:
        ConfigError: If one expert does not fit ``commit_bytes``; says how much it takes.
    """

    def __init__(
        self,
        banks: Sequence[Bank],
        rank: int,
        *,
        num_buffers: int,
        commit_bytes: int,
        integrity: str,
        device: DeviceOps | None = None,
        between_pieces: Callable[[], None] = lambda: None,
    ) -> None:
        largest = max(bank.layout.stride for bank in banks)
        if commit_bytes < largest:
            raise ConfigError(
                f"commit_bytes = {commit_bytes}: one expert takes {largest} bytes; raise commit_bytes to at least that"
            )
        self._banks = banks
        self._rank = rank
        self._is_hashed = integrity != "off"
        self._keys = [hash_keys(bank.layout.payload_bytes // WORD_BYTES) for bank in banks]
        self._device = device or CpuDevice()
        self._between_pieces = between_pieces
        self._receive, self._send, self._staged = _allocate(commit_bytes, num_buffers, banks[0].device)
        self._is_on_host = self._staged is self._receive
        self._views: dict[tuple[int, int, bool, int], list[torch.Tensor]] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes allocated for staging, in the host's memory and on the accelerator."""
        buffers = self._receive + self._send + ([] if self._is_on_host else self._staged)
        return sum(buffer.numel() for buffer in buffers)

    def release(self) -> None:
        """Let go of the buffers, after the last commit; a job that is still in one has it until its end."""
        self._receive, self._send, self._staged = [], [], []
        self._views.clear()

    def stage(
        self,
        chunk: Chunk,
        after: Pending,
        tag: int,
        transport: Transport,
        tables: Tables,
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
        at = _Place(chunk.bank, chunk.idx % len(self._send), bank.layout)
        for route in routes.sends:
            self._pack(at, route)
        if not self._is_on_host:
            yield from self._finish_packing(at, routes.sends)
        arriving = _parcels(self._receive[at.buffer_idx], routes.receives, at.layout.stride)
        yield transport.begin(_parcels(self._send[at.buffer_idx], routes.sends, at.layout.stride), arriving, tag)
        self._verify(at, arriving)
        # From here on nothing fails until the copies have run: a job that ended before could be taken for drained.
        prepared = tables.prepare(chunk.bank, chunk.layers, placements[chunk.bank])
        # Local copies are staged like receives: all reads of a chunk come before any of its writes.
        self._copy_local(at, routes.local)
        self._bring(at, routes.local.first_row)
        live, staged = self._copies(at, [*routes.receives, routes.local])
        if not self._is_on_host:
            yield self._device.worker_event()
        return CommitProgram(
            chunk_idx=chunk.idx,
            num_bytes=sum(row.numel() for row in live),
            num_peer_bytes=routes.local.first_row * at.layout.stride,
            placements=placements,
            digest=chunk.digest_after,
            live_rows=live,
            staged_rows=staged,
            prepared_tables=prepared,
            tables=tables,
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
        """Copy the rows of a route into the send buffer, each with its hash; from an accelerator, begin to."""
        if not self._is_on_host:
            self._copy_rows(at, route.sources, route.rows, is_send=True)
            return
        pack = self._pack_small if len(at.layout.pieces) == 1 else self._pack_large
        for block in self._blocks(len(route.rows), at):
            packed = _span(self._send[at.buffer_idx], route.rows[block], at.layout.stride)
            pack(at, route.sources[block], route.rows[block], packed)

    def _finish_packing(self, at: _Place, routes: Sequence[Route]) -> Generator[Pending, None, None]:
        """Wait for the rows from an accelerator, and give them their hashes."""
        yield self._device.worker_event()
        for _, packed in _parcels(self._send[at.buffer_idx], routes, at.layout.stride):
            self._write_hashes(at, packed)

    def _bring(self, at: _Place, num_rows: int) -> None:
        """Copy received rows to the accelerator, in one piece."""
        if not self._is_on_host:
            rows = range(num_rows)
            received = _span(self._receive[at.buffer_idx], rows, at.layout.stride)
            _span(self._staged[at.buffer_idx], rows, at.layout.stride).copy_(received, non_blocking=True)

    def _write_hashes(self, at: _Place, packed: torch.Tensor) -> None:
        if self._is_hashed:
            words, hashes = self._words(packed, at)
            hashes[:] = self._hash(words, at)

    def _blocks(self, num_rows: int, at: _Place) -> Iterator[slice]:
        """Yield which rows are worked on at one time, each block when it may be."""
        for first in range(0, num_rows, at.layout.rows_per_block):
            self._between_pieces()
            yield slice(first, first + at.layout.rows_per_block)

    def _pieces(self, at: _Place) -> Iterator[Piece]:
        """Yield the pieces of rows that are worked on at one time, each when it may be."""
        for piece in at.layout.pieces:
            self._between_pieces()
            yield piece

    def _hash(self, words: Words, at: _Place) -> Words:
        """Hash whole rows, piece by piece."""
        return np.concatenate([self._hash_block(words[block], at) for block in self._blocks(len(words), at)])

    def _hash_block(self, words: Words, at: _Place) -> Words:
        keys = self._keys[at.bank]
        blocks = [hash_blocks(words[:, piece.begin : piece.end], keys) for piece in self._pieces(at)]
        return combine_blocks(np.concatenate(blocks, axis=1), keys)

    def _pack_small(self, at: _Place, sources: Sequence[tuple[int, int]], rows: range, packed: torch.Tensor) -> None:
        """Copy rows and hash them together: few operations, which leave the interpreter lock alone."""
        self._copy_rows(at, sources, rows, is_send=True)
        self._write_hashes(at, packed)

    def _pack_large(self, at: _Place, sources: Sequence[tuple[int, int]], rows: range, packed: torch.Tensor) -> None:
        """Copy and hash one row piece by piece: the hash reads what the copy has just brought into the cache."""
        parts = [part.numpy() for part in self._banks[at.bank].live_row(*sources[0])]
        words, hashes = self._words(packed, at)
        row, blocks = packed.numpy(), []
        for piece in self._pieces(at):
            piece.copy(parts, row)
            if self._is_hashed:
                blocks.append(hash_blocks(words[:, piece.begin : piece.end], self._keys[at.bank]))
        if self._is_hashed:
            hashes[:] = combine_blocks(np.concatenate(blocks, axis=1), self._keys[at.bank])

    def _verify(self, at: _Place, received: Sequence[Parcel]) -> None:
        if not self._is_hashed:
            return
        for peer, packed in received:
            words, hashes = self._words(packed, at)
            if not np.array_equal(self._hash(words, at), hashes):
                raise IntegrityError(f"an expert of bank {self._banks[at.bank].name!r} from rank {peer} was damaged")

    @staticmethod
    def _words(packed: torch.Tensor, at: _Place) -> tuple[Words, Words]:
        """View whole rows as int64 ``(rows, words)``, and their hashes ``(rows,)``."""
        words = packed.numpy().view(np.int64).reshape(-1, at.layout.stride // WORD_BYTES)
        num_words = at.layout.payload_bytes // WORD_BYTES
        return words[:, :num_words], words[:, num_words]

    def _copy_rows(self, at: _Place, sources: Sequence[tuple[int, int]], rows: range, *, is_send: bool) -> None:
        """Copy live experts to rows of a staging buffer; from an accelerator, begin to."""
        live = [part for source in sources for part in self._banks[at.bank].live_row(*source)]
        if live:
            staged = [part for row in rows for part in self._row(at, row, is_send=is_send)]
            torch._foreach_copy_(staged, live, non_blocking=True)

    def _copy_local(self, at: _Place, route: Route) -> None:
        """Copy live experts that stay on this rank to the staging buffer."""
        if not self._is_on_host:
            self._copy_rows(at, route.sources, route.rows, is_send=False)
            return
        for block in self._blocks(len(route.rows), at):
            self._copy_rows(at, route.sources[block], route.rows[block], is_send=False)

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
        """Return views on the parts of one staged row; made once, since making views holds the GIL."""
        key = (at.bank, at.buffer_idx, is_send, row)
        views = self._views.get(key)
        if views is None:
            buffer = (self._send if is_send else self._staged)[at.buffer_idx]
            packed = _span(buffer, range(row, row + 1), at.layout.stride)
            views = [packed[offset : offset + length] for offset, length in at.layout.segments]
            self._views[key] = views
        return views


def _allocate(
    commit_bytes: int, num_buffers: int, device: torch.device
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Return the buffers to receive into, to send from, and to commit from: in host memory the first ones."""
    is_on_host = device.type == "cpu"
    try:
        receive, send = ([_host_buffer(commit_bytes, is_on_host) for _ in range(num_buffers)] for _ in range(2))
        if is_on_host:
            return receive, send, receive
        return receive, send, [torch.empty(commit_bytes, dtype=torch.uint8, device=device) for _ in receive]
    except (MemoryError, RuntimeError) as error:  # torch says the latter
        raise ConfigError(
            f"staging takes 2 * staging_buffers * commit_bytes = {2 * num_buffers * commit_bytes} bytes of the host"
            f"{'' if is_on_host else f' and half as much on {device}'}, which cannot be allocated; "
            "lower commit_bytes or staging_buffers"
        ) from error


def _host_buffer(num_bytes: int, is_on_host: bool) -> torch.Tensor:
    """From numpy, which asks the kernel for huge pages: a sync epoch takes 2 % less than with torch's own pages."""
    if is_on_host:
        return torch.from_numpy(np.empty(num_bytes, dtype=np.uint8))
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)  # which an accelerator reads and writes by itself


def _span(buffer: torch.Tensor, rows: range, stride: int) -> torch.Tensor:
    return buffer[rows.start * stride : rows.stop * stride]


def _parcels(buffer: torch.Tensor, routes: Sequence[Route], stride: int) -> list[Parcel]:
    return [(route.peer, _span(buffer, route.rows, stride)) for route in routes]


def enqueue_commit(program: CommitProgram, device: DeviceOps) -> Pending:
    """Enqueue a commit and return the event after which its buffer and rows may be touched again."""
    device.enqueue(program.run)
    return device.record_event()
