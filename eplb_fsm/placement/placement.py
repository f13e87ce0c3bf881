"""Which logical expert each physical slot holds: an immutable value."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import ArrayLike

from eplb_fsm.errors import PlacementError
from eplb_fsm.placement import digest as _digest
from eplb_fsm.placement.digest import Int64Array, UInt64Array
from eplb_fsm.placement.validate import check_experts, checked_map, replica_counts


class Placement:
    """The physical-to-logical map of every MoE layer of one bank, with what derives from it.

    Immutable, compared by value, hashable; may be used from any thread. Rank r owns the slots
    ``r * num_local_physical_experts`` up to the next rank's first. An expert may have several slots on
    one rank: they share its load like replicas on different ranks.

    Args:
        physical_to_logical_map: (num_moe_layers, num_physical_experts) integers; -1 is an empty slot.
        num_logical_experts: Logical experts per layer.
        num_ranks: Ranks that share the slots equally.

    Raises:
        PlacementError: the map is not valid; the message names the first offending entry.
    """

    def __init__(self, physical_to_logical_map: ArrayLike, num_logical_experts: int, num_ranks: int) -> None:
        self._fill(
            checked_map(physical_to_logical_map, num_logical_experts, num_ranks),
            num_logical_experts,
            num_ranks,
        )

    @classmethod
    def initial(cls, num_moe_layers: int, num_logical_experts: int, num_physical_experts: int, num_ranks: int) -> Self:
        """The layout before any rebalance: slot i holds expert ``i % num_logical_experts``.

        Raises:
            PlacementError: fewer slots than experts, or slots that do not divide among the ranks.
        """
        if num_moe_layers < 1 or num_logical_experts < 1:
            raise PlacementError(
                f"num_moe_layers={num_moe_layers} and num_logical_experts={num_logical_experts} must be 1 or more"
            )
        row = np.arange(max(num_physical_experts, 0), dtype=np.int64) % num_logical_experts
        return cls(np.tile(row, (num_moe_layers, 1)), num_logical_experts, num_ranks)

    @classmethod
    def _trusted(cls, array: Int64Array, num_logical_experts: int, num_ranks: int) -> Self:
        """Wrap an array that the caller owns and has shown to be valid; for this package only."""
        placement = cls.__new__(cls)
        placement._fill(array, num_logical_experts, num_ranks)
        return placement

    def _fill(self, array: Int64Array, num_logical_experts: int, num_ranks: int) -> None:
        array.flags.writeable = False
        self._map = array
        self._num_logical_experts = int(num_logical_experts)
        self._num_ranks = int(num_ranks)

    @property
    def physical_to_logical_map(self) -> Int64Array:
        """(num_moe_layers, num_physical_experts) int64, read-only; -1 marks an empty slot."""
        return self._map

    @property
    def num_moe_layers(self) -> int:
        """MoE layers of the bank."""
        return len(self._map)

    @property
    def num_physical_experts(self) -> int:
        """Slots per layer, over all ranks."""
        return int(self._map.shape[1])

    @property
    def num_logical_experts(self) -> int:
        """Experts of the model per layer."""
        return self._num_logical_experts

    @property
    def num_redundant_experts(self) -> int:
        """Slots per layer beyond one for each logical expert."""
        return self.num_physical_experts - self._num_logical_experts

    @property
    def num_ranks(self) -> int:
        """Ranks that share the slots."""
        return self._num_ranks

    @property
    def num_local_physical_experts(self) -> int:
        """Slots per layer on one rank."""
        return self.num_physical_experts // self._num_ranks

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(num_moe_layers, num_physical_experts, num_logical_experts, num_ranks)."""
        return self.num_moe_layers, self.num_physical_experts, self._num_logical_experts, self._num_ranks

    @cached_property
    def logical_replica_count(self) -> Int64Array:
        """(num_moe_layers, num_logical_experts) int64, read-only: slots that hold each expert."""
        counts = replica_counts(self._map, self._num_logical_experts)
        counts.flags.writeable = False
        return counts

    @cached_property
    def logical_to_physical_map(self) -> Int64Array:
        """:meth:`logical_to_physical` with the smallest width, read-only."""
        table = self.logical_to_physical()
        table.flags.writeable = False
        return table

    def logical_to_physical(
        self, width: int | None = None, layers: Sequence[int] | Int64Array | None = None
    ) -> Int64Array:
        """The slots of every expert, ascending, padded with -1.

        Args:
            width: Length of the last axis; the largest replica count of the chosen layers by default.
            layers: Layers to compute, in this order; all by default.

        Returns:
            A fresh (layers, num_logical_experts, width) int64 array.

        Raises:
            PlacementError: some expert has more replicas than `width`.
        """
        rows = self._map if layers is None else self._map[np.asarray(layers, dtype=np.int64)]
        counts = replica_counts(rows, self._num_logical_experts)
        largest = int(counts.max(initial=1))
        width = largest if width is None else width
        if largest > width:
            raise PlacementError(
                f"an expert has {largest} replicas, the logical-to-physical table holds {width}; "
                "make the table wider or use a policy that makes fewer replicas"
            )
        return _slots_of_experts(rows, counts, width)

    @cached_property
    def _layer_words(self) -> UInt64Array:
        layers = np.arange(self.num_moe_layers)[:, None]
        slots = np.arange(self.num_physical_experts)[None, :]
        words = _digest.slot_words(layers, slots, self._map, self.num_physical_experts, self._num_logical_experts)
        return np.asarray(words.sum(axis=1))

    @property
    def layer_digests(self) -> tuple[int, ...]:
        """Signed 64-bit digest of each layer."""
        return tuple(self._layer_words.view(np.int64).tolist())

    @cached_property
    def digest(self) -> int:
        """Signed 64-bit digest of the map and its shape; the same on every machine."""
        return _digest.combined(_digest.header_word(self.shape), self._layer_words)

    def with_layer(self, layer: int, row: ArrayLike) -> Placement:
        """This placement with another row in one layer; only that layer is checked and digested.

        Args:
            layer: Layer to replace, 0..num_moe_layers-1.
            row: (num_physical_experts,) integers.

        Raises:
            PlacementError: no such layer, another length, or an invalid row.
        """
        if not 0 <= layer < self.num_moe_layers:
            raise PlacementError(f"there is no layer {layer}; layers are 0..{self.num_moe_layers - 1}")
        fresh = np.asarray(row)
        if fresh.shape != (self.num_physical_experts,) or not np.issubdtype(fresh.dtype, np.integer):
            raise PlacementError(
                f"row of layer {layer} has shape {fresh.shape} and dtype {fresh.dtype}; "
                f"give {self.num_physical_experts} integers"
            )
        array = self._map.copy()
        array[layer] = fresh
        check_experts(array[layer : layer + 1], self._num_logical_experts, layer)
        changed = Placement._trusted(array, self._num_logical_experts, self._num_ranks)
        words = self._layer_words.copy()
        words[layer] = _digest.slot_words(
            np.int64(layer) * np.ones(1, dtype=np.int64),
            np.arange(self.num_physical_experts),
            array[layer],
            self.num_physical_experts,
            self._num_logical_experts,
        ).sum()
        changed.__dict__["_layer_words"] = words
        return changed

    def save(self, path: str | Path) -> None:
        """Write the placement to a `.json` or `.npz` file; atomic and durable. Blocks on the disk.

        Raises:
            PlacementError: another suffix, or the file cannot be written.
        """
        from eplb_fsm.placement.files import save_placement

        save_placement(self, Path(path))

    @classmethod
    def load(cls, path: str | Path, like: Placement | None = None) -> Placement:
        """Read a placement that :meth:`save` wrote. Blocks on the disk.

        Args:
            path: A `.json` or `.npz` file.
            like: If given, the file must have this placement's shape.

        Raises:
            PlacementError: the file is missing, truncated, corrupted, of another version or shape.
        """
        from eplb_fsm.placement.files import load_placement

        return load_placement(Path(path), like)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Placement):
            return NotImplemented
        return self.shape == other.shape and np.array_equal(self._map, other._map)

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return (
            f"Placement({self.num_moe_layers} layers, {self._num_logical_experts} logical, "
            f"{self.num_physical_experts} physical, {self._num_ranks} ranks, digest {self.digest:#x})"
        )


def _slots_of_experts(rows: Int64Array, counts: Int64Array, width: int) -> Int64Array:
    """Scatter the slots of each row into (layers, experts, width) without a loop over slots."""
    layers, num_experts = counts.shape
    order = np.argsort(rows, axis=1, kind="stable")
    experts = np.take_along_axis(rows, order, axis=1)
    # Sorted by expert, the first slot of expert e stands after the empty slots and all smaller experts.
    empty = rows.shape[1] - counts.sum(axis=1, keepdims=True)
    starts = np.cumsum(counts, axis=1) - counts + empty
    table = np.full((layers, num_experts, width), -1, dtype=np.int64)
    layer, column = np.nonzero(experts >= 0)
    expert = experts[layer, column]
    table[layer, expert, column - starts[layer, expert]] = order[layer, column]
    return table
