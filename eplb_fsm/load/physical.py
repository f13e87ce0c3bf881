"""Counting where the engine counts physical experts: folded into logical ones before each change of the map."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from eplb_fsm.load.recorder import LoadRecorder
from eplb_fsm.placement.placement import Placement


class PhysicalLoadRecorder(LoadRecorder):
    """Tokens per logical expert and layer, from an engine's own counts per physical expert.

    A slot's count belongs to the expert that the slot held while it was counted. So :meth:`remap` has to be called in
    stream order at every commit, before a forward pass with the new map is enqueued.

    All methods only enqueue, as in :class:`LoadRecorder`.

    Args:
        placements: What the slots of each bank hold now.
        device: Where the engine's counts are.
        num_buckets: As for :class:`LoadRecorder`.
    """

    def __init__(
        self, placements: Sequence[Placement], device: torch.device | str = "cpu", num_buckets: int = 4
    ) -> None:
        shapes = [(placement.num_moe_layers, placement.num_logical_experts) for placement in placements]
        super().__init__(shapes, device, num_buckets)
        # Columns of the total: the first one is nobody's, and takes what was counted for an empty slot.
        self._columns = tuple(torch.tensor(p.physical_to_logical_map + 1).to(device) for p in placements)
        self._open = tuple(torch.zeros_like(columns) for columns in self._columns)
        self._totals = tuple(self._bank_total(bank) for bank in range(len(placements)))
        self._takers: list[Callable[[], object]] = []

    def add(self, bank: int, counts: torch.Tensor) -> None:
        """Count a pass.

        Args:
            bank: Number of the bank.
            counts: (num_moe_layers, num_physical_experts) tokens, any integer dtype, on the recorder's device.
        """
        self._open[bank].add_(counts)

    def taker(self, bank: int, counts: torch.Tensor) -> Callable[[], object]:
        """Return what takes the counts out of an engine's own tensor, and sets that to zero.

        They are taken at each :meth:`remap`, :meth:`rotate` and :meth:`snapshot` too. So an engine that adds its passes
        up need not call this after each of them, only before a count could overflow.

        Args:
            bank: Number of the bank.
            counts: As for :meth:`add`; the same tensor for good.
        """
        if counts.device.type == "cpu":  # numpy's calls cost a fraction of torch's where there is so little to add
            mine, theirs = self._open[bank].numpy(), counts.numpy()

            def take() -> None:
                np.add(mine, theirs, out=mine)
                theirs.fill(0)
        else:

            def take() -> None:
                self._open[bank].add_(counts)
                counts.zero_()

        self._takers.append(take)
        return take

    def remap(self, bank: int, layers: torch.Tensor, rows: torch.Tensor) -> None:
        """Say what the slots of some layers hold from here on.

        Args:
            bank: Number of the bank.
            layers: int64 (n,) MoE layers of the bank.
            rows: int64 (n, num_physical_experts) logical experts, -1 for an empty slot.
        """
        self._fold()
        self._columns[bank].index_copy_(0, layers, rows + 1)

    def rotate(self) -> None:
        """Close the open bucket, with what was counted so far."""
        self._fold()
        super().rotate()

    def snapshot(self) -> torch.Tensor:
        """As in :class:`LoadRecorder`."""
        self._fold()
        return super().snapshot()

    def _fold(self) -> None:
        for take in self._takers:
            take()
        for total, columns, counts in zip(self._totals, self._columns, self._open, strict=True):
            total.scatter_add_(1, columns, counts)
            counts.zero_()
