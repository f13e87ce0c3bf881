"""SGLang's tables of where experts are, written in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from eplb_fsm.placement.digest import Int64Array
from eplb_fsm.placement.placement import Placement
from eplb_fsm.placement.split import turn_tables
from eplb_fsm.placement.validate import Float64Array
from eplb_fsm.runtime.maps import Remapped, table_rows


class _Prepared(NamedTuple):
    live: list[torch.Tensor]
    new: list[torch.Tensor]
    layers: torch.Tensor
    experts: torch.Tensor


class LocationTables:
    """A :class:`.MapWriter` for SGLang's ``ExpertLocationMetadata``; its tensors keep their addresses.

    Args:
        metadata: SGLang's own.
        model_layers: The model's number of each MoE layer of the bank: its row in the tables.
        rank: This rank of the expert-parallel group.
        num_nodes: Nodes that the ranks are on.
        load: Is told what slots hold.
    """

    def __init__(
        self,
        metadata: Any,
        model_layers: Sequence[int],
        *,
        rank: int,
        num_nodes: int,
        load: Remapped,
    ) -> None:
        self._metadata = metadata
        self._model_layers = tuple(model_layers)
        self._rank = rank
        self._num_nodes = num_nodes
        self._load = load

    def prepare(
        self, bank: int, layers: Sequence[int], placement: Placement, shares: Float64Array | None = None
    ) -> object:
        """Compute the new rows of all tables; allocates, so it belongs in the worker."""
        meta = self._metadata
        width = meta.logical_to_all_physical_map.shape[-1]
        experts, slots, counts = table_rows(placement, width, layers)
        turns = slots if shares is None else turn_tables(placement, layers, shares, width)
        tables = [
            (meta.physical_to_logical_map, experts),
            (meta.physical_to_logical_map_cpu, experts),
            (meta.logical_to_all_physical_map, turns),
            # Read by the weight loader, which has to fill every slot once.
            (meta.logical_to_all_physical_map_cpu, slots),
            (meta.logical_to_all_physical_map_num_valid, counts if shares is None else (turns >= 0).sum(-1)),
        ]
        if meta.logical_to_rank_dispatch_physical_map is not None:
            nearest = nearest_slots(slots, counts, placement, self._rank, self._num_nodes)
            tables.append((meta.logical_to_rank_dispatch_physical_map, nearest))
        live: list[torch.Tensor] = []
        new: list[torch.Tensor] = []
        for table, rows in tables:
            live += [table[self._model_layers[layer]] for layer in layers]
            new += torch.from_numpy(rows).to(table.device, table.dtype).unbind(0)
        device = meta.physical_to_logical_map.device
        return _Prepared(live, new, torch.tensor(list(layers), device=device), torch.from_numpy(experts).to(device))

    def write(self, prepared: object) -> None:
        """Count what was seen so far for the old experts, then copy the new rows over the live ones."""
        assert isinstance(prepared, _Prepared)
        self._load.remap(0, prepared.layers, prepared.experts)
        torch._foreach_copy_(prepared.live, prepared.new)


def nearest_slots(slots: Int64Array, counts: Int64Array, placement: Placement, rank: int, num_nodes: int) -> Int64Array:
    """The one slot of each expert that this rank sends to, for ``--ep-dispatch-algorithm static``.

    As in SGLang one of its own, else one of its node; which one of the others is spread over ranks and experts.

    Args:
        slots: (layers, num_logical_experts, width) int64, padded with -1.
        counts: (layers, num_logical_experts) int64 slots of each expert.
        placement: Where the experts are.
        rank: This rank.
        num_nodes: Nodes; ranks are numbered node by node.

    Returns:
        (layers, num_logical_experts) int64.
    """
    num_local = placement.num_local_physical_experts
    is_slot = slots >= 0
    is_own = is_slot & (slots // num_local == rank)
    ranks_per_node = placement.num_ranks // num_nodes
    is_near = is_slot & (slots // (num_local * ranks_per_node) == rank // ranks_per_node)
    spread = (rank + np.arange(slots.shape[1])) % counts
    chosen = np.where(is_near.any(-1) & (is_near.sum(-1) < counts), is_near.argmax(-1), spread)
    chosen = np.where(is_own.any(-1), is_own.argmax(-1), chosen)
    nearest: Int64Array = np.take_along_axis(slots, chosen[..., None], axis=-1)[..., 0]
    return nearest
