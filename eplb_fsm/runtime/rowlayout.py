"""How the tensors of one expert lie in a staged row, and the pieces in which a row is packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
WORD_BYTES = 8
"""A word of the hash; parts begin at whole words."""
_PIECE_BYTES = 256 << 10
"""Bytes of a piece: whole blocks of the hash, and so few that a piece and its source fit the second-level cache."""


class PartRange(NamedTuple):
    """Bytes ``begin`` to ``end`` of part number ``part``, which lie at byte ``offset`` of the row."""

    part: int
    begin: int
    end: int
    offset: int


class Piece(NamedTuple):
    """A range of every row, copied and hashed at one time.

    Attributes:
        begin: First word in the row.
        end: The word after it.
        ranges: The parts that lie in it.
    """

    begin: int
    end: int
    ranges: tuple[PartRange, ...]

    def copy(self, parts: Sequence[Bytes], row: Bytes) -> None:
        """Copy the piece of an expert, given by its parts, into a staged row."""
        for part, begin, end, offset in self.ranges:
            row[offset : offset + end - begin] = parts[part][begin:end]


@dataclass(frozen=True, slots=True)
class RowLayout:
    """How the tensors of one expert lie in a staged row.

    Attributes:
        segments: Offset and length in bytes of each tensor's part.
        payload_bytes: Length of the parts together, padded to whole words.
        pieces: The pieces of a row, in order.
    """

    segments: tuple[tuple[int, int], ...]
    payload_bytes: int
    pieces: tuple[Piece, ...]

    @property
    def stride(self) -> int:
        """Bytes from one staged row to the next: the payload, and a word for its hash."""
        return self.payload_bytes + WORD_BYTES

    @property
    def rows_per_block(self) -> int:
        """Rows that are packed at one time: as many as make up a piece, and at least one."""
        return max(1, _PIECE_BYTES // self.stride)

    @classmethod
    def of(cls, row_bytes: Sequence[int]) -> RowLayout:
        """Lay parts of the given lengths one after the other, each at a whole word."""
        segments, offset = [], 0
        for length in row_bytes:
            segments.append((offset, length))
            offset += -(-length // WORD_BYTES) * WORD_BYTES
        starts = range(0, offset, _PIECE_BYTES)
        pieces = tuple(_piece(start, min(start + _PIECE_BYTES, offset), segments) for start in starts)
        return cls(tuple(segments), offset, pieces)


def _piece(begin: int, end: int, segments: Sequence[tuple[int, int]]) -> Piece:
    ranges = []
    for part, (offset, length) in enumerate(segments):
        first, last = max(begin - offset, 0), min(end - offset, length)
        if first < last:
            ranges.append(PartRange(part, first, last, offset + first))
    return Piece(begin // WORD_BYTES, end // WORD_BYTES, tuple(ranges))
