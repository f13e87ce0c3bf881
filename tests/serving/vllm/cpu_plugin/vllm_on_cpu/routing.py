"""From logical experts to physical ones, and the record of the load.

vLLM has both in one Triton kernel for GPUs; on other platforms the function of the same name returns its input. This is
the kernel's rule in plain torch.

VLLM_ON_CPU_IGNORE_MAP=1 is a negative control: load is recorded, weights move, but tokens still go where the logical
id points. Right until the first rearrangement, wrong after it.
"""

from __future__ import annotations

import os

import torch
from vllm.model_executor.layers.fused_moe.router import base_router

_KNUTH = 2654435769
_NOWHERE = -1


def apply() -> None:
    """Replace the identity."""
    ignores_map = os.environ.get("VLLM_ON_CPU_IGNORE_MAP") == "1"
    base_router.eplb_map_to_physical_and_record = _record_only if ignores_map else map_and_record


def map_and_record(
    topk_ids: torch.Tensor,
    expert_load_view: torch.Tensor,
    logical_to_physical_map: torch.Tensor,
    logical_replica_count: torch.Tensor,
    record_enabled: torch.Tensor,
    num_unpadded_tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """The physical expert of each choice; counts those of real tokens where recording is on."""
    if topk_ids.numel() == 0:
        return topk_ids
    physical = _physical_ids(topk_ids, logical_to_physical_map, logical_replica_count)
    if record_enabled:
        real = physical if num_unpadded_tokens is None else physical[: int(num_unpadded_tokens)]
        _record(real, expert_load_view)
    return physical.to(topk_ids.dtype)


def _physical_ids(topk_ids: torch.Tensor, physical_of: torch.Tensor, num_replicas: torch.Tensor) -> torch.Tensor:
    """All choices of one token take the replica that the hash of its position in the batch selects."""
    logical = topk_ids.long()
    is_expert = (logical >= 0) & (logical < num_replicas.shape[0])
    logical = logical.where(is_expert, 0)
    position = torch.arange(len(logical), device=logical.device).unsqueeze(1)
    replica = ((position * _KNUTH) & 0xFFFFFFFF) % num_replicas[logical].clamp(min=1)
    return physical_of[logical, replica].where(is_expert, _NOWHERE)


def _record(physical: torch.Tensor, load: torch.Tensor) -> None:
    counted = physical[(physical >= 0) & (physical < load.shape[0])]
    load.index_add_(0, counted, torch.ones_like(counted, dtype=load.dtype))


def _record_only(topk_ids: torch.Tensor, **others: torch.Tensor) -> torch.Tensor:
    map_and_record(topk_ids, **others)
    return topk_ids
