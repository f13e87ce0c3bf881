"""vLLM on CPUs with its own EPLB: the ground on which tests of other controllers stand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.serving.vllm.checkpoint import CONFIG, make_checkpoint
from tests.serving.vllm.harness import EngineRun, Maps, engine_python, run_engine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

NUM_REDUNDANT = 4
EXPERT_PARALLEL: dict[str, Any] = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
OWN_EPLB: dict[str, Any] = {
    **EXPERT_PARALLEL,
    "enable_eplb": True,
    # A round has about a hundred steps; four rearrangements begin in it, each takes a step per layer and some more.
    "eplb_config": {
        "use_async": True,
        "step_interval": 24,
        "window_size": 12,
        "num_redundant_experts": NUM_REDUNDANT,
    },
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint that all tests load."""
    engine_python()  # skips before anything is written
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def one_rank(model: Path) -> EngineRun:
    """What one rank generates, without expert parallelism."""
    return run_engine(model)


def test_expert_parallelism_keeps_tokens(model: Path, one_rank: EngineRun) -> None:
    """Two ranks that share the experts generate the tokens of one rank that has them all."""
    assert run_engine(model, **EXPERT_PARALLEL).tokens == one_rank.tokens


def test_own_eplb_keeps_tokens(model: Path, one_rank: EngineRun) -> None:
    """Tokens stay the same while vLLM's own asynchronous EPLB moves the experts of every layer again and again."""
    run = run_engine(model, rounds=2, **OWN_EPLB)
    assert run.tokens == one_rank.tokens * 2
    assert run.log.count("Rearranging experts (async mode)") >= 4
    initial, after_first, after_second = (_agreed(maps) for maps in run.maps)
    assert len(initial) == CONFIG["num_hidden_layers"]
    for before, then in ((initial, after_first), (initial, after_second), (after_first, after_second)):
        assert all(old != new for old, new in zip(before, then, strict=True))
    assert all(_is_complete(layer) for maps in (initial, after_first, after_second) for layer in maps)


def test_map_decides_tokens(model: Path, one_rank: EngineRun) -> None:
    """Tokens that go where the map no longer points make other tokens, so equal tokens mean a right map."""
    run = run_engine(model, rounds=2, environment={"VLLM_ON_CPU_IGNORE_MAP": "1"}, **OWN_EPLB)
    assert _agreed(run.maps[0]) != _agreed(run.maps[1])
    assert run.tokens[1] != one_rank.tokens[0]


def _agreed(maps_of_ranks: list[Maps]) -> Maps:
    first, *others = maps_of_ranks
    assert all(other == first for other in others)
    return first


def _is_complete(layer: list[list[int]]) -> bool:
    """Whether each logical expert is somewhere, and each physical one is exactly one of them."""
    physical = sorted(expert for replicas in layer for expert in replicas)
    return all(layer) and physical == list(range(CONFIG["num_experts"] + NUM_REDUNDANT))
