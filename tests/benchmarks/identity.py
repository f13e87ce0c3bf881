"""Logits identical while large layers move: thousands of decode steps, with rebalancing and without.

The model is a Qwen3-MoE drawn from a seed, with experts of a megabyte, so that an epoch takes many steps. Without a
least gain every window of load gives another placement, so that every epoch moves something.

    python -m tests.benchmarks.identity --ranks 4 --steps 2000 --epochs 10
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils.logging import disable_progress_bar

from eplb_fsm.config import RebalanceConfig
from eplb_fsm.engines.demo.run import launch_runs
from eplb_fsm.engines.reference import corpus
from eplb_fsm.engines.reference.figures import run_figures
from eplb_fsm.engines.reference.requests import Workload
from eplb_fsm.engines.reference.run import RunSpec
from eplb_fsm.engines.reference.shape import read_shape
from eplb_fsm.engines.reference.timeline import first_difference

EXPERTS = 32
REDUNDANT = 8


def write_model(folder: Path, layers: int, hidden: int = 256, inner: int = 320, seed: int = 3) -> int:
    """Write a randomly drawn model; return the bytes of one expert."""
    torch.manual_seed(seed)
    disable_progress_bar()
    make: Any = transformers.Qwen3MoeConfig
    config = make(
        vocab_size=corpus.VOCAB_SIZE,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        moe_intermediate_size=inner,
        norm_topk_prob=True,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(folder)
    path = folder / "config.json"
    written = json.loads(path.read_text())
    written["num_experts"] = EXPERTS
    path.write_text(json.dumps(written))
    return 3 * hidden * inner * 4


def measure(ranks: int, steps: int, batch: int, interval: int, layers: int, folder: Path) -> dict[str, Any]:
    """Make both runs and return what they moved and where they first differ; raises where a promise is broken."""
    expert_bytes = write_model(folder, layers)
    config = RebalanceConfig(
        num_redundant_experts=REDUNDANT,
        step_interval=interval,
        window_size=interval,
        idle_round_interval=10,
        min_gain=0.0,
        horizon_steps=0,
        policy="deepseek",  # plans from nothing: each epoch moves most experts
        commit_bytes=2 * expert_bytes + 100_000,
    )
    workload = Workload(change_step=steps // 2, prompt_tokens=48, generate_tokens=48)
    common: dict[str, Any] = {
        "workload": workload,
        "placement": read_shape(folder).first_placement(REDUNDANT, ranks),
        "batch": batch,
        "steps": steps,
        "weights": folder,
    }
    specs = [RunSpec(name="none", **common), RunSpec(name="async", config=config, **common)]
    started = time.monotonic()
    none, rebalanced = launch_runs(specs, ranks, None)
    first = first_difference([rank.timeline for rank in none], [rank.timeline for rank in rebalanced])
    figures = run_figures(rebalanced, steps // 2, 200)
    return {
        "ranks": ranks,
        "steps": figures["steps"],
        "identical": first is None,
        "first_different_step": first,
        "epochs": figures["epochs"],
        "commits": figures["commits"],
        "moved_bytes": figures["moved_bytes"],
        "expert_bytes": expert_bytes,
        "fewest_commits_of_an_epoch": min(
            (o.num_commits for o in rebalanced[0].last_outcomes if o.kind.name == "COMMITTED"), default=0
        ),
        "fewest_steps_of_an_epoch": min(
            (o.end_step - o.start_step for o in rebalanced[0].last_outcomes if o.kind.name == "COMMITTED"), default=0
        ),
        "active_share": figures["active_share"],
        "late_rounds": figures["late_rounds"],
        "seconds": round(time.monotonic() - started, 1),
    }


def main() -> None:
    """Run from the command line; fails where the logits differ or too few epochs were committed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--interval", type=int, default=150)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=10, help="that must be committed at least")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(args.ranks, args.steps, args.batch, args.interval, args.layers, Path(folder))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    if not result["identical"] or result["epochs"]["committed"] < args.epochs or result["epochs"]["failed"]:
        raise SystemExit("a promise was broken")


if __name__ == "__main__":
    main()
