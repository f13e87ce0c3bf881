"""Trying a bank out before serving, in real processes."""

from __future__ import annotations

import torch
import torch.distributed as dist

from eplb_fsm import Placement, RebalanceConfig, RebalanceFSM
from eplb_fsm.errors import BankError
from eplb_fsm.runtime.failstop import raise_error
from tests.benchmarks.ranks import expert_bank, run_ranks

LAYERS, LOGICAL, PHYSICAL = 2, 8, 12


def _verify(rank: int, num_ranks: int, store: dist.Store, is_complete: bool) -> tuple[str, bool]:
    """Return the error of verify_bank(), and whether the live rows are what they were."""
    bank = expert_bank(LAYERS, LOGICAL, PHYSICAL, num_ranks, 12 * 64)
    placement = Placement.initial(LAYERS, LOGICAL, PHYSICAL, num_ranks)
    before = [[tensor.clone() for tensor in layer.values()] for layer in bank.tensors]
    fixed = torch.randn(128, generator=torch.Generator().manual_seed(1))
    scale = torch.arange(PHYSICAL // num_ranks) + 1.0 + 10 * rank  # belongs to the experts, and is not registered

    def probe(layer: int, local_slot: int) -> torch.Tensor:
        output = bank.tensors[layer]["w13"][local_slot] * fixed
        return output if is_complete else output * scale[local_slot]

    config = RebalanceConfig(num_redundant_experts=PHYSICAL - LOGICAL)
    with RebalanceFSM.connect(store, rank, num_ranks, [bank], [placement], config, fail_stop=raise_error) as fsm:
        try:
            fsm.verify_bank(probe)
            error = ""
        except BankError as refused:
            error = str(refused)
    same = all(
        torch.equal(tensor, old)
        for layer, olds in zip(bank.tensors, before, strict=True)
        for tensor, old in zip(layer.values(), olds, strict=True)
    )
    return error, same


def test_a_complete_bank_is_accepted_and_left_as_it_was() -> None:
    """Moving every registered tensor of an expert moves its output, and the weights come back."""
    assert run_ranks(2, _verify, True) == [("", True)] * 2


def test_a_tensor_that_was_not_registered_is_found_on_every_rank() -> None:
    """An expert whose scale stays behind gives another output elsewhere: all ranks refuse, naming the layers."""
    for error, same in run_ranks(2, _verify, False):
        assert "layers [0, 1]" in error
        assert "register every tensor" in error
        assert same
