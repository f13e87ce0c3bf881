"""SGLang with this library's rebalance, whole engines on CPUs: tokens stay, experts move, and it serves meanwhile."""

from __future__ import annotations

from pathlib import Path

import pytest

from eplb_fsm.engines.switch import FLAG, VARIABLE
from tests.serving.driving import BACKGROUND, epochs
from tests.serving.sglang.checkpoint import make_checkpoint
from tests.serving.sglang.harness import (
    PROMPTS,
    EngineFailedError,
    Outcome,
    own_eplb,
    requires_sglang,
    run_engine,
)
from tests.serving.sglang.serve import serving

pytestmark = [requires_sglang, pytest.mark.slow, pytest.mark.timeout(1500)]

TOKENS = 96
VARIABLES = {**BACKGROUND, "EPLB_FSM_COMMIT_BYTES": "100000"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that all engines here load."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def reference(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """What one rank generates."""
    return run_engine(checkpoint, tmp_path_factory.mktemp("reference"), tokens=TOKENS)


@pytest.mark.compatibility(
    engine="SGLang",
    version="0.5.23",
    what="whole engine on CPUs, TP2/EP2 and TP4/EP4, overlap schedule, no all-to-all backend, float32",
    how="tested",
)
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_tokens_stay_through_epochs(checkpoint: Path, reference: Outcome, tmp_path: Path, ranks: int) -> None:
    """With EP2 and EP4 at least five epochs commit, and every token is that of one rank without any EPLB."""
    outcome = run_engine(
        checkpoint, tmp_path, ranks=ranks, arguments=own_eplb(10), variables=VARIABLES, tokens=TOKENS, rounds=3
    )
    assert len(epochs(outcome.log)) >= 5, epochs(outcome.log, "")
    assert outcome.tokens == reference.tokens * 3


@pytest.mark.compatibility(
    engine="SGLang", version="0.5.23", what="HTTP server on CPUs by eplb-fsm sglang, TP2/EP2", how="tested"
)
def test_the_server_answers_meanwhile(checkpoint: Path, reference: Outcome, tmp_path: Path) -> None:
    """Started by `eplb-fsm sglang`, a server gives the answers of one rank while at least five epochs commit."""
    variables = {name: value for name, value in VARIABLES.items() if name != VARIABLE}
    launcher = ("-m", "eplb_fsm", "sglang", FLAG)
    with serving(
        checkpoint, tmp_path, ranks=2, arguments=own_eplb(10), variables=variables, launcher=launcher
    ) as server:
        for _ in range(8):
            assert [server.generate(prompt, TOKENS) for prompt in PROMPTS] == reference.tokens[0]
            if len(epochs(server.log)) >= 5:
                break
        assert len(epochs(server.log)) >= 5, epochs(server.log, "")


def test_asked_without_eplb_it_does_not_start(checkpoint: Path, tmp_path: Path) -> None:
    """With the switch and without --enable-eplb the server ends at its start and says what to change."""
    with pytest.raises(EngineFailedError, match="start with --enable-eplb"):
        run_engine(checkpoint, tmp_path, ranks=2, variables=VARIABLES, tokens=4)
