"""A tiny Qwen3-MoE checkpoint with random weights, in Hugging Face's layout."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.serving.sizes import ModelSize

TOP_K = 4
VOCABULARY = 256
_TINY = ModelSize(layers=3, experts=16, hidden=64, intermediate=32)
_HEADS, _KV_HEADS, _HEAD = 4, 2, 16
_SEED = 20250729

# With this spread the experts' outputs outweigh what they are added to, so that a wrong expert changes the tokens.
_SPREAD = 0.3


def make_checkpoint(folder: Path, size: ModelSize = _TINY) -> Path:
    """Write the checkpoint; the same bytes every time. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(_weights(size)), folder / "model.safetensors", metadata={"format": "pt"})
    for name, content in {
        "config.json": _config(size),
        "tokenizer.json": _tokenizer(),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": "<0>",
            "bos_token": "<1>",
            "eos_token": "<2>",
        },
    }.items():
        (folder / name).write_text(json.dumps(content, indent=1), encoding="utf-8")
    return folder


def _config(size: ModelSize) -> dict[str, object]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "torch_dtype": "float32",
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "moe_intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _KV_HEADS,
        "head_dim": _HEAD,
        "num_experts": size.experts,
        "num_experts_per_tok": TOP_K,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 2048,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "vocab_size": VOCABULARY,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _tokenizer() -> dict[str, object]:
    """One word a token: `<5> <6>` is 5, 6."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {f"<{i}>": i for i in range(VOCABULARY)}, "unk_token": "<0>"},
    }


def _weights(size: ModelSize) -> Iterator[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(_SEED)

    def drawn(*shape: int, spread: float = _SPREAD) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * spread

    yield "model.embed_tokens.weight", drawn(VOCABULARY, size.hidden, spread=1.0)
    for layer in range(size.layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", torch.ones(size.hidden)
        yield f"{prefix}.post_attention_layernorm.weight", torch.ones(size.hidden)
        yield f"{prefix}.self_attn.q_norm.weight", torch.ones(_HEAD)
        yield f"{prefix}.self_attn.k_norm.weight", torch.ones(_HEAD)
        yield f"{prefix}.self_attn.q_proj.weight", drawn(_HEADS * _HEAD, size.hidden)
        yield f"{prefix}.self_attn.k_proj.weight", drawn(_KV_HEADS * _HEAD, size.hidden)
        yield f"{prefix}.self_attn.v_proj.weight", drawn(_KV_HEADS * _HEAD, size.hidden)
        yield f"{prefix}.self_attn.o_proj.weight", drawn(size.hidden, _HEADS * _HEAD)
        yield f"{prefix}.mlp.gate.weight", drawn(size.experts, size.hidden)
        for expert in range(size.experts):
            yield f"{prefix}.mlp.experts.{expert}.gate_proj.weight", drawn(size.intermediate, size.hidden)
            yield f"{prefix}.mlp.experts.{expert}.up_proj.weight", drawn(size.intermediate, size.hidden)
            yield f"{prefix}.mlp.experts.{expert}.down_proj.weight", drawn(size.hidden, size.intermediate)
    yield "model.norm.weight", torch.ones(size.hidden)
    yield "lm_head.weight", drawn(VOCABULARY, size.hidden)
