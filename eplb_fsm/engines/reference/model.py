"""The reference model on one rank: transformers' Qwen3-MoE with its experts spread over the ranks.

Attention is data parallel: each rank decodes its own sequences with its own KV cache. The experts are expert
parallel, so in every layer all ranks meet in the exchange, also those that have no token (a dummy pass).
"""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from eplb_fsm.engines.reference.cache import SlotCache
from eplb_fsm.engines.reference.experts import ExpertMaps, ParallelExperts, RecordHook, check_row_bits
from eplb_fsm.errors import ConfigError
from eplb_fsm.placement.placement import Placement

WEIGHTS = Path(__file__).parent / "weights"
"""The trained model that the package ships, in Hugging Face layout."""


def load_model(folder: Path | str = WEIGHTS) -> Any:
    """Returns the plain transformers model of a folder, float32, in evaluation mode.

    Raises:
        ConfigError: The folder holds no model.
    """
    if not (Path(folder) / "config.json").is_file():
        raise ConfigError(f"no model in {folder}: give a folder with config.json and model.safetensors")
    silence: Any = disable_progress_bar
    silence()
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


class ParallelModel:
    """One rank's share of a Qwen3-MoE model, with a batch of sequence slots.

    Args:
        model: The transformers model, float32; its experts are replaced, so do not use it afterwards.
        placement: Where the experts are at start; all layers must be MoE layers.
        max_sequences: Sequence slots of each rank; the same on all ranks.
        max_length: Most tokens of a sequence.
        group: Process group of the engine, or None for the default one.

    Raises:
        ConfigError: Model and placement do not fit, or this machine's products are not bit-stable.
    """

    def __init__(
        self,
        model: Any,
        placement: Placement,
        max_sequences: int,
        max_length: int,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.config = model.config
        self.placement = placement
        self.max_sequences, self.max_length = max_sequences, max_length
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        self._check(model)
        self._transformer, self._head = model.model, model.lm_head
        # What transformers 5.24 calls `cache` was `past_key_values` before.
        words = signature(type(self._transformer.layers[0]).forward).parameters
        self._cache_word = "cache" if "cache" in words else "past_key_values"
        self.experts = [self._partition(layer, block, group) for layer, block in enumerate(self._transformer.layers)]
        self.cache = SlotCache(
            self.config.num_hidden_layers,
            max_sequences,
            self.config.num_key_value_heads,
            max_length,
            self.config.head_dim,
        )
        self._nothing = torch.empty(0, self.config.hidden_size)
        self._no_choice = torch.empty(0, self.config.num_experts_per_tok, dtype=torch.int64)
        self._no_weights = torch.empty(0, self.config.num_experts_per_tok)
        width = placement.num_physical_experts - placement.num_logical_experts + 1
        self.bind_maps(
            torch.from_numpy(placement.logical_to_physical(width).copy()),
            torch.from_numpy(placement.logical_replica_count.copy()),
        )

    def _check(self, model: Any) -> None:
        seen = (self.config.num_hidden_layers, self.config.num_experts, self.world_size)
        placement = self.placement
        wanted = (placement.num_moe_layers, placement.num_logical_experts, placement.num_ranks)
        if seen != wanted:
            raise ConfigError(
                f"the placement is for {wanted[0]} layers, {wanted[1]} experts and {wanted[2]} ranks, but "
                f"the model and the group have {seen[0]}, {seen[1]} and {seen[2]}: make a placement for these"
            )
        if any(not hasattr(layer.mlp, "experts") for layer in model.model.layers):
            raise ConfigError("the model has layers without experts: choose one with decoder_sparse_step 1")
        hidden, inner = self.config.hidden_size, self.config.moe_intermediate_size
        check_row_bits(hidden, 2 * inner, self.max_sequences * self.world_size)
        check_row_bits(inner, hidden, self.max_sequences * self.world_size)

    def _partition(self, layer: int, block: Any, group: dist.ProcessGroup | None) -> ParallelExperts:
        local = self.placement.num_local_physical_experts
        held = self.placement.physical_to_logical_map[layer, self.rank * local : (self.rank + 1) * local]
        index = torch.from_numpy(np.maximum(held, 0))
        stored = (getattr(block.mlp.experts, name).detach() for name in ("gate_up_proj", "down_proj"))
        weights = [weight.transpose(1, 2)[index].contiguous() for weight in stored]  # as the product reads them
        for weight in weights:
            weight[torch.from_numpy(held < 0)] = 0
        block.mlp.experts = ParallelExperts(
            layer, weights[0], weights[1], self.max_sequences, self.config.num_experts_per_tok, group
        )
        return block.mlp.experts  # type: ignore[no-any-return]

    @property
    def expert_tensors(self) -> list[dict[str, torch.Tensor]]:
        """Per MoE layer: name -> live tensor `(num_local_physical_experts, ...)`, for a `Bank`."""
        return [{"gate_up_proj": e.gate_up_proj, "down_proj": e.down_proj} for e in self.experts]

    @property
    def rank_rows(self) -> np.ndarray:
        """Rows that every rank computed in the last pass, int64 `(num_moe_layers, num_ranks)`."""
        return np.stack([experts.rank_rows for experts in self.experts])

    def bind_maps(self, logical_to_physical_map: torch.Tensor, logical_replica_count: torch.Tensor) -> None:
        """Makes the forward passes read these live tables, int64 `(L, E, width)` and `(L, E)`."""
        maps = ExpertMaps(logical_to_physical_map, logical_replica_count)
        for experts in self.experts:
            experts.maps = maps

    def bind_record(self, record: RecordHook | None) -> None:
        """Calls `record(layer, topk_ids)` in every forward pass that has tokens."""
        for experts in self.experts:
            experts.record = record

    @torch.inference_mode()
    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Decodes one token of each live sequence; blocks in the exchange until all ranks are in this pass.

        Args:
            tokens: int64 `(tokens,)`; empty on a rank that has no live sequence.
            positions: Position of each token in its sequence, int64 `(tokens,)`.
            rows: Sequence slot of each token, int64 `(tokens,)`, or None when all slots are live in order.

        Returns:
            Logits `(tokens, vocab_size)` float32.
        """
        if not len(tokens):
            return self._dummy_pass()
        mask = self.cache.begin(rows, positions)
        hidden = self._transformer.embed_tokens(tokens[:, None])
        rotation = self._transformer.rotary_emb(hidden, positions[:, None])
        for layer in self._transformer.layers:
            hidden = layer(
                hidden,
                attention_mask=mask,
                use_cache=True,
                position_embeddings=rotation,
                **{self._cache_word: self.cache},
            )
        return self._head(self._transformer.norm(hidden))[:, 0]  # type: ignore[no-any-return]

    def _dummy_pass(self) -> torch.Tensor:
        for experts in self.experts:
            experts(self._nothing, self._no_choice, self._no_weights)
        return torch.empty(0, self.config.vocab_size)
