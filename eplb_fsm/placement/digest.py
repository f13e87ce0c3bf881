"""Digests: 64-bit position-dependent sums of mixed words, not cryptographic.

A digest is a sum (modulo 2**64) of one mixed word per position. So the digest of a placement can
follow a move by subtracting the old slot's word and adding the new one's, and one changed word
always changes the sum, because the mixing is a bijection. Integers only: equal on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

UInt64Array = NDArray[np.uint64]
Int64Array = NDArray[np.int64]

_MASK = (1 << 64) - 1
# The increment and the two multipliers of splitmix64, whose outputs for consecutive keys pass the
# usual batteries of randomness tests: neighbouring slots and experts get unrelated words.
_STEP, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_U30, _U27, _U31 = np.uint64(30), np.uint64(27), np.uint64(31)
_U_STEP, _U_FIRST, _U_SECOND = np.uint64(_STEP), np.uint64(_FIRST), np.uint64(_SECOND)


def mixed(keys: UInt64Array) -> UInt64Array:
    """The splitmix64 word of every key; uint64 in and out, any shape, a bijection."""
    word = keys * _U_STEP
    word ^= word >> _U30
    word *= _U_FIRST
    word ^= word >> _U27
    word *= _U_SECOND
    word ^= word >> _U31
    return word


def mixed_int(key: int) -> int:
    """:func:`mixed` of one Python integer, as a non-negative integer below 2**64."""
    word = (key * _STEP) & _MASK
    word = ((word ^ (word >> 30)) * _FIRST) & _MASK
    word = ((word ^ (word >> 27)) * _SECOND) & _MASK
    return word ^ (word >> 31)


def signed(word: int) -> int:
    """A 64-bit word as a signed integer, the form in which a vote carries it."""
    word &= _MASK
    return word - (1 << 64) if word >> 63 else word


def slot_words(
    layers: Int64Array, slots: Int64Array, experts: Int64Array, num_slots: int, num_experts: int
) -> UInt64Array:
    """The word of each (layer, slot, expert), whose sum over a layer is the layer's digest.

    Args:
        layers: Layer of each slot, int64; the three arrays broadcast against each other.
        slots: Physical slot within the layer, int64.
        experts: Logical expert in the slot, or -1 for an empty one, int64.
        num_slots: Physical slots per layer.
        num_experts: Logical experts per layer.

    Returns:
        uint64 words, one per broadcast element.
    """
    # An injective key: no two different (layer, slot, expert) share a word.
    keys = (layers * num_slots + slots) * (num_experts + 1) + (experts + 2)
    return mixed(keys.astype(np.uint64))


def header_word(shape: Sequence[int]) -> int:
    """A word for the shape, so that equal maps of different shapes have different digests."""
    word = 0
    for number in shape:
        word = mixed_int(word + number + 1)
    return word


def combined(header: int, layer_words: UInt64Array) -> int:
    """The signed digest of a placement from its header and the words of its layers."""
    return signed(mixed_int(header + int(layer_words.sum())))


def combined_path(header: int, layer_words: UInt64Array, changes: UInt64Array) -> Int64Array:
    """:func:`combined` after each of some changes of the sum of the layers' words; int64, 1-d."""
    start = (header + int(layer_words.sum())) & _MASK
    return mixed(changes + np.uint64(start)).view(np.int64)


def combined_live(digests: Sequence[int]) -> int:
    """The signed digest of several banks' placements, in bank order."""
    return signed(mixed_int(sum(mixed_int(d + (bank + 1) * _STEP) for bank, d in enumerate(digests))))


def combined_live_path(digests: Int64Array) -> Int64Array:
    """:func:`combined_live` for each column of a (banks, chunks) int64 array; (chunks,) int64."""
    banks = np.arange(1, digests.shape[0] + 1, dtype=np.uint64) * _U_STEP
    return mixed(mixed(digests.view(np.uint64) + banks[:, None]).sum(axis=0)).view(np.int64)


def words_digest(words: Int64Array) -> int:
    """The signed digest of a one-dimensional int64 array; covers values, positions and length."""
    positions = np.arange(1, len(words) + 1, dtype=np.uint64) * _U_SECOND
    total = int(mixed(words.view(np.uint64) + positions).sum())
    return signed(mixed_int(total + mixed_int(len(words))))
