"""The engine's collectives: two forms of one all-to-all.

gloo's all-to-all sends straight to every rank, where its all-gather goes round a ring; with few bytes the number
of hand-overs between processes is what counts, so that small all-gathers are made with it too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from eplb_fsm.errors import PeerLost


def exchange_blocks(incoming: torch.Tensor, outgoing: torch.Tensor, group: dist.ProcessGroup | None) -> None:
    """Sends one block to each rank and receives one from each; blocks until all ranks have sent.

    Args:
        incoming: Contiguous; the blocks of all ranks, rank by rank, one after the other.
        outgoing: Contiguous; as many elements, the block for each rank, rank by rank.
        group: Process group of the engine, or None for the default one.

    Raises:
        PeerLost: A rank has ended, or did not come in time; gloo does not say which.
    """
    try:
        dist.all_to_all_single(incoming.view(-1), outgoing.view(-1), group=group)
    except RuntimeError as error:
        raise _peer_lost(error) from error


def exchange_rows(
    rows: torch.Tensor, send_counts: Sequence[int], receive_counts: Sequence[int], group: dist.ProcessGroup | None
) -> torch.Tensor:
    """Sends `send_counts[r]` rows to rank r and returns the received rows, rank by rank; blocks.

    Args:
        rows: Contiguous `(sum(send_counts), columns)`, in the order of the ranks that get them.
        send_counts: Rows for each rank.
        receive_counts: Rows from each rank, as these ranks' `send_counts` say.
        group: Process group of the engine, or None for the default one.

    Raises:
        PeerLost: A rank has ended, or did not come in time; gloo does not say which.
    """
    received = rows.new_empty((sum(receive_counts), rows.shape[1]))
    try:
        dist.all_to_all_single(received, rows, list(receive_counts), list(send_counts), group=group)
    except RuntimeError as error:
        raise _peer_lost(error) from error
    return received


def _peer_lost(error: RuntimeError) -> PeerLost:
    return PeerLost(f"a collective of the forward pass failed, a rank has ended or hangs: {error}")
