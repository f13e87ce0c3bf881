"""vLLM's own kernel, for one slot of a layer."""

from __future__ import annotations

from typing import Any

import torch


def run_slot(module: Any, hidden_states: torch.Tensor, local_slot: int) -> torch.Tensor:
    """Run tokens through one slot of a layer's ``RoutedExperts``."""
    num_tokens, device = len(hidden_states), hidden_states.device
    physical = module.moe_config.moe_parallel_config.ep_rank * module.local_num_experts + local_slot
    ids = torch.full((num_tokens, 1), physical, dtype=torch.int32, device=device)
    ones = torch.ones(num_tokens, 1, device=device)
    output: torch.Tensor = module.forward_modular(hidden_states, ones, ids)
    return output
