"""Writing the engine's device tables that say where an expert lives.

An engine derives its own tables from a placement; a commit must change them in place, on the stream, without
allocating and without a loop over slots. So a writer prepares at staging, in the worker, and only copies at
the commit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from eplb_fsm.placement.digest import Int64Array
from eplb_fsm.placement.placement import Placement
from eplb_fsm.placement.split import table_width, turn_tables
from eplb_fsm.placement.validate import Float64Array


class MapWriter(Protocol):
    """The seam to an engine's tables; one writer serves all banks of a domain."""

    def prepare(
        self, bank: int, layers: Sequence[int], placement: Placement, shares: Float64Array | None = None
    ) -> object:
        """Compute what :meth:`write` will copy for these layers; worker thread and its stream, may take its time.

        Copies to an accelerator that it makes have to be done when it returns.

        Args:
            bank: Index of the bank.
            layers: Which layers.
            placement: What its slots will hold.
            shares: With ``replica_split="weighted"`` the share of its expert's tokens that each slot gets from this
                rank, float64 ``(len(layers), num_physical_experts)``; on several nodes those of other nodes may get
                none. None: the slots of an expert get equal shares.
        """
        ...

    def write(self, prepared: object) -> None:
        """Copy into the live tables; called in stream order. Must not raise, block or allocate.

        That is at a commit; with shares also once in each epoch before its first one.
        """
        ...


@dataclass(frozen=True, slots=True)
class BankMaps:
    """The live tables of one bank, int64, read by every forward pass.

    Attributes:
        physical_to_logical_map: ``(num_moe_layers, num_physical_experts)``.
        logical_to_physical_map: ``(num_moe_layers, num_logical_experts, width)``, padded with -1. The width is the
            largest number of replicas that any placement can give one expert, so that it never grows; at least 64 where
            shares are weighted.
        logical_replica_count: ``(num_moe_layers, num_logical_experts)`` entries of each expert in that table: its
            replicas. Where shares are weighted a slot has as many entries as its share wants.
    """

    physical_to_logical_map: torch.Tensor
    logical_to_physical_map: torch.Tensor
    logical_replica_count: torch.Tensor

    @property
    def tables(self) -> tuple[torch.Tensor, ...]:
        """All three, in the order of the fields."""
        return (self.physical_to_logical_map, self.logical_to_physical_map, self.logical_replica_count)


class Remapped(Protocol):
    """Who has to know what slots hold: a load source that counts physical experts."""

    def remap(self, bank: int, layers: torch.Tensor, rows: torch.Tensor) -> None:
        """Take note; see :meth:`eplb_fsm.load.physical.PhysicalLoadRecorder.remap`."""
        ...


class _Rows(NamedTuple):
    live: list[torch.Tensor]
    new: list[torch.Tensor]
    bank: int
    layers: torch.Tensor
    experts: torch.Tensor


class TensorMapWriter:
    """Keeps the three tables of each bank as torch tensors on one device.

    Args:
        placements: The placement of each bank at start.
        device: Where the engine reads them.
        is_weighted: Make room for weighted shares.
        maps: Tables that the engine has already, to be written from the first commit on; None: they are made.
        load: Is told what slots hold, before their tables are written; for engines that count physical experts.
    """

    def __init__(
        self,
        placements: Sequence[Placement],
        device: torch.device | str = "cpu",
        *,
        is_weighted: bool = False,
        maps: Sequence[BankMaps] | None = None,
        load: Remapped | None = None,
    ) -> None:
        self._load = load
        made = maps or [_make_maps(placement, device, is_weighted=is_weighted) for placement in placements]
        self.maps = tuple(made)
        self._widths = [tables.logical_to_physical_map.shape[-1] for tables in made]

    def _rows(self, bank: int, placement: Placement, layers: Sequence[int]) -> tuple[Int64Array, ...]:
        """Return rows that are read only, for :meth:`prepare`."""
        return table_rows(placement, self._widths[bank], layers)

    def prepare(
        self, bank: int, layers: Sequence[int], placement: Placement, shares: Float64Array | None = None
    ) -> object:
        """Return live rows and their new contents; allocates, so it belongs in the worker."""
        live: list[torch.Tensor] = []
        new: list[torch.Tensor] = []
        new_rows = self._rows(bank, placement, layers)
        if shares is not None:
            turns = turn_tables(placement, layers, shares, self._widths[bank])
            new_rows = new_rows[0], turns, (turns >= 0).sum(-1)
        for table, rows in zip(self.maps[bank].tables, new_rows, strict=True):
            live += [table[layer] for layer in layers]
            new += torch.from_numpy(rows).to(table.device).unbind(0)
        device = self.maps[bank].physical_to_logical_map.device
        return _Rows(
            live, new, bank, torch.tensor(list(layers), device=device), torch.from_numpy(new_rows[0]).to(device)
        )

    def write(self, prepared: object) -> None:
        """Copy the new rows over the live ones."""
        assert isinstance(prepared, _Rows)
        if self._load is not None:
            self._load.remap(prepared.bank, prepared.layers, prepared.experts)
        torch._foreach_copy_(prepared.live, prepared.new)


def _make_maps(placement: Placement, device: torch.device | str, *, is_weighted: bool) -> BankMaps:
    width = table_width(placement, is_weighted=is_weighted)
    rows = table_rows(placement, width, range(placement.num_moe_layers))
    return BankMaps(*(torch.from_numpy(table).to(device) for table in rows))


def table_rows(placement: Placement, width: int, layers: Sequence[int]) -> tuple[Int64Array, ...]:
    """Return fresh rows of the three tables for some layers; the second one has ``width`` columns."""
    slots_of = placement.logical_to_physical(width, list(layers))
    return placement.physical_to_logical_map[list(layers)], slots_of, (slots_of >= 0).sum(-1)
