"""The expert tensors of a model that SGLang has loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from eplb_fsm.errors import BankError
from eplb_fsm.runtime.bank import Bank, find_unregistered_tensors
from eplb_fsm.runtime.verify import Probe

_NUM_PROBED = 4
"""Rows of the input that a slot is tried out with."""


class Experts(NamedTuple):
    """A model's experts on this rank.

    Attributes:
        bank: Their tensors.
        modules: The module of each layer that computes with them.
    """

    bank: Bank
    modules: tuple[torch.nn.Module, ...]


def find_experts(model: torch.nn.Module, num_logical_experts: int, num_physical_experts: int) -> Experts:
    """Register what SGLang's own rebalance moves, ``routed_experts_weights_of_layer``.

    Args:
        model: The model, loaded.
        num_logical_experts: Of each MoE layer.
        num_physical_experts: Of each MoE layer, over all ranks.

    Raises:
        BankError: The model does not say which tensors they are, or computes with others.
    """
    weights: Any = getattr(model, "routed_experts_weights_of_layer", None)
    if weights is None:
        raise BankError(
            f"{type(model).__name__} has no routed_experts_weights_of_layer, so SGLang cannot move its experts; start "
            "without --enable-eplb"
        )
    owned = {
        parameter.data_ptr(): (module, name)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
    }
    layers = sorted(weights.keys())
    lost = [layer for layer in layers if any(tensor.data_ptr() not in owned for tensor in weights[layer])]
    if lost:
        raise BankError(
            f"the experts of layers {lost} are no parameters of {type(model).__name__} (any more), so moving them "
            "would change nothing; use a quantisation and a backend that compute with the loaded parameters"
        )
    tensors = [{owned[tensor.data_ptr()][1]: tensor for tensor in weights[layer]} for layer in layers]
    modules = tuple(owned[weights[layer][0].data_ptr()][0] for layer in layers)
    bank = Bank("target", num_logical_experts, num_physical_experts, tensors, layer_ids=layers)
    find_unregistered_tensors(_tensors_of(modules, bank), bank)
    return Experts(bank, modules)


def make_probe(experts: Experts, run_slot: Callable[..., torch.Tensor]) -> Probe:
    """Return what sends the same tokens through one slot.

    Args:
        experts: The experts.
        run_slot: ``run_slot(module, hidden_states, local_slot)`` runs SGLang's kernel.
    """

    def probe(layer: int, local_slot: int) -> torch.Tensor:
        module: Any = experts.modules[layer]
        like = next(iter(experts.bank.tensors[layer].values()))
        dtype = like.dtype if like.dtype.is_floating_point and like.element_size() > 1 else torch.bfloat16
        generator = torch.Generator().manual_seed(layer)
        hidden = torch.randn(_NUM_PROBED, module.hidden_size, generator=generator).to(like.device, dtype)
        with torch.inference_mode():
            return run_slot(module, hidden, local_slot)

    return probe


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


def _tensors_of(modules: Sequence[torch.nn.Module], bank: Bank) -> Iterator[tuple[str, torch.Tensor]]:
    for layer, module in zip(bank.layer_ids, modules, strict=True):
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if not getattr(tensor, "_sglang_require_global_experts", False):  # its own mark for what stays
                yield f"layer {layer} {name}", tensor
