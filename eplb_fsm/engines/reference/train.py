"""Trains the small MoE model that the reference engine ships, on the CPU.

    python -m eplb_fsm.engines.reference.train [--out DIR] [--steps N] [--seed N] [--threads N]

Needs Python, torch, transformers and this package, nothing from the network: the texts are shipped with the
package, generated from the seed, or are the standard library of the running Python.

There is no balancing loss, on purpose: which experts become hot, and how that changes with the domain of the
text, is what the training made of it. A batch holds sequences of all domains, each sequence of one domain.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from eplb_fsm.engines.reference import corpus, routing

log = logging.getLogger(__name__)

SEQUENCES_PER_DOMAIN = 3
LENGTH = 256
LEARNING_RATE = 2e-3
WARMUP_STEPS = 100
WEIGHT_DECAY = 0.05


def model_config() -> Any:
    """Returns the architecture: 4 MoE layers of 32 experts, 4 of them per token, 3.4 million parameters."""
    make: Any = Qwen3MoeConfig
    return make(
        vocab_size=corpus.VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=32,
        num_experts_per_tok=4,
        moe_intermediate_size=64,
        norm_topk_prob=True,
        output_router_logits=False,
        router_aux_loss_coef=0.0,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=corpus.BOS_TOKEN,
        eos_token_id=corpus.EOS_TOKEN,
        pad_token_id=corpus.PAD_TOKEN,
    )


class Batches:
    """Draws training batches: `SEQUENCES_PER_DOMAIN` sequences of every domain, each after a start token."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        texts = (corpus.training_text(domain, seed) for domain in corpus.DOMAINS)
        self.texts = [np.frombuffer(text, dtype=np.uint8) for text in texts]

    def draw(self) -> torch.Tensor:
        """Returns int64 `(len(DOMAINS) * SEQUENCES_PER_DOMAIN, LENGTH)`."""
        starts = [self._random.integers(0, len(text) - LENGTH, SEQUENCES_PER_DOMAIN) for text in self.texts]
        rows = [text[at : at + LENGTH - 1] for text, ats in zip(self.texts, starts, strict=True) for at in ats]
        batch = np.full((len(rows), LENGTH), corpus.BOS_TOKEN, dtype=np.int64)
        batch[:, 1:] = np.stack(rows)
        return torch.from_numpy(batch)


def _learning_rate(step: int, steps: int) -> float:
    if step < WARMUP_STEPS:
        return LEARNING_RATE * (step + 1) / WARMUP_STEPS
    done = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    return LEARNING_RATE * (0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2)


def _optimizer(model: Any) -> torch.optim.Optimizer:
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95))


def train(model: Any, batches: Batches, steps: int) -> None:
    """Trains `model` in place for `steps` steps; blocks until done and logs the loss every 50 steps."""
    optimizer = _optimizer(model)
    model.train()
    started = time.perf_counter()
    mean = 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step, steps)
        tokens = batches.draw()
        logits = model(input_ids=tokens, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mean += loss.item() / 50
        if (step + 1) % 50 == 0:
            log.info("step %d of %d: loss %.4f, %.0f s", step + 1, steps, mean, time.perf_counter() - started)
            mean = 0.0
    model.eval()


def record(model: Any, seed: int, steps: int, seconds: float, batches: Batches) -> dict[str, Any]:
    """Returns what is written beside the weights: how they were made, and the routing they learnt."""
    measured = routing.measure(model)
    return {
        "seed": seed,
        "steps": steps,
        "tokens_per_step": len(corpus.DOMAINS) * SEQUENCES_PER_DOMAIN * LENGTH,
        "seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "training_bytes": {d: len(t) for d, t in zip(corpus.DOMAINS, batches.texts, strict=True)},
        "evaluation_loss_nats_per_byte": {d: round(m.loss, 4) for d, m in measured.items()},
        "balancedness_4_ranks_per_layer": {d: m.balancedness(4) for d, m in measured.items()},
        "top_4_experts_per_layer": {d: m.top_experts(4) for d, m in measured.items()},
        "moved_share_of_tokens_between_domains": {
            a: {b: round(routing.drift(measured[a], measured[b]), 3) for b in corpus.DOMAINS} for a in corpus.DOMAINS
        },
    }


def save(model: Any, folder: Path) -> None:
    """Writes `config.json`, `generation_config.json` and `model.safetensors` (bf16, Hugging Face names)."""
    model.to(torch.bfloat16).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["num_experts"] = config.get("num_local_experts", model.config.num_experts)  # the name other engines read
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def main(arguments: list[str] | None = None) -> None:
    """Trains, saves and records; blocks for the whole training."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "weights")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--seed", type=int, default=20240229)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    batches = Batches(options.seed)
    model = Qwen3MoeForCausalLM(model_config())
    started = time.perf_counter()
    train(model, batches, options.steps)
    seconds = time.perf_counter() - started
    save(model, options.out)
    shipped: Any = Qwen3MoeForCausalLM.from_pretrained(options.out, dtype=torch.float32)
    shipped.eval()
    facts = record(shipped, options.seed, options.steps, seconds, batches)
    (options.out / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
    log.info("%s", json.dumps(facts))


if __name__ == "__main__":
    main()
