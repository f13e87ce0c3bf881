"""Chunks: the moves that are staged together and become visible together."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from eplb_fsm.placement.cut import Part, cut_layer
from eplb_fsm.placement.digest import Int64Array
from eplb_fsm.placement.moves import BoolArray, differences
from eplb_fsm.placement.placement import Placement
from eplb_fsm.placement.shapes import BankShape, Budget

LAYER, DST, SRC, EXPERT = range(4)


@dataclass(frozen=True, eq=False)
class Chunk:
    """The moves of one bank between two valid placements P(i-1) and P(i). Immutable, any thread.

    All rows are read before any is written: a source may be a slot that the same chunk overwrites.
    Moves with the same layer, source slot and receiving rank are one transfer, written to several slots.

    Attributes:
        idx: Number of the chunk in the plan, from 0.
        bank: Number of the bank.
        moves: (n, 4) int64, read-only, ascending by layer and destination; columns: layer, destination
            slot, source slot (it holds the expert in P(i-1)), logical expert.
        emptied: (k, 2) int64, read-only: layer and slot of what becomes empty; no bytes move for it.
        begin_after: Staging may begin once chunk `begin_after` is committed; -1: at once.
        digest_after: Digest of all banks' live placements once this chunk is committed.
        num_local_physical_experts: Slots of each rank in this bank.
        written_bytes: (num_ranks,) int64: bytes that each rank writes.
        sent_bytes: (num_ranks,) int64: bytes that each rank sends to others.
    """

    idx: int
    bank: int
    moves: Int64Array
    emptied: Int64Array
    begin_after: int
    digest_after: int
    num_local_physical_experts: int
    written_bytes: Int64Array
    sent_bytes: Int64Array

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """Layers that the chunk touches, ascending."""
        return tuple(sorted({*self.moves[:, LAYER].tolist(), *self.emptied[:, LAYER].tolist()}))

    @cached_property
    def dst_ranks(self) -> Int64Array:
        """(n,) int64: rank that each move writes on."""
        return np.asarray(self.moves[:, DST] // self.num_local_physical_experts)

    @cached_property
    def src_ranks(self) -> Int64Array:
        """(n,) int64: rank that each move reads from."""
        return np.asarray(self.moves[:, SRC] // self.num_local_physical_experts)

    def bytes_from(self, rank: int) -> int:
        """Bytes that `rank` sends to its peers."""
        return int(self.sent_bytes[rank])

    def bytes_to(self, rank: int) -> int:
        """Bytes that `rank` writes when the chunk is committed."""
        return int(self.written_bytes[rank])

    def moves_to(self, rank: int) -> Int64Array:
        """Moves that write a slot of `rank`, from a peer or locally; (k, 4)."""
        return self._chosen(self.dst_ranks == rank)

    def moves_from(self, rank: int) -> Int64Array:
        """Moves that read a slot of `rank`, for a peer or locally; (k, 4)."""
        return self._chosen(self.src_ranks == rank)

    def local_copies(self, rank: int) -> Int64Array:
        """Moves from slot to slot of `rank`; (k, 4)."""
        return self._chosen((self.dst_ranks == rank) & (self.src_ranks == rank))

    def receives(self, rank: int) -> Int64Array:
        """Transfers to `rank` from its peers, ascending by layer and first destination; (k, 4).

        An expert that goes to several slots of the rank is received once: its first slot is named.
        """
        return self._chosen((self.dst_ranks == rank) & (self.src_ranks != rank) & self._first_of_transfer)

    def sends(self, rank: int) -> Int64Array:
        """Transfers from `rank` to its peers, in the order in which each peer's `receives` lists them."""
        return self._chosen((self.src_ranks == rank) & (self.dst_ranks != rank) & self._first_of_transfer)

    def _chosen(self, which: BoolArray) -> Int64Array:
        return np.asarray(self.moves[which])

    @cached_property
    def _first_of_transfer(self) -> BoolArray:
        keys = np.stack((self.moves[:, LAYER], self.moves[:, SRC], self.dst_ranks), axis=1)
        first = np.zeros(len(keys), dtype=np.bool_)
        first[np.unique(keys, axis=0, return_index=True)[1]] = True
        return first

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Chunk):
            return NotImplemented
        return self._scalars == other._scalars and all(
            np.array_equal(getattr(self, name), getattr(other, name))
            for name in ("moves", "emptied", "written_bytes", "sent_bytes")
        )

    def __hash__(self) -> int:
        return hash(self._scalars)

    @property
    def _scalars(self) -> tuple[int, ...]:
        return self.idx, self.bank, self.begin_after, self.digest_after, self.num_local_physical_experts


