"""The MoE kernel for CPUs, which is told which experts are local but does not look.

It takes the ids of all experts as rows of the local weights, so that under expert parallelism a rank reads beyond its
weights.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.experts import cpu_moe


def apply() -> None:
    """Hand rows of the local weights to the kernel, and no weight for what other ranks compute."""
    apply_experts = cpu_moe.CPUUnquantizedExperts.apply

    def apply_local_experts(
        self: Any,
        *,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        expert_map: torch.Tensor | None,
        **others: Any,
    ) -> None:
        if expert_map is not None:
            topk_weights, topk_ids = _local(topk_weights, topk_ids, expert_map)
        apply_experts(self, topk_weights=topk_weights, topk_ids=topk_ids, expert_map=expert_map, **others)

    cpu_moe.CPUUnquantizedExperts.apply = apply_local_experts


def _local(weights: torch.Tensor, ids: torch.Tensor, expert_map: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """An expert of another rank, or none at all, becomes the first local one with a weight of zero."""
    rows = expert_map[ids.long().clamp(min=0)].where(ids >= 0, -1)
    return weights.where(rows >= 0, 0), rows.clamp(min=0).to(ids.dtype)
