"""A plan: the way from the live placements to the targets, chunk by chunk, equal on all ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from eplb_fsm.errors import PlanError
from eplb_fsm.placement import digest as _digest
from eplb_fsm.placement.chunks import EXPERT, LAYER, SRC, Chunk, begin_after
from eplb_fsm.placement.digest import Int64Array
from eplb_fsm.placement.path import BankPath, walk
from eplb_fsm.placement.placement import Placement
from eplb_fsm.placement.shapes import BankShape, Budget, check_banks

__all__ = ["BankShape", "Budget", "Chunk", "Plan", "encoded", "live_digest"]

# First word of an encoded plan; the low byte is the version of the layout.
_MAGIC = 0x45504C42504C4E01
# magic, words in all, base digest, banks, chunks, moves, bytes of the skip reason, and the bit
# patterns of the predicted balancedness before and after.
_HEADER_WORDS = 9
_BACK_TO_PLANNING = "drop this plan and make another from the live placement"


def live_digest(placements: Sequence[Placement]) -> int:
    """Signed 64-bit digest of the placements of all banks, in bank order."""
    return _digest.combined_live([placement.digest for placement in placements])


@dataclass(frozen=True, eq=False)
class Plan:
    """An immutable, checked plan; made by `make_plan` or :meth:`decode`, usable from any thread.

    Attributes:
        base_digest: :func:`live_digest` of the placements that it starts from.
        base: Those placements.
        banks: Target placement of each bank.
        chunks: The way there; empty if the plan is to do nothing.
        skip_reason: Why nothing shall be done; "" for a plan to carry out.
        balancedness_before: Mean balancedness over all layers under the load that the plan was made for.
        balancedness_after: The same under the targets, as predicted.
        peer_bytes: Bytes that cross between ranks, each transfer once.
        local_bytes: Other bytes written: copies within a rank, and further slots of one transfer.
        busiest_rank_bytes: Sum over the chunks of the most bytes that one rank writes or sends for it:
            what the plan takes time for, since a chunk begins only when its forerunners are committed.
        digest: Signed 64-bit digest of everything that :meth:`encode` carries: base placement, moves,
            senders, chunk cuts and skip reason.
    """

    base_digest: int
    base: tuple[Placement, ...]
    banks: tuple[Placement, ...]
    chunks: tuple[Chunk, ...]
    skip_reason: str
    balancedness_before: float
    balancedness_after: float
    peer_bytes: int
    local_bytes: int
    busiest_rank_bytes: int
    digest: int
    _words: Int64Array = field(repr=False)
    _paths: tuple[BankPath, ...] = field(repr=False)

    @property
    def moved_bytes(self) -> int:
        """Bytes written in all, over the wire and locally."""
        return self.peer_bytes + self.local_bytes

    @property
    def num_moves(self) -> int:
        """Slots that get another expert."""
        return sum(len(chunk.moves) for chunk in self.chunks)

    def path(self, base: Sequence[Placement]) -> Iterator[tuple[Placement, ...]]:
        """Placements of all banks after each chunk in turn, each made when it is asked for.

        Args:
            base: Live placement of each bank.

        Raises:
            PlanError: they are not the ones that the plan starts from.
        """
        if live_digest(base) != self.base_digest:
            raise PlanError(
                f"the plan starts from placements of digest {self.base_digest:#x}, live are "
                f"{live_digest(base):#x}; {_BACK_TO_PLANNING}"
            )
        return (self.placements_after(chunk.idx) for chunk in self.chunks)

    def placements_after(self, idx: int) -> tuple[Placement, ...]:
        """Placement of each bank once chunk `idx` is committed; -1 for the base.

        Takes some microseconds per thousand slots; a bank that is not touched is returned as it is.
        """
        return tuple(self._placement_after(bank, idx) for bank in range(len(self.base)))

    def _placement_after(self, bank: int, idx: int) -> Placement:
        base, path = self.base[bank], self._paths[bank]
        if idx < 0 or path.target is base:
            return base
        written = path.written_in <= idx
        after = np.where(written, path.target.physical_to_logical_map, base.physical_to_logical_map)
        placement = Placement._trusted(after, base.num_logical_experts, base.num_ranks)
        placement.__dict__["digest"] = int(path.digests[idx])
        return placement

    def encode(self) -> Int64Array:
        """The plan as a flat, read-only int64 array; its last word is the digest of the others."""
        return self._words

    @classmethod
    def decode(
        cls, array: Int64Array, current: Sequence[Placement], shapes: Sequence[BankShape], budget: Budget
    ) -> Plan:
        """Read a plan that another rank encoded, and check all of it.

        What follows from the moves (targets, digests, when a chunk may begin, bytes) is worked out here
        and not read, so it cannot disagree with them. Does not block; holds the GIL for some
        milliseconds at the largest sizes.

        Args:
            array: (n,) int64 from :meth:`encode`; copied.
            current: Live placement of each bank.
            shapes: Sizes of each bank's experts.
            budget: Bounds of a chunk.

        Raises:
            PlanError: the words are damaged, the plan starts from other placements, or its chunks are not
                a path of valid placements within the budget.
            BankError: `current` and `shapes` do not go together.
        """
        check_banks(current, shapes)
        words = _checked_words(array)
        banks, num_chunks, num_moves, reason_bytes = words[3:7].tolist()
        base_digest = int(words[2])
        if banks != len(current) or base_digest != live_digest(current):
            raise PlanError(
                f"the plan starts from placements of digest {base_digest:#x} in {banks} banks, live are "
                f"{live_digest(current):#x} in {len(current)}; {_BACK_TO_PLANNING}"
            )
        reason_end = _HEADER_WORDS + (reason_bytes + 7) // 8
        chunks_end = reason_end + 2 * num_chunks
        if min(num_chunks, num_moves, reason_bytes) < 0 or chunks_end + 4 * num_moves + 1 != len(words):
            raise PlanError(f"the counts of the plan do not add up to its length; {_BACK_TO_PLANNING}")
        reason = _unpacked_text(words[_HEADER_WORDS:reason_end], reason_bytes)
        if bool(reason) == bool(num_chunks):
            raise PlanError(f"a plan has chunks or a reason to skip, not both or none; {_BACK_TO_PLANNING}")
        return _assembled(
            words,
            words[reason_end:chunks_end].reshape(-1, 2),
            words[chunks_end:-1].reshape(-1, 4),
            reason,
            tuple(current),
            shapes,
            budget,
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Plan):
            return NotImplemented
        return (
            np.array_equal(self._words, other._words)
            and self.base == other.base
            and self.banks == other.banks
            and self.chunks == other.chunks
        )

    def __hash__(self) -> int:
        return hash(self.digest)


def encoded(
    base_digest: int,
    num_banks: int,
    chunks: Sequence[tuple[int, Int64Array]],
    skip_reason: str,
    balancedness: tuple[float, float],
) -> Int64Array:
    """The words of a plan.

    Args:
        base_digest: Digest of the live placements.
        num_banks: Their number.
        chunks: Bank and (n, 4) int64 moves of each chunk.
        skip_reason: Why nothing shall be done, "" otherwise.
        balancedness: Mean over the layers before and after, as predicted.
    """
    text = skip_reason.encode()
    cuts = [word for bank, moves in chunks for word in (bank, len(moves))]
    counts = (num_banks, len(chunks), sum(cuts[1::2]), len(text))
    packed = np.frombuffer(text + bytes(-len(text) % 8), dtype="<i8").astype(np.int64)
    bits = np.array(balancedness, dtype=np.float64).view(np.int64)
    length = _HEADER_WORDS + len(packed) + len(cuts) + 4 * counts[2] + 1
    header = np.array((_MAGIC, length, base_digest, *counts), dtype=np.int64)
    moves = [moves.reshape(-1) for _, moves in chunks]
    body = np.concatenate((header, bits, packed, np.array(cuts, dtype=np.int64), *moves))
    return np.append(body, _digest.words_digest(body))


def _checked_words(array: Int64Array) -> Int64Array:
    words = np.array(array)
    if words.dtype != np.int64 or words.ndim != 1 or len(words) <= _HEADER_WORDS or words[0] != _MAGIC:
        raise PlanError("this is not an encoded plan of this version; run the same version on all ranks")
    if words[1] != len(words) or _digest.words_digest(words[:-1]) != words[-1]:
        raise PlanError(f"the encoded plan does not match its digest, it was damaged; {_BACK_TO_PLANNING}")
    words.flags.writeable = False
    return words


def _unpacked_text(words: Int64Array, length: int) -> str:
    try:
        return words.astype("<i8").tobytes()[:length].decode()
    except UnicodeDecodeError as error:
        raise PlanError(f"the skip reason of the plan is not text ({error}); {_BACK_TO_PLANNING}") from None


def _assembled(
    words: Int64Array,
    cuts: Int64Array,
    moves: Int64Array,
    reason: str,
    current: tuple[Placement, ...],
    shapes: Sequence[BankShape],
    budget: Budget,
) -> Plan:
    chunk_banks, sizes = cuts[:, 0], cuts[:, 1]
    if len(cuts) and (sizes.min() < 1 or chunk_banks.min() < 0 or chunk_banks.max() >= len(current)):
        raise PlanError(f"every chunk needs moves and a known bank; {_BACK_TO_PLANNING}")
    if sizes.sum() != len(moves):
        raise PlanError(f"the chunks hold {sizes.sum()} of {len(moves)} moves; {_BACK_TO_PLANNING}")
    chunk_of = np.repeat(np.arange(len(cuts)), sizes)
    bank_of = chunk_banks[chunk_of]
    paths = []
    for bank, (placement, shape) in enumerate(zip(current, shapes, strict=True)):
        mine = slice(None) if len(current) == 1 else bank_of == bank
        paths.append(walk(placement, moves[mine], chunk_of[mine], len(cuts), shape, budget))
    before, after = words[7:9].view(np.float64).tolist()
    # A chunk belongs to one bank, so the sums over the banks are the chunk's own numbers.
    written = np.sum([path.written_bytes for path in paths], axis=0)
    sent = np.sum([path.sent_bytes for path in paths], axis=0)
    return Plan(
        base_digest=int(words[2]),
        base=current,
        banks=tuple(path.target for path in paths),
        chunks=_chunks(moves, cuts, paths, current, budget),
        skip_reason=reason,
        balancedness_before=before,
        balancedness_after=after,
        peer_bytes=int(sent.sum()),
        local_bytes=int(written.sum() - sent.sum()),
        busiest_rank_bytes=int(np.maximum(written, sent).max(axis=1, initial=0).sum()),
        digest=int(words[-1]),
        _words=words,
        _paths=tuple(paths),
    )


def _chunks(
    moves: Int64Array,
    cuts: Int64Array,
    paths: Sequence[BankPath],
    current: Sequence[Placement],
    budget: Budget,
) -> tuple[Chunk, ...]:
    ends = np.cumsum(cuts[:, 1]).tolist()
    live = _digest.combined_live_path(np.stack([path.digests for path in paths])).tolist()
    banks = cuts[:, 0].tolist()
    has_emptied = bool((moves[:, EXPERT] < 0).any())
    layers, chunks = moves[:, LAYER].tolist(), []
    touched = [(bank, set(layers[begin:end])) for bank, (begin, end) in zip(banks, pairwise([0, *ends]), strict=True)]
    afters = begin_after(touched, budget.staging_buffers)
    for idx, (begin, end) in enumerate(pairwise([0, *ends])):
        bank, mine = banks[idx], moves[begin:end]
        chunk = Chunk(
            idx=idx,
            bank=bank,
            moves=_read_only(mine[mine[:, EXPERT] >= 0]) if has_emptied else mine,
            emptied=_read_only(mine[mine[:, EXPERT] < 0, :SRC]) if has_emptied else _NOTHING_EMPTIED,
            begin_after=afters[idx],
            digest_after=live[idx],
            num_local_physical_experts=current[bank].num_local_physical_experts,
            written_bytes=paths[bank].written_bytes[idx],
            sent_bytes=paths[bank].sent_bytes[idx],
        )
        chunks.append(chunk)
    return tuple(chunks)


def _read_only(array: Int64Array) -> Int64Array:
    array.flags.writeable = False
    return array


_NOTHING_EMPTIED = _read_only(np.empty((0, 2), dtype=np.int64))
