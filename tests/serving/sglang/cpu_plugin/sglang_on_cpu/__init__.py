"""An SGLang plugin with what version 0.5.23 lacks to run expert parallelism on a CPU.

Nothing here touches EPLB. SGLang loads the plugin in each of its processes, and only logs if that fails; the first
forward pass with expert parallelism then fails, so such a failure cannot pass for a success.
"""

from __future__ import annotations

import torch

from sglang_on_cpu.experts import moe_forward


def register() -> None:
    """Called by SGLang before it reads its configuration."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    _add_empty_cache()
    HookRegistry.register("sglang.srt.layers.moe.fused_moe_native.moe_forward_native", moe_forward, HookType.AROUND)


def _add_empty_cache() -> None:
    """Give `torch.cpu` the function of its siblings that SGLang calls before it moves weights."""
    if not hasattr(torch.cpu, "empty_cache"):
        torch.cpu.empty_cache = lambda: None  # type: ignore[attr-defined]
