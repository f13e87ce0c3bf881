"""The hash of a moved row: it is what it says, and changed words and words that change places are seen."""

from __future__ import annotations

import numpy as np
import pytest

from eplb_fsm.runtime.rowhash import HashKeys, Words, combine_blocks, hash_blocks, hash_keys

SIZES = [1, 3, 511, 512, 513, 1024, 1700]


def _rows(num_words: int, num_rows: int = 2) -> Words:
    return np.random.default_rng(num_words).integers(-(1 << 62), 1 << 62, size=(num_rows, num_words))


def _hash(rows: Words, keys: HashKeys) -> Words:
    return combine_blocks(hash_blocks(rows, keys), keys)


@pytest.mark.parametrize("num_words", SIZES)
def test_is_the_sum_of_words_times_odd_keys(num_words: int) -> None:
    """Word by word in Python's integers, modulo 2**64; of a slice of a longer row, as rows lie in a buffer."""
    keys = hash_keys(num_words)
    assert all(key % 2 for part in keys for key in part.tolist())
    rows = np.concatenate([_rows(num_words), np.ones((2, 1), dtype=np.int64)], axis=1)[:, :-1]
    for row, seen in zip(rows.tolist(), _hash(rows, keys).tolist(), strict=True):
        total = 0
        for position, word in enumerate(row):
            block, place = divmod(position, len(keys.words))
            total += word * keys.words[place].item() * keys.blocks[block].item()
        assert (total - seen) % (1 << 64) == 0


@pytest.mark.parametrize("num_words", SIZES)
def test_a_flipped_bit_of_any_word_is_seen(num_words: int) -> None:
    """The lowest and the highest bit of each word."""
    row = _rows(num_words, 1)
    damaged = row.repeat(2 * num_words, axis=0)
    places = np.arange(num_words)
    damaged[places, places] ^= 1
    damaged[places + num_words, places] ^= -(1 << 63)
    keys = hash_keys(num_words)
    assert not (_hash(damaged, keys) == _hash(row, keys)).any()


def test_words_that_change_places_are_seen() -> None:
    """Within a block, from block to block at the same place, and whole blocks."""
    row = _rows(1700, 1)
    damaged = row.repeat(4, axis=0)
    for index, (one, other, length) in enumerate([(3, 4, 1), (3, 515, 1), (0, 512, 512), (3, 1699, 1)]):
        damaged[index, one : one + length] = row[0, other : other + length]
        damaged[index, other : other + length] = row[0, one : one + length]
    keys = hash_keys(1700)
    assert not (_hash(damaged, keys) == _hash(row, keys)).any()
