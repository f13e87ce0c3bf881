"""SGLang with its own EPLB, on CPUs: what the adapter's tests take as given, and that a wrong expert would show."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.serving.sglang.checkpoint import make_checkpoint
from tests.serving.sglang.harness import (
    PROMPTS,
    WRONG_SLOT_VARIABLE,
    Outcome,
    moved_slots,
    own_eplb,
    requires_sglang,
    run_engine,
)
from tests.serving.sglang.serve import serving

# An engine imports for half a minute where it has the cores to itself, and for minutes where it has not.
pytestmark = [requires_sglang, pytest.mark.slow, pytest.mark.timeout(1500)]

EVERY = 10
TOKENS = 64


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that all engines here load."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def reference(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """What one rank generates, which needs neither expert parallelism nor the plugin's forward pass."""
    return run_engine(checkpoint, tmp_path_factory.mktemp("reference"), tokens=TOKENS)


def test_expert_parallelism_keeps_the_tokens(checkpoint: Path, reference: Outcome, tmp_path: Path) -> None:
    """Two ranks that share the experts generate the same tokens as one rank that has them all."""
    outcome = run_engine(checkpoint, tmp_path, ranks=2, tokens=TOKENS)
    assert outcome.tokens == reference.tokens
    assert not moved_slots(outcome.log)


@pytest.mark.parametrize("ranks", [2, 4])
def test_own_eplb_moves_experts_and_keeps_the_tokens(
    checkpoint: Path, reference: Outcome, tmp_path: Path, ranks: int
) -> None:
    """With SGLang's own EPLB experts move again and again, and the tokens stay the same."""
    outcome = run_engine(checkpoint, tmp_path, ranks=ranks, arguments=own_eplb(EVERY), tokens=TOKENS, rounds=2)
    assert outcome.tokens == reference.tokens * 2
    moved = moved_slots(outcome.log)
    assert len(moved) >= 2 * (TOKENS // EVERY)
    assert all(moved)


def test_one_wrong_expert_changes_the_tokens(checkpoint: Path, reference: Outcome, tmp_path: Path) -> None:
    """The tokens tell if one slot of one layer on one rank computes with another slot's weights."""
    outcome = run_engine(checkpoint, tmp_path, ranks=2, variables={WRONG_SLOT_VARIABLE: "1,0,3"}, tokens=TOKENS)
    assert all(got != expected for got, expected in zip(outcome.tokens[0], reference.tokens[0], strict=True))


def test_server_answers_while_its_own_eplb_moves_experts(checkpoint: Path, reference: Outcome, tmp_path: Path) -> None:
    """Over HTTP, too, the tokens are those of one rank while experts move."""
    with serving(checkpoint, tmp_path, ranks=2, arguments=own_eplb(EVERY)) as server:
        answers = [[server.generate(prompt, TOKENS) for prompt in PROMPTS] for _ in range(2)]
        assert answers == reference.tokens * 2
        assert len(moved_slots(server.log)) >= 2 * len(PROMPTS) * (TOKENS // EVERY)
