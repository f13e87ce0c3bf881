"""The experts' forward pass on a rank that holds only some of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

WRONG_SLOT_VARIABLE = "SGLANG_ON_CPU_WRONG_SLOT"
"""`layer,rank,slot`: that rank computes what belongs to that slot with the next one's weights. A negative control."""


def moe_forward(
    original: Callable[..., torch.Tensor], layer: Any, x: torch.Tensor, topk_output: Any, moe_runner_config: Any
) -> torch.Tensor:
    """The weighted sum of the local experts' outputs, in place of SGLang's `moe_forward_native`.

    SGLang's function takes every id to be that of a local expert. With expert parallelism the dispatcher marks those
    of other ranks with -1, which it then uses as an index. A rank that holds all experts is left to the original.
    """
    if layer.w13_weight.shape[0] == layer.num_experts:
        return original(layer, x, topk_output, moe_runner_config)
    if moe_runner_config.activation != "silu" or moe_runner_config.apply_router_weight_on_input:
        raise NotImplementedError("only plain SwiGLU experts, as those of Qwen3-MoE")
    return _sum_of_local_experts(layer, x, _slots(layer, topk_output.topk_ids), topk_output.topk_weights)


def _sum_of_local_experts(layer: Any, x: torch.Tensor, slots: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    total = torch.zeros_like(x)
    for slot in slots[slots >= 0].unique().tolist():
        token, choice = (slots == slot).nonzero(as_tuple=True)
        gate, up = functional.linear(x[token], layer.w13_weight[slot]).chunk(2, dim=-1)
        output = functional.linear(functional.silu(gate) * up, layer.w2_weight[slot])
        total.index_add_(0, token, output * shares[token, choice].unsqueeze(-1).to(output.dtype))
    return total


def _slots(layer: Any, slots: torch.Tensor) -> torch.Tensor:
    wrong = os.environ.get(WRONG_SLOT_VARIABLE)
    if not wrong:
        return slots
    layer_id, rank, slot = map(int, wrong.split(","))
    if (layer_id, rank) != (layer.layer_id, layer.moe_ep_rank):
        return slots
    return slots.masked_fill(slots == slot, (slot + 1) % layer.w13_weight.shape[0])
