"""Checking that chunks are a path of valid placements, for all moves of a bank at once.

This runs beside the decode loop on every rank and holds the GIL, so it is arrays all the way.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from eplb_fsm.errors import PlanError
from eplb_fsm.placement import digest as _digest
from eplb_fsm.placement.digest import Int64Array, UInt64Array
from eplb_fsm.placement.moves import BoolArray
from eplb_fsm.placement.placement import Placement
from eplb_fsm.placement.shapes import BankShape, Budget


@dataclass(frozen=True, slots=True)
class BankPath:
    """One bank's way through the chunks of a plan.

    Attributes:
        target: Placement after the last chunk.
        written_in: (num_moe_layers, num_physical_experts) int64: chunk that writes the slot, the number of
            chunks where none does.
        digests: (chunks,) int64: digest of the bank's placement after each chunk of the plan.
        written_bytes: (chunks, num_ranks) int64: bytes that each rank writes for the chunk.
        sent_bytes: (chunks, num_ranks) int64: bytes that each rank sends for the chunk.
        peer_bytes: Bytes that cross between ranks.
        local_bytes: Bytes written from a row of the same rank, or a second time from one transfer.
    """

    target: Placement
    written_in: Int64Array
    digests: Int64Array
    written_bytes: Int64Array
    sent_bytes: Int64Array


def walk(
    base: Placement,
    moves: Int64Array,
    chunk_of: Int64Array,
    num_chunks: int,
    shape: BankShape,
    budget: Budget,
) -> BankPath:
    """Check the moves of one bank and work out where they lead.

    Args:
        base: Live placement.
        moves: (n, 4) int64, the bank's moves in the order of the chunks; see `Chunk.moves`.
        chunk_of: (n,) int64, ascending: chunk of each move.
        num_chunks: Chunks of the whole plan.
        shape: Sizes of the bank's experts.
        budget: Bounds of a chunk.

    Raises:
        PlanError: naming the first chunk that breaks a rule, and the rule.
    """
    if not len(moves):
        return _unmoved(base, num_chunks)
    walk = _Walk(base, moves, chunk_of, num_chunks, shape.name)
    walk.check_form()
    walk.check_sources()
    walk.check_peers()
    walk.check_copies()
    written_bytes, sent_bytes = walk.bytes_by_rank(np.array(shape.row_bytes, dtype=np.int64), budget)
    digests = walk.digests()
    target = Placement._trusted(
        walk.target.reshape(base.physical_to_logical_map.shape), base.num_logical_experts, base.num_ranks
    )
    target.__dict__["digest"] = int(digests[-1])
    written_in = walk.written_in.reshape(base.physical_to_logical_map.shape)
    return BankPath(target, written_in, digests, written_bytes, sent_bytes)


def _unmoved(base: Placement, num_chunks: int) -> BankPath:
    nothing = np.zeros((num_chunks, base.num_ranks), dtype=np.int64)
    return BankPath(
        base,
        np.full(base.physical_to_logical_map.shape, num_chunks, dtype=np.int64),
        np.full(num_chunks, base.digest, dtype=np.int64),
        nothing,
        nothing,
    )


class _Walk:
    """The columns of the moves and the maps before and after, flat over (layer, slot)."""

    def __init__(self, base: Placement, moves: Int64Array, chunk_of: Int64Array, num_chunks: int, bank: str) -> None:
        self.placement, self.bank = base, bank
        self.chunk, self.num_chunks = chunk_of, num_chunks
        self.layer, self.dst, self.src, self.expert = np.ascontiguousarray(moves.T)
        self.dst_rank = self.dst // base.num_local_physical_experts
        self.src_rank = self.src // base.num_local_physical_experts
        self.num_slots = base.num_physical_experts
        self.base: Int64Array = base.physical_to_logical_map.reshape(-1)

    def require(self, holds: BoolArray, rule: str) -> None:
        """Raise unless every move keeps the rule."""
        if not holds.all():
            first = int(np.argmin(holds))
            move = (self.layer[first], self.dst[first], self.src[first], self.expert[first])
            raise PlanError(
                f"chunk {self.chunk[first]} of bank {self.bank!r}: {rule}; first broken by move "
                f"(layer, dst, src, expert) = {tuple(int(word) for word in move)}; "
                "drop this plan and make another from the live placement"
            )

    def check_form(self) -> None:
        """Known layers, slots and experts; canonical order; every slot written at most once, and changed."""
        layers, num_experts = self.placement.num_moe_layers, self.placement.num_logical_experts
        known = (self.layer >= 0) & (self.layer < layers) & (self.dst >= 0) & (self.dst < self.num_slots)
        known &= (self.src >= -1) & (self.src < self.num_slots)
        known &= (self.expert >= -1) & (self.expert < num_experts)
        self.require(known, "every layer, slot and expert must exist")
        self.require((self.src < 0) == (self.expert < 0), "a move has a source exactly if it brings an expert")
        self.flat = self.layer * self.num_slots + self.dst
        order = self.chunk * len(self.base) + self.flat
        self.require(np.diff(order, prepend=-1) > 0, "moves must ascend by layer and destination in a chunk")
        self.written_in = np.full(len(self.base), self.num_chunks, dtype=np.int64)
        self.written_in[self.flat] = self.chunk
        self.require(self.written_in[self.flat] == self.chunk, "a slot may be written once in a plan")
        self.old = self.base[self.flat]
        self.require(self.old != self.expert, "a move must change the slot")
        self.target = self.base.copy()
        self.target[self.flat] = self.expert

    def check_sources(self) -> None:
        """Each source holds the expert before the chunk."""
        source = self.layer * self.num_slots + self.src
        held = np.where(self.written_in[source] < self.chunk, self.target[source], self.base[source])
        self.require((held == self.expert) | (self.src < 0), "the source must hold the expert before the chunk")

    def check_peers(self) -> None:
        """Nothing is fetched that the rank has, and nothing twice."""
        self.is_peer = (self.src >= 0) & (self.src_rank != self.dst_rank)
        peers = np.nonzero(self.is_peer)[0]
        num_ranks = self.placement.num_ranks
        block = self.layer[peers] * num_ranks + self.dst_rank[peers]
        by_rank = (-1, self.placement.num_local_physical_experts)
        base, target, written_in = (a.reshape(by_rank)[block] for a in (self.base, self.target, self.written_in))
        held = np.where(written_in < self.chunk[peers, None], target, base)
        fetched = np.ones(len(self.layer), dtype=np.bool_)
        fetched[peers] = (held != self.expert[peers, None]).all(axis=1)
        self.require(fetched, "a rank that holds the expert must copy it locally")
        # One transfer serves all slots of a rank that get the same expert in one chunk.
        key = (self.chunk[peers] * len(self.base) + block) * self.placement.num_logical_experts
        key += self.expert[peers]
        order = np.argsort(key, kind="stable")
        key, ordered = key[order], peers[order]
        repeated = ~_changes(key)
        agrees = np.ones(len(self.layer), dtype=np.bool_)
        agrees[ordered[1:]] = ~repeated[1:] | (self.src[ordered[1:]] == self.src[ordered[:-1]])
        self.require(agrees, "slots of a rank that get the same expert in a chunk must share one source")
        self.is_transfer = np.zeros(len(self.layer), dtype=np.bool_)
        self.is_transfer[ordered[~repeated]] = True

    def check_copies(self) -> None:
        """Every expert keeps at least one copy after every chunk."""
        num_experts = self.placement.num_logical_experts
        gains, losses = np.nonzero(self.expert >= 0)[0], np.nonzero(self.old >= 0)[0]
        moves = np.concatenate((gains, losses))
        change = np.ones(len(moves), dtype=np.int64)
        change[len(gains) :] = -1
        which = self.layer[moves] * num_experts
        which += np.concatenate((self.expert[gains], self.old[losses]))
        when = which * self.num_chunks + self.chunk[moves]
        order = np.argsort(when, kind="stable")
        when, which, moves = when[order], which[order], moves[order]
        running = np.cumsum(change[order])
        # The running sum goes on from expert to expert: take off what it was when the expert's own began.
        position = np.arange(len(which))
        first = np.maximum.accumulate(np.where(_changes(which), position, 0))
        before = np.where(first > 0, running[first - 1], 0)
        copies = self.placement.logical_replica_count.reshape(-1)[which] + running - before
        chunk_ends = np.append(_changes(when)[1:], True)
        kept = np.ones(len(self.layer), dtype=np.bool_)
        kept[moves[chunk_ends & (copies < 1)]] = False
        self.require(kept, "every expert must keep at least one copy after the chunk")

    def bytes_by_rank(self, row_bytes: Int64Array, budget: Budget) -> tuple[Int64Array, Int64Array]:
        """Bytes that each rank writes and sends for each chunk, both within the budget."""
        size = row_bytes[self.layer]
        written = self._totals(self.expert >= 0, self.dst_rank, size)
        sent = self._totals(self.is_transfer, self.src_rank, size)
        busiest = np.maximum(written, sent).max(axis=1)
        fits = busiest[self.chunk] <= budget.commit_bytes
        self.require(fits, f"no rank may write or send more than commit_bytes={budget.commit_bytes} in a chunk")
        return written, sent

    def _totals(self, chosen: BoolArray, rank: Int64Array, size: Int64Array) -> Int64Array:
        num_ranks = self.placement.num_ranks
        keys = self.chunk[chosen] * num_ranks + rank[chosen]
        # Sums of float64 are exact below 2**53 bytes.
        totals = np.bincount(keys, weights=size[chosen], minlength=self.num_chunks * num_ranks)
        return totals.astype(np.int64).reshape(self.num_chunks, num_ranks)

    def digests(self) -> Int64Array:
        """Digest of the placement after each chunk, by the words of the slots that changed."""
        sizes = (self.num_slots, self.placement.num_logical_experts)
        change = _digest.slot_words(self.layer, self.dst, self.expert, *sizes)
        change -= _digest.slot_words(self.layer, self.dst, self.old, *sizes)
        starts = np.nonzero(_changes(self.chunk))[0]
        by_chunk: UInt64Array = np.zeros(self.num_chunks, dtype=np.uint64)
        by_chunk[self.chunk[starts]] = np.add.reduceat(change, starts)
        header = _digest.header_word(self.placement.shape)
        return _digest.combined_path(header, self.placement._layer_words, np.cumsum(by_chunk, dtype=np.uint64))


def _changes(ascending: Int64Array) -> BoolArray:
    """Where a sorted array's value differs from the one before; True at the start."""
    changes = np.ones(len(ascending), dtype=np.bool_)
    np.not_equal(ascending[1:], ascending[:-1], out=changes[1:])
    return changes
