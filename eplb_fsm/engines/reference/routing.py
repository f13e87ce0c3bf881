"""How the shipped model routes each domain: load per expert, and the imbalance of an untouched placement."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from eplb_fsm.engines.reference.corpus import BOS_TOKEN, DOMAINS, evaluation_text


@dataclass(frozen=True)
class DomainRouting:
    """What one domain's evaluation text does to the model.

    Attributes:
        loss: Mean cross-entropy per byte, nats.
        load: Tokens per expert, int64 `(num_moe_layers, num_logical_experts)`.
    """

    loss: float
    load: torch.Tensor

    def balancedness(self, num_ranks: int) -> list[float]:
        """Returns mean/max of the rank loads per layer, for experts placed in order on `num_ranks` ranks."""
        ranks = self.load.view(self.load.shape[0], num_ranks, -1).sum(-1).double()
        return [round(value, 4) for value in (ranks.mean(1) / ranks.amax(1)).tolist()]

    def top_experts(self, count: int) -> list[list[int]]:
        """Returns the `count` most loaded experts of each layer, busiest first."""
        return self.load.topk(count, dim=1).indices.tolist()


def evaluation_batch(domain: str, sequences: int, length: int) -> torch.Tensor:
    """Returns int64 `(sequences, length)`: a start token and text, at even distances in the shipped file."""
    text = evaluation_text(domain)
    stride = (len(text) - length) // sequences
    rows = [[BOS_TOKEN, *text[i * stride : i * stride + length - 1]] for i in range(sequences)]
    return torch.tensor(rows, dtype=torch.int64)


@torch.inference_mode()
def measure(model: Any, sequences: int = 24, length: int = 256) -> dict[str, DomainRouting]:
    """Runs the evaluation text of every domain through a transformers MoE model; blocks for seconds."""
    measured = {}
    for domain in DOMAINS:
        tokens = evaluation_batch(domain, sequences, length)
        output = model(input_ids=tokens, output_router_logits=True, use_cache=False)
        loss = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        top_k, experts = model.config.num_experts_per_tok, model.config.num_experts
        chosen = [torch.topk(logits, top_k, dim=-1).indices.flatten() for logits in output.router_logits]
        load = torch.stack([torch.bincount(ids, minlength=experts) for ids in chosen])
        measured[domain] = DomainRouting(loss.item(), load)
    return measured


def drift(first: DomainRouting, second: DomainRouting) -> float:
    """Returns the share of tokens that go to other experts in `second`: total variation, mean of layers."""
    shares = [routing.load.double() / routing.load.sum(1, keepdim=True) for routing in (first, second)]
    return float(((shares[0] - shares[1]).abs().sum(1) / 2).mean())
