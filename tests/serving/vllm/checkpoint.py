"""A tiny random Qwen3-MoE model in Hugging Face's layout, made without a download."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.serving.sizes import ModelSize

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "dtype": "float32",
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "attention_bias": False,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "vocab_size": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# Experts speak louder than attention, so that a token that meets a wrong expert becomes another token.
_GAIN = 0.6
_EXPERT_GAIN = 2.4


def make_checkpoint(folder: Path, seed: int = 0, size: ModelSize | None = None) -> Path:
    """Write `config.json` and `model.safetensors` into the folder, which is made if need be; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config = CONFIG if size is None else _sized(size)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    rng = np.random.default_rng(seed)
    tensors = {name: _weight(name, shape, rng) for name, shape in _shapes(config)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _sized(size: ModelSize) -> dict[str, Any]:
    return {
        **CONFIG,
        "num_hidden_layers": size.layers,
        "num_experts": size.experts,
        "hidden_size": size.hidden,
        "moe_intermediate_size": size.intermediate,
    }


def _weight(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    if len(shape) == 1:
        return np.ones(shape, dtype=np.float32)
    if name.endswith("mlp.gate.weight"):
        scale = 1.0  # wide enough that the experts' weights differ clearly
    else:
        scale = (_EXPERT_GAIN if ".experts." in name else _GAIN) / shape[1] ** 0.5
    return (rng.standard_normal(shape) * scale).astype(np.float32)


def _shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for index in range(config["num_hidden_layers"]):
        for name, shape in _layer_shapes(config):
            yield f"model.layers.{index}.{name}", shape
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)


def _layer_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, head = config["hidden_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    yield "input_layernorm.weight", (hidden,)
    yield "self_attn.q_proj.weight", (queries, hidden)
    yield "self_attn.k_proj.weight", (keys, hidden)
    yield "self_attn.v_proj.weight", (keys, hidden)
    yield "self_attn.o_proj.weight", (hidden, queries)
    yield "self_attn.q_norm.weight", (head,)
    yield "self_attn.k_norm.weight", (head,)
    yield "post_attention_layernorm.weight", (hidden,)
    yield "mlp.gate.weight", (config["num_experts"], hidden)
    inner = config["moe_intermediate_size"]
    for expert in range(config["num_experts"]):
        yield f"mlp.experts.{expert}.gate_proj.weight", (inner, hidden)
        yield f"mlp.experts.{expert}.up_proj.weight", (inner, hidden)
        yield f"mlp.experts.{expert}.down_proj.weight", (hidden, inner)
