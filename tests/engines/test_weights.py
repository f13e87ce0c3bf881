"""The shipped model: loads anywhere, and learnt what its record says."""

from __future__ import annotations

import json
from functools import cache

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from eplb_fsm.engines.reference import corpus, routing
from eplb_fsm.engines.reference.model import WEIGHTS, load_model
from eplb_fsm.engines.reference.train import Batches, model_config, train

RECORD = json.loads((WEIGHTS / "training.json").read_text())


@cache
def measured() -> dict[str, routing.DomainRouting]:
    """The routing of the evaluation texts, measured once."""
    return routing.measure(load_model())


def test_it_loads_as_any_hugging_face_model() -> None:
    """Plain transformers loads the folder, in bf16 as stored, with every weight found."""
    model, info = AutoModelForCausalLM.from_pretrained(WEIGHTS, output_loading_info=True)
    assert model.dtype == torch.bfloat16
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_tensors_have_the_names_that_other_engines_read() -> None:
    """On disk every expert is three tensors of its own, and the file has a few megabytes."""
    with safe_open(WEIGHTS / "model.safetensors", "pt") as file:
        names = set(file.keys())
    for part in ("gate_proj", "up_proj", "down_proj"):
        assert f"model.layers.3.mlp.experts.31.{part}.weight" in names
    assert (WEIGHTS / "model.safetensors").stat().st_size < 8e6
    config = json.loads((WEIGHTS / "config.json").read_text())
    assert config["num_experts"] == 32
    assert config["router_aux_loss_coef"] == 0.0


def test_it_learnt_the_domains() -> None:
    """The loss of the texts that it never saw is that of the record, far below that of unigram bytes."""
    for domain, routed in measured().items():
        assert abs(routed.loss - RECORD["evaluation_loss_nats_per_byte"][domain]) < 0.01
        assert routed.loss < 2.4


def test_the_routing_is_skewed() -> None:
    """On 4 ranks in order, every domain leaves the ranks a quarter idle or more in its worst layer."""
    for routed in measured().values():
        assert min(routed.balancedness(4)) < 0.75


def test_the_skew_moves_with_the_domain() -> None:
    """Between code and Russian, half of the tokens change the expert, and other experts are the busiest."""
    code, russian = measured()["code"], measured()["russian"]
    assert routing.drift(code, russian) > 0.4
    assert routing.drift(code, code) == 0.0
    for layer in range(4):
        assert set(code.top_experts(4)[layer]) != set(russian.top_experts(4)[layer])


def test_training_lowers_the_loss() -> None:
    """The script that made the weights trains: a tiny model of the same kind learns from its batches."""
    torch.manual_seed(0)
    config = model_config()
    config.num_hidden_layers, config.num_experts, config.hidden_size = 1, 8, 32
    from transformers import Qwen3MoeForCausalLM

    model = Qwen3MoeForCausalLM(config)
    batches = Batches(seed=1)
    tokens = batches.draw()
    assert tokens.shape == (18, 256)
    assert (tokens[:, 0] == corpus.BOS_TOKEN).all()

    def loss() -> float:
        with torch.no_grad():
            return float(model(input_ids=tokens, labels=tokens, use_cache=False).loss)

    before = loss()
    train(model, batches, steps=6)
    assert loss() < before
