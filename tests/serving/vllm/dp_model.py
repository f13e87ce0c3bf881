"""A small mixture of experts whose next token is a function of a token and its position.

In double precision, so that neither the order of a sum nor the slot of an expert decides which token is the likeliest.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

NUM_LAYERS, NUM_LOGICAL, NUM_REDUNDANT, TOP_K, HIDDEN = 3, 16, 8, 2, 16
NUM_PHYSICAL = NUM_LOGICAL + NUM_REDUNDANT
VOCABULARY, NUM_POSITIONS = 512, 512
_WIDTH = 2 * HIDDEN


class Routed(NamedTuple):
    """Tokens on their way to the experts."""

    hidden: torch.Tensor
    experts: torch.Tensor
    shares: torch.Tensor


class Weights:
    """The whole model, the same on every rank and in whoever checks tokens.

    Args:
        seed: Of the weights.
    """

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64) * shape[-1] ** -0.5

        self._tokens, self._positions = draw(VOCABULARY, HIDDEN) * 4, draw(NUM_POSITIONS, HIDDEN) * 4
        self._gates = [draw(NUM_LOGICAL, HIDDEN) for _ in range(NUM_LAYERS)]
        self._head = draw(VOCABULARY, HIDDEN)
        shapes = ((NUM_LOGICAL, HIDDEN, _WIDTH), (NUM_LOGICAL, _WIDTH, HIDDEN))
        self.experts = [[draw(*shape) * 4 for shape in shapes] for _ in range(NUM_LAYERS)]

    def embed(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """What goes into the first layer."""
        return self._tokens[tokens] + self._positions[positions]

    def route(self, layer: int, hidden: torch.Tensor) -> Routed:
        """Choose logical experts, and how much each of them counts."""
        scores, experts = (hidden @ self._gates[layer].T).topk(TOP_K)
        return Routed(hidden, experts, scores.softmax(-1))

    def apply(self, layer: int, routed: Routed) -> torch.Tensor:
        """What the experts of a layer make of tokens, computed in one place."""
        return run_experts(routed, self.experts[layer])

    def sample(self, hidden: torch.Tensor) -> torch.Tensor:
        """The likeliest next token of each row."""
        return (hidden @ self._head.T).argmax(-1)

    def generate(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        """What an engine should make of a prompt."""
        tokens = list(prompt)
        for _ in range(num_tokens):
            hidden = self.embed(torch.tensor(tokens[-1:]), torch.tensor([len(tokens) - 1]))
            for layer in range(NUM_LAYERS):
                hidden = hidden + self.apply(layer, self.route(layer, hidden))
            tokens.append(int(self.sample(hidden)))
        return tokens[len(prompt) :]


def run_experts(routed: Routed, weights: Sequence[torch.Tensor], first: int = 0) -> torch.Tensor:
    """Add up what experts `first`, `first + 1`, ... make of the tokens that chose them."""
    output = torch.zeros_like(routed.hidden)
    for row, (w13, w2) in enumerate(zip(*weights, strict=True)):
        token, place = (routed.experts == first + row).nonzero(as_tuple=True)
        if len(token):
            result = functional.silu(routed.hidden[token] @ w13) @ w2
            output.index_add_(0, token, result * routed.shares[token, place, None])
    return output


class RoutedExperts(nn.Module):
    """The slots of one layer on one rank, with what vLLM's class of that name shows of itself."""

    def __init__(self, weights: Sequence[torch.Tensor], rank: int, held: torch.Tensor) -> None:
        super().__init__()
        self.hidden_size = HIDDEN
        self.local_num_experts = len(held)
        self.moe_config = SimpleNamespace(moe_parallel_config=SimpleNamespace(ep_rank=rank))
        self.quant_method = SimpleNamespace(is_monolithic=False)
        self.w13_weight = nn.Parameter(weights[0][held].clone(), requires_grad=False)
        self.w2_weight = nn.Parameter(weights[1][held].clone(), requires_grad=False)
        self.eplb_state: Any = None

    def forward_modular(self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        """What the local slots add to each token; ids of physical experts, -1 for nobody's."""
        first = self.moe_config.moe_parallel_config.ep_rank * self.local_num_experts
        return run_experts(Routed(x, topk_ids, topk_weights), (self.w13_weight, self.w2_weight), first)

    def get_expert_weights(self) -> list[torch.Tensor]:
        """As vLLM's."""
        return [parameter.view(len(parameter), -1) for parameter in self.parameters()]

    def set_eplb_state(self, **tables: Any) -> None:
        """As vLLM's."""
        self.eplb_state.set_layer_state(**tables)


class Experts(nn.Module):
    """One rank's experts, as vLLM's protocol ``MixtureOfExperts`` describes a model.

    Args:
        weights: The whole model.
        rank: This rank.
        world_size: Number of ranks.
    """

    def __init__(self, weights: Weights, rank: int, world_size: int) -> None:
        super().__init__()
        self.num_moe_layers, self.num_expert_groups, self.num_shared_experts = NUM_LAYERS, 1, 0
        self.num_logical_experts = self.num_routed_experts = NUM_LOGICAL
        self.num_physical_experts, self.num_redundant_experts = NUM_PHYSICAL, NUM_REDUNDANT
        self.num_local_physical_experts = NUM_PHYSICAL // world_size
        held = torch.arange(NUM_PHYSICAL).reshape(world_size, -1)[rank] % NUM_LOGICAL
        self.moe_layers = nn.ModuleList(RoutedExperts(layer, rank, held) for layer in weights.experts)
        self.expert_weights: list[list[torch.Tensor]] = []