def cut_into_chunks(
    current: Placement, target: Placement, shape: BankShape, budget: Budget, num_nodes: int
) -> list[Int64Array]:
    """Moves of one bank from `current` to `target`, cut by the budget.

    Whole layers are one part, as many to a chunk as fit. A layer too big for the budget is cut into
    parts, and the layers take turns: first parts first, so that neighbouring chunks touch different
    layers and the next one can be staged before this one is committed.

    Args:
        current: The live placement.
        target: Where to go, up to the order of slots within a rank.
        shape: Sizes of the bank's experts; every one fits `budget.commit_bytes`.
        budget: Bounds of a chunk.
        num_nodes: Nodes that the ranks stand on, equally many neighbours on each; a copy on the receiver's node is
            sent where there is one and its rank has the budget.

    Returns:
        (n, 4) int64 for each chunk, ascending by layer and destination: layer, destination slot, source
        slot, expert; source and expert are -1 where a slot becomes empty.
    """
    sent = [0] * current.num_ranks
    turns: list[list[Part]] = []
    for difference in differences(current, target):
        parts = cut_layer(
            difference,
            current.physical_to_logical_map[difference.layer].tolist(),
            current.num_logical_experts,
            current.num_local_physical_experts,
            budget.commit_bytes // shape.row_bytes[difference.layer],
            sent,
            current.num_ranks // num_nodes,
        )
        for turn, part in enumerate(parts):
            if turn == len(turns):
                turns.append([])
            turns[turn].append(part)
    return [_as_moves(parts) for turn in turns for parts in _packed(turn, shape, budget)]


def _packed(parts: Sequence[Part], shape: BankShape, budget: Budget) -> list[list[Part]]:
    """Put parts of different layers together, in order, while no rank passes the budget."""
    chunks: list[list[Part]] = []
    used = np.zeros(0, dtype=np.int64)
    for part in parts:
        bytes_of_ranks = np.array((part.writes, part.sends), dtype=np.int64) * shape.row_bytes[part.layer]
        if chunks and int((used + bytes_of_ranks).max()) <= budget.commit_bytes:
            chunks[-1].append(part)
            used = used + bytes_of_ranks
        else:
            chunks.append([part])
            used = bytes_of_ranks
    return chunks


def _as_moves(parts: Sequence[Part]) -> Int64Array:
    rows = [(part.layer, *move) for part in parts for move in part.moves]
    return np.array(rows, dtype=np.int64).reshape(-1, 4)


def begin_after(touched: Sequence[tuple[int, Collection[int]]], staging_buffers: int) -> list[int]:
    """When each chunk may be staged: a free buffer, and no earlier chunk of its layers uncommitted.

    Args:
        touched: Bank and layers of each chunk, in order.
        staging_buffers: Chunks that may be staged at the same time.

    Returns:
        For each chunk the number of the chunk that must be committed first, -1 for none.
    """
    last: dict[tuple[int, int], int] = {}
    result = []
    for idx, (bank, layers) in enumerate(touched):
        result.append(max(-1, idx - staging_buffers, *(last.get((bank, layer), -1) for layer in layers)))
        for layer in layers:
            last[bank, layer] = idx
    return result
