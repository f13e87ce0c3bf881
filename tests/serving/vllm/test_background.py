"""vLLM with this library's rebalance, a whole engine on CPUs: the tokens stay and experts move."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.serving.driving import BACKGROUND, epochs
from tests.serving.vllm.checkpoint import make_checkpoint
from tests.serving.vllm.harness import EngineRun, engine_python, run_engine
from tests.serving.vllm.test_own_eplb import OWN_EPLB

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
VARIABLES = {**BACKGROUND, "EPLB_FSM_COMMIT_BYTES": "1000000"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint that all tests load."""
    engine_python()  # skips before anything is written
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def one_rank(model: Path) -> EngineRun:
    """What one rank generates, without expert parallelism."""
    return run_engine(model)


def _background(**eplb_config: Any) -> dict[str, Any]:
    return {**OWN_EPLB, "eplb_config": {**OWN_EPLB["eplb_config"], "step_interval": 10, **eplb_config}}


@pytest.mark.compatibility(
    engine="vLLM",
    version="0.32.0",
    what="whole engine on CPUs, V1 runner, TP2 with expert parallel, use_async true and false, float32",
    how="tested",
)
@pytest.mark.parametrize("use_async", [True, False])
def test_the_tokens_stay_through_epochs(model: Path, one_rank: EngineRun, use_async: bool) -> None:
    """With TP2 and expert parallelism five epochs commit, in the background or blocking, and every token stays."""
    run = run_engine(model, rounds=3, environment=VARIABLES, **_background(use_async=use_async))
    assert len(epochs(run.log)) >= 5, epochs(run.log, "")
    assert run.tokens == one_rank.tokens * 3
    first, *later = run.maps
    assert all(of_ranks[0] == of_ranks[1] for of_ranks in run.maps)
    assert first not in later


def test_a_wrong_map_would_show(model: Path, one_rank: EngineRun) -> None:
    """Where tokens go to the slots of the first map while experts move, other tokens come out."""
    environment = {**VARIABLES, "VLLM_ON_CPU_IGNORE_MAP": "1"}
    run = run_engine(model, rounds=2, environment=environment, **_background())
    assert len(epochs(run.log)) >= 1
    assert run.tokens[1] != one_rank.tokens[0]
