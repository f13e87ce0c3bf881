"""Staging: packing rows to send, receiving rows, and the program that makes them live.

All buffers are allocated once. The rows that one peer sends in a chunk are one contiguous range of one buffer:
one message for each peer. A row is the tensors of one expert, padded to whole words, and its hash.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch

from eplb_fsm.errors import ConfigError, TransferError
from eplb_fsm.placement.placement import Placement
from eplb_fsm.placement.plan import Chunk
from eplb_fsm.runtime.bank import Bank, RowLayout
from eplb_fsm.runtime.device import DeviceOps
from eplb_fsm.runtime.maps import MapWriter
from eplb_fsm.runtime.pending import Pending
from eplb_fsm.runtime.transport import Parcel, Transport

_ROW_SEED = 0x9E3779B97F4A7C15
"""Increment of splitmix64 (Steele, Lea, Flood 2014)."""
_MASK = (1 << 64) - 1
_BLOCK_BYTES = 1 << 20
"""Rows are packed and hashed in blocks of about this size, so that the hash reads what is still in the cache."""


class IntegrityError(TransferError):
    """A received row does not have the hash that travelled with it."""


def hash_keys(num_words: int) -> torch.Tensor:
    """Return the odd 64-bit keys of the row hash, int64 ``(num_words,)``; splitmix64 of the position."""
    keys = []
    for position in range(1, num_words + 1):
        z = position * _ROW_SEED & _MASK
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        z = (z ^ z >> 27) * 0x94D049BB133111EB & _MASK
        z = (z ^ z >> 31) | 1
        keys.append(z - (1 << 64) if z >> 63 else z)
    return torch.tensor(keys, dtype=torch.int64)


def hash_rows(rows: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Return the multilinear hash modulo 2**64 of each row: the sum of words times keys.

    A change of any single word changes the hash, because the keys are odd; keys differ by position, so two
    words that change places do too. One pass at memory speed, without the interpreter lock.

    Args:
        rows: int64 ``(n, num_words)``.
        keys: int64 ``(num_words,)``, from :func:`hash_keys`.
    """
    if rows.device.type == "cpu":
        return torch.mv(rows, keys)
    return (rows * keys).sum(1)


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


