"""The expert tensors of a model that an engine has loaded, and the modules that compute with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
        modules: The module of each layer that owns them.
    """

    bank: Bank
    modules: tuple[torch.nn.Module, ...]

    def are_current(self) -> bool:
        """Whether the modules still compute with these tensors, and have not been given others."""
        return all(
            getattr(module, name).data_ptr() == tensor.data_ptr()
            for module, tensors in zip(self.modules, self.bank.tensors, strict=True)
            for name, tensor in tensors.items()
        )


def find_experts(
    name: str,
    model: torch.nn.Module,
    weights: Mapping[int, Sequence[torch.Tensor]],
    num_logical_experts: int,
    num_physical_experts: int,
    stays: Callable[[str, torch.Tensor], bool],
) -> Experts:
    """Register the tensors that the engine's own rebalance moves, and look for others that would have to move too.

    Args:
        name: Of the bank.
        model: The model, loaded.
        weights: By the model's own numbers of its MoE layers, what the engine moves: each a parameter of the model, or
            a view of one.
        num_logical_experts: Of each MoE layer.
        num_physical_experts: Of each MoE layer, over all ranks.
        stays: Whether a tensor of a module with experts, and of this name, belongs to no expert.

    Raises:
        BankError: The model computes with other tensors than these, or with more.
    """
    owned = {
        parameter.data_ptr(): (module, parameter_name)
        for module in model.modules()
        for parameter_name, parameter in module.named_parameters(recurse=False)
    }
    layers = sorted(weights)
    lost = [layer for layer in layers if any(tensor.data_ptr() not in owned for tensor in weights[layer])]
    if lost:
        raise BankError(
            f"the experts of layers {lost} are no parameters of {type(model).__name__} (any more), so moving them "
            "would change nothing; use a quantisation and a backend that compute with the loaded parameters"
        )
    tensors = [{owned[tensor.data_ptr()][1]: tensor for tensor in weights[layer]} for layer in layers]
    modules = tuple(owned[weights[layer][0].data_ptr()][0] for layer in layers)
    bank = Bank(name, num_logical_experts, num_physical_experts, tensors, layer_ids=layers)
    find_unregistered_tensors(_tensors_of(modules, bank, stays), bank)
    return Experts(bank, modules)


def make_probe(experts: Experts, run_slot: Callable[[Any, torch.Tensor, int], torch.Tensor], width: str) -> Probe:
    """Return what sends the same tokens through one slot.

    Args:
        experts: The experts.
        run_slot: ``run_slot(module, hidden_states, local_slot)`` runs the engine's kernel.
        width: Name of the modules' attribute that says how wide hidden states are.
    """

    def probe(layer: int, local_slot: int) -> torch.Tensor:
        module = experts.modules[layer]
        like = next(iter(experts.bank.tensors[layer].values()))
        # What is quantised to one byte is computed with from bfloat16.
        dtype = like.dtype if like.dtype.is_floating_point and like.element_size() > 1 else torch.bfloat16
        generator = torch.Generator().manual_seed(layer)
        hidden = torch.randn(_NUM_PROBED, getattr(module, width), generator=generator).to(like.device, dtype)
        with torch.inference_mode():
            return run_slot(module, hidden, local_slot)

    return probe


def _tensors_of(
    modules: Sequence[torch.nn.Module], bank: Bank, stays: Callable[[str, torch.Tensor], bool]
) -> Iterator[tuple[str, torch.Tensor]]:
    for layer, module in zip(bank.layer_ids, modules, strict=True):
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if not stays(name, tensor):
                yield f"layer {layer} {name}", tensor
