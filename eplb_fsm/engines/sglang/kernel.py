"""SGLang's own kernel, for one slot of a layer."""

from __future__ import annotations

from typing import Any

import torch


def run_standard_slot(experts: Any, hidden_states: torch.Tensor, local_slot: int) -> torch.Tensor:
    """Run tokens through one slot with the kernel of SGLang's standard dispatch."""
    from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    num_tokens, device = len(hidden_states), hidden_states.device
    ids = torch.full((num_tokens, 1), local_slot, dtype=torch.int32, device=device)
    ones = torch.ones(num_tokens, 1, device=device)
    logits = torch.zeros(num_tokens, experts.num_local_experts, device=device)
    routed = StandardTopKOutput(topk_weights=ones, topk_ids=ids, router_logits=logits)
    output = experts.run_moe_core(
        StandardDispatchOutput(hidden_states=hidden_states, hidden_states_scale=None, topk_output=routed)
    )
    hidden: torch.Tensor = output.hidden_states
    return hidden