@dataclass(slots=True)
class _Route:
    """Rows of one chunk between this rank and one peer, in the order in which both sides count them."""

    slots: list[tuple[int, int]]
    """(layer, local slot) to read from; on the receiving side (layer, index of the row)."""
    targets: list[list[int]]
    """Receiving side: local slots that each row is written to."""


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
        buffer_idx = chunk.idx % len(self._send)
        stride = self._banks[chunk.bank].layout.stride
        sends, receives, local = self._routes(chunk)
        parcels = self._pack(chunk.bank, buffer_idx, sends)
        wanted, offset = _ranges(self._receive[buffer_idx], receives, stride)
        yield transport.begin(parcels, wanted, tag)
        self._verify(chunk.bank, wanted)
        self._copy_local(chunk.bank, buffer_idx, offset, local)
        routes = [*(receives[peer] for peer in sorted(receives)), local]
        live, staged = self._copies(chunk.bank, buffer_idx, routes)
        return CommitProgram(
            chunk_idx=chunk.idx,
            num_bytes=sum(row.numel() for row in live),
            num_peer_bytes=sum(buffer.numel() for _, buffer in wanted),
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

    def _routes(self, chunk: Chunk) -> tuple[dict[int, _Route], dict[int, _Route], _Route]:
        """Sort the moves of a chunk into sends and receives by peer, and local copies."""
        num_local = self._banks[chunk.bank].num_local_physical_experts
        sends: dict[int, _Route] = {}
        receives: dict[int, _Route] = {}
        local = _Route([], [])
        rows: dict[tuple[int, int, int], int] = {}
        for layer, dst, src, _ in chunk.moves.tolist():
            dst_rank, src_rank = dst // num_local, src // num_local
            if dst_rank != self._rank and src_rank != self._rank:
                continue
            if dst_rank == src_rank:
                local.slots.append((layer, src % num_local))
                local.targets.append([dst % num_local])
                continue
            sending = src_rank == self._rank
            peer = dst_rank if sending else src_rank
            route = (sends if sending else receives).setdefault(peer, _Route([], []))
            # One expert for two slots of a rank travels once: both sides see the same moves in the same order.
            row = rows.setdefault((peer, layer, src), len(route.slots))
            if row == len(route.slots):
                route.slots.append((layer, src % num_local))
                route.targets.append([])
            route.targets[row].append(dst % num_local)
        return sends, receives, local

    def _pack(self, bank: int, buffer_idx: int, sends: dict[int, _Route]) -> list[Parcel]:
        buffer = self._send[buffer_idx]
        stride = self._banks[bank].layout.stride
        parcels, _ = _ranges(buffer, sends, stride)
        slots = [at for peer in sorted(sends) for at in sends[peer].slots]
        per_block = max(1, _BLOCK_BYTES // stride)
        for first in range(0, len(slots), per_block):
            block = slots[first : first + per_block]
            start, stop = first * stride, (first + len(block)) * stride
            live = [row for at in block for row in self._banks[bank].live_row(*at)]
            staged = [view for at in range(start, stop, stride) for view in self._row(bank, buffer_idx, True, at)]
            torch._foreach_copy_(staged, live)
            self._seal(bank, buffer[start:stop])
        return parcels

    def _seal(self, bank: int, packed: torch.Tensor) -> None:
        if self._is_hashed:
            words = packed.view(torch.int64).view(-1, self._banks[bank].layout.stride // 8)
            words[:, -1] = hash_rows(words[:, :-1], self._keys[bank])

    def _verify(self, bank: int, received: Sequence[Parcel]) -> None:
        if not self._is_hashed:
            return
        for peer, packed in received:
            words = packed.view(torch.int64).view(-1, self._banks[bank].layout.stride // 8)
            if not torch.equal(hash_rows(words[:, :-1], self._keys[bank]), words[:, -1]):
                raise IntegrityError(f"an expert of bank {self._banks[bank].name!r} from rank {peer} was damaged")

    def _copy_local(self, bank: int, buffer_idx: int, offset: int, local: _Route) -> None:
        """Local copies are staged like receives: all reads of a chunk come before any of its writes."""
        stride = self._banks[bank].layout.stride
        staged = [
            view
            for row in range(len(local.slots))
            for view in self._row(bank, buffer_idx, False, offset + row * stride)
        ]
        if staged:
            live = [row for at in local.slots for row in self._banks[bank].live_row(*at)]
            torch._foreach_copy_(staged, live)

    def _copies(
        self, bank: int, buffer_idx: int, routes: Sequence[_Route]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return live rows and the staged rows that a commit copies over them."""
        live: list[torch.Tensor] = []
        staged: list[torch.Tensor] = []
        offset = 0
        for route in routes:
            for (layer, _), targets in zip(route.slots, route.targets, strict=True):
                for slot in targets:
                    live += self._banks[bank].live_row(layer, slot)
                    staged += self._row(bank, buffer_idx, False, offset)
                offset += self._banks[bank].layout.stride
        return live, staged

    def _row(self, bank: int, buffer_idx: int, is_send: bool, offset: int) -> list[torch.Tensor]:
        """Return views on the tensors of one staged row; made once, since making views holds the GIL."""
        key = (bank, buffer_idx, is_send, offset)
        views = self._views.get(key)
        if views is None:
            buffer = (self._send if is_send else self._receive)[buffer_idx]
            layout: RowLayout = self._banks[bank].layout
            views = [buffer[offset + at : offset + at + length] for at, length in layout.segments]
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


def _ranges(buffer: torch.Tensor, routes: dict[int, _Route], stride: int) -> tuple[list[Parcel], int]:
    """Give each peer, in ascending order, its contiguous range of a buffer; return the end as well."""
    parcels: list[Parcel] = []
    offset = 0
    for peer in sorted(routes):
        length = len(routes[peer].slots) * stride
        parcels.append((peer, buffer[offset : offset + length]))
        offset += length
    return parcels, offset


def enqueue_commit(program: CommitProgram, device: DeviceOps) -> Pending:
    """Enqueue a commit and return the event after which its buffer and rows may be touched again."""
    device.enqueue(program.run)
    return device.record_event()
