"""Trying a bank out: does moving its registered tensors really move an expert?"""

from __future__ import annotations

from typing import Protocol

import torch

from eplb_fsm.errors import BankError
from eplb_fsm.runtime.bank import Bank
from eplb_fsm.runtime.domain import Domain
from eplb_fsm.runtime.transport import Transport

_SLOT = 0
_TOLERANCE = 1e-5
"""Ranks may have other processors, whose products differ in the last bits; a wrong tensor differs in the first."""


class Probe(Protocol):
    """Runs a fixed input through one local slot with the engine's own kernel."""

    def __call__(self, layer: int, local_slot: int) -> torch.Tensor:
        """Return the output of the slot's expert; float, of one shape on all ranks."""
        ...


def verify_bank(bank: Bank, domain: Domain, transport: Transport, probe: Probe, timeout_s: float) -> None:
    """Move one expert of each layer to the next rank, compare its output there with the one at home, move it back.

    Finds tensors that belong to an expert and were not registered, and kernels that read something else than
    what was registered (prepacked copies). Every rank must call it, before the first forward pass; blocks.

    Args:
        bank: The bank to try.
        domain: The ranks; with one rank there is nothing to try.
        transport: Not in use by the worker yet.
        probe: The engine's kernel.
        timeout_s: Longest wait for one exchange.

    Raises:
        BankError: On every rank alike, naming the layers.
        TransferError: If the ranks could not exchange.
    """
    if domain.world_size == 1:
        return
    wrong = torch.zeros(bank.num_moe_layers, dtype=torch.int64)
    for layer in range(bank.num_moe_layers):
        home = bank.live_row(layer, _SLOT)
        here = probe(layer, _SLOT).detach().to("cpu", torch.float32).contiguous()
        mine = torch.cat([*(row.cpu() for row in home), here.reshape(-1).view(torch.uint8)])
        theirs = torch.empty_like(mine)
        following = (domain.rank + 1) % domain.world_size
        preceding = (domain.rank - 1) % domain.world_size
        transport.begin([(following, mine)], [(preceding, theirs)], layer).wait(timeout_s)
        wrong[layer] = not _moved_well(bank, layer, probe, theirs, here)
        torch._foreach_copy_(home, _split(mine, home))
    transport.all_reduce_sum(wrong).wait(timeout_s)
    if wrong.any():
        layers = [bank.layer_ids[layer] for layer in wrong.nonzero().flatten().tolist()]
        raise BankError(
            f"bank {bank.name!r}: an expert of layers {layers} gave another output after its registered tensors "
            f"({', '.join(bank.tensors[0])}) were moved to another rank; register every tensor of an expert, and "
            "the ones that the kernel reads"
        )


def _moved_well(bank: Bank, layer: int, probe: Probe, received: torch.Tensor, like: torch.Tensor) -> bool:
    rows = bank.live_row(layer, _SLOT)
    torch._foreach_copy_(rows, _split(received, rows))
    wanted = received[received.numel() - like.numel() * like.element_size() :].clone().view(torch.float32)
    seen = probe(layer, _SLOT).detach().to("cpu", torch.float32).reshape(-1)
    return torch.allclose(seen, wanted, rtol=_TOLERANCE, atol=_TOLERANCE)


def _split(packed: torch.Tensor, rows: list[torch.Tensor]) -> list[torch.Tensor]:
    lengths = [row.numel() for row in rows]
    return list(torch.split_with_sizes(packed[: sum(lengths)], lengths))
