"""A KV cache of fixed size: one row per sequence slot, each at its own position."""

from __future__ import annotations

import torch

SEEN_BLOCK = 32
"""The attention looks at whole blocks of so many positions, as many as the longest sequence has."""


class SlotCache:
    """Keys and values of all layers, allocated once; a slot is reset by starting again at position 0.

    It is handed to transformers' attention as its cache, of which that calls only `update`.

    Args:
        num_layers: Layers of the model.
        slots: Sequences that decode at the same time.
        key_value_heads: Heads of keys and values.
        length: Most tokens of one sequence.
        head_dim: Columns of a head.
    """

    def __init__(self, num_layers: int, slots: int, key_value_heads: int, length: int, head_dim: int) -> None:
        self._shape = (slots, length, key_value_heads, head_dim)
        rows = (num_layers, slots * length, key_value_heads * head_dim)
        self._keys, self._values = torch.zeros(rows), torch.zeros(rows)
        self._range = torch.arange(length)
        self._first_rows = torch.arange(slots) * length
        self._slots: torch.Tensor | None = None
        self._index = self._first_rows
        self._seen = length

    def begin(self, rows: torch.Tensor | None, positions: torch.Tensor) -> torch.Tensor:
        """Says which slots decode in this pass and where; returns the mask for the attention.

        Args:
            rows: Slots, int64 `(tokens,)`, or None for all.
            positions: Position of each one's token, int64 `(tokens,)`.

        Returns:
            What each token may look at: bool `(tokens, 1, 1, seen)`, where `seen` covers the longest sequence.
        """
        self._slots = rows
        self._index = (self._first_rows if rows is None else self._first_rows[rows]) + positions
        self._seen = min(self._shape[1], -(-int(positions.max() + 1) // SEEN_BLOCK) * SEEN_BLOCK)
        return (self._range[: self._seen] <= positions[:, None])[:, None, None, :]

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores one new token of each slot, `(tokens, heads, 1, head_dim)`; returns all keys and values seen."""
        return self._put(self._keys[layer_idx], keys), self._put(self._values[layer_idx], values)

    def _put(self, stored: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        stored.index_copy_(0, self._index, new.reshape(len(new), -1))
        past = stored.view(self._shape)
        if self._slots is not None:
            past = past.index_select(0, self._slots)
        return past[:, : self._seen].transpose(1, 2)
