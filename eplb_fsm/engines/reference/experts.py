"""The expert-parallel experts block: dispatch over all-to-all, products of the local slots, combine.

The result for a token does not depend on the placement, to the bit: every product runs on a batch padded to a
multiple of `ROW_BLOCK` rows (unpadded, a row's bits depend on how many rows share its batch), and the
contributions are added at the token's own rank in top-k order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional

from eplb_fsm.engines.reference.collectives import exchange_blocks, exchange_rows
from eplb_fsm.errors import ConfigError

ROW_BLOCK = 16
"""Rows of an expert product come in multiples of this."""

RecordHook = Callable[[int, torch.Tensor], None]
"""Called in every forward pass with the MoE layer's index and the logical ids, int64 `(tokens, top_k)`."""


@dataclass(frozen=True)
class ExpertMaps:
    """The live tables that a forward pass reads; whoever rebalances writes them in place.

    Attributes:
        logical_to_physical_map: int64 `(num_moe_layers, num_logical_experts, width)`, -1 padded.
        logical_replica_count: int64 `(num_moe_layers, num_logical_experts)`.
    """

    logical_to_physical_map: torch.Tensor
    logical_replica_count: torch.Tensor


def check_row_bits(inputs: int, outputs: int, most_rows: int) -> None:
    """Checks that a row of a padded product has the same bits at every batch size that can occur.

    Args:
        inputs: Columns of the rows.
        outputs: Columns of the result.
        most_rows: Largest batch, before padding.

    Raises:
        ConfigError: On this machine's matrix product it has not, so placement would change the logits.
    """
    generator = torch.Generator().manual_seed(inputs * 1000 + outputs)
    most = -(-most_rows // ROW_BLOCK) * ROW_BLOCK
    rows = torch.randn(most, inputs, generator=generator)
    weight = torch.randn(inputs, outputs, generator=generator)
    reference = torch.cat([torch.mm(rows[i : i + ROW_BLOCK], weight) for i in range(0, most, ROW_BLOCK)])
    for size in range(ROW_BLOCK, most + 1, ROW_BLOCK):
        order = torch.randperm(most, generator=generator)[:size]
        if not torch.equal(torch.mm(rows[order], weight), reference[order]):
            raise ConfigError(
                f"the matrix product of this machine gives a row other bits in a batch of {size} rows than "
                f"in one of {ROW_BLOCK} ({inputs} x {outputs}, {torch.get_num_threads()} threads): run with "
                "one thread (OMP_NUM_THREADS=1) or another torch build"
            )


@dataclass(frozen=True)
class _Routes:
    """What every rank knows of one layer's pass after the dispatch, as this rank needs it.

    Attributes:
        rank_rows: Rows that each rank computes, `(ranks,)`.
        received: Rows that this rank computes for each rank.
        sent: Rows that each rank computes for this one.
        rows: Of each row to compute, its token's place among the tokens of all ranks.
        slots: And its local slot.
        back: Of each of this rank's assignments, its place among the results that come back.
    """

    rank_rows: np.ndarray
    received: list[int]
    sent: list[int]
    rows: np.ndarray
    slots: np.ndarray
    back: np.ndarray


class ParallelExperts(torch.nn.Module):
    """Stands where transformers has its experts block; holds only this rank's physical slots of one layer.

    The slots are plain tensors, not parameters: a rebalance writes their rows between two forward passes.

    Two all-to-alls make a pass. The dispatch sends every rank a block of fixed size, so that no sizes have to be
    exchanged before it: the tokens and, beside each, the physical slots it goes to. The results come back in
    blocks of exactly the rows that were computed.

    Args:
        layer: Index of the MoE layer, counted from 0.
        gate_up_proj: Local slots' gate and up weights, `(num_local, hidden, 2 * intermediate)`, contiguous.
        down_proj: Local slots' down weights, `(num_local, intermediate, hidden)`, contiguous.
        max_tokens: Most tokens that any rank brings to one forward pass; the same on all ranks.
        top_k: Experts of a token.
        group: Process group of the engine, or None for the default one.
    """

    def __init__(
        self,
        layer: int,
        gate_up_proj: torch.Tensor,
        down_proj: torch.Tensor,
        max_tokens: int,
        top_k: int,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.gate_up_proj, self.down_proj = gate_up_proj, down_proj
        self.group = group
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        self.num_local = gate_up_proj.shape[0]
        self.hidden, self.intermediate = gate_up_proj.shape[1], down_proj.shape[1]
        self.maps: ExpertMaps | None = None
        self.record: RecordHook | None = None
        self._gate_up_rows, self._down_rows = list(gate_up_proj), list(down_proj)  # views
        self._top_k, self._block_size = top_k, max_tokens * top_k
        self._block = torch.zeros(max_tokens, self.hidden + top_k)
        self._outgoing = torch.zeros(self.world_size, max_tokens, self.hidden + top_k)
        self._incoming = torch.zeros(self.world_size * max_tokens, self.hidden + top_k)
        self._token_number = torch.arange(max_tokens)[:, None] + self.rank * max_tokens
        self.rank_rows = np.zeros(self.world_size, dtype=np.int64)
        """Rows that each rank computed in this layer in the last forward pass: its true load."""

    def forward(self, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """Returns the weighted sum of the experts' outputs; every rank must call it in every forward pass.

        Args:
            hidden: This rank's tokens `(tokens, hidden)` float32; zero tokens are allowed.
            top_k_index: Logical experts, int64 `(tokens, top_k)`.
            top_k_weights: Router weights `(tokens, top_k)`.
        """
        tokens = len(hidden)
        if self.record is not None and tokens:
            self.record(self.layer, top_k_index)
        block = self._block[:tokens]
        block[:, : self.hidden] = hidden
        block[:, self.hidden :] = self._choose_slots(top_k_index)
        if tokens < len(self._block):
            self._block[tokens:, self.hidden :] = -1
        self._outgoing.copy_(self._block)
        exchange_blocks(self._incoming, self._outgoing, self.group)
        routes = self._route(tokens)
        self.rank_rows = routes.rank_rows
        results = exchange_rows(self._compute(routes), routes.received, routes.sent, self.group)
        mine = results.index_select(0, torch.from_numpy(routes.back))
        return _combine(mine.view(tokens, self._top_k, self.hidden), top_k_weights)

    def run_slot(self, hidden: torch.Tensor, slot: int) -> torch.Tensor:
        """Return the output of one local slot for `(rows, hidden)`, by the products that a pass makes."""
        gate, up = torch.mm(hidden, self._gate_up_rows[slot]).chunk(2, dim=-1)
        return torch.mm(functional.silu(gate) * up, self._down_rows[slot])

    def _choose_slots(self, logical: torch.Tensor) -> torch.Tensor:
        """Returns the physical slot of each assignment, int64 `(tokens, top_k)`; replicas by token number."""
        maps = self.maps
        if maps is None:
            raise ConfigError("the experts have no maps: call bind_maps() before the first forward pass")
        replica = self._token_number[: logical.shape[0]] % maps.logical_replica_count[self.layer][logical]
        return maps.logical_to_physical_map[self.layer][logical, replica]

    def _route(self, tokens: int) -> _Routes:
        """Reads off the dispatched slots who computes what; the same on all ranks but for their own part."""
        slots = self._incoming[:, self.hidden :].numpy().astype(np.int64).ravel()
        owners = slots // self.num_local  # -1 stays -1
        sources = owners.reshape(self.world_size, -1)
        own = sources[self.rank, : tokens * self._top_k]
        mine = np.flatnonzero(owners == self.rank)
        back = np.empty(len(own), dtype=np.int64)
        back[own.argsort(kind="stable")] = np.arange(len(own))
        return _Routes(
            rank_rows=np.bincount(owners + 1, minlength=self.world_size + 1)[1:],
            received=np.bincount(mine // self._block_size, minlength=self.world_size).tolist(),
            sent=np.bincount(own, minlength=self.world_size).tolist(),
            rows=mine // self._top_k,
            slots=slots[mine] - self.rank * self.num_local,
            back=back,
        )

    def _compute(self, routes: _Routes) -> torch.Tensor:
        """Returns each row's expert output; each active slot's rows lie together, padded to whole blocks."""
        counts = np.bincount(routes.slots, minlength=self.num_local)
        padded = -(-counts // ROW_BLOCK) * ROW_BLOCK
        shift = (padded.cumsum() - padded) - (counts.cumsum() - counts)
        order = routes.slots.argsort(kind="stable")
        places = np.empty(len(order), dtype=np.int64)
        places[order] = np.arange(len(order)) + shift[routes.slots[order]]
        index = np.zeros(int(padded.sum()), dtype=np.int64)  # padding repeats a token; nobody reads its result
        index[places] = routes.rows
        batch = self._incoming[:, : self.hidden].index_select(0, torch.from_numpy(index))
        active = np.flatnonzero(counts).tolist()
        sizes = padded[active].tolist()
        gate_up = batch.new_empty((len(batch), 2 * self.intermediate))
        for slot, rows, result in zip(
            active, torch.split_with_sizes(batch, sizes), torch.split_with_sizes(gate_up, sizes), strict=True
        ):
            torch.mm(rows, self._gate_up_rows[slot], out=result)
        gate, up = gate_up.chunk(2, dim=-1)
        inner = functional.silu(gate).mul_(up)
        for slot, rows, result in zip(
            active, torch.split_with_sizes(inner, sizes), torch.split_with_sizes(batch, sizes), strict=True
        ):
            torch.mm(rows, self._down_rows[slot], out=result)
        return batch.index_select(0, torch.from_numpy(places))


def _combine(outputs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Adds `(tokens, top_k, hidden)` over top_k, weighted, always in the order of the router's choice."""
    first, *others = zip(outputs.unbind(1), weights.unsqueeze(2).unbind(1), strict=True)
    total = first[0] * first[1]
    for output, weight in others:
        total.addcmul_(output, weight)
    return total
