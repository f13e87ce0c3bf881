"""The faults that stop vLLM's own asynchronous EPLB for good, injected into this library's, in the whole engine.

There, a thread that dies of an exception is never missed, and the main thread waits for a stopped rank without a limit
of its own. What strikes, where and when is told to `vllm_on_cpu.faults`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.serving.driving import BACKGROUND, epochs
from tests.serving.vllm.checkpoint import make_checkpoint
from tests.serving.vllm.harness import EngineError, EngineRun, engine_python, run_engine
from tests.serving.vllm.test_own_eplb import OWN_EPLB

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

LLM: dict[str, Any] = {**OWN_EPLB, "eplb_config": {**OWN_EPLB["eplb_config"], "step_interval": 10}}
SEVERAL_CHUNKS = {**BACKGROUND, "EPLB_FSM_COMMIT_BYTES": "100000", "EPLB_FSM_BACKOFF_STEPS": "10"}
"""Epochs of up to six chunks; after one that was aborted the next one starts soon."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint that all tests load."""
    engine_python()  # skips before anything is written
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def one_rank(model: Path) -> EngineRun:
    """What one rank generates, without expert parallelism."""
    return run_engine(model)


def _run(model: Path, fault: str, *, rounds: int = 2, use_async: bool = True, **variables: str) -> EngineRun:
    llm = {**LLM, "eplb_config": {**LLM["eplb_config"], "use_async": use_async}}
    environment = {**SEVERAL_CHUNKS, "VLLM_ON_CPU_FAULT": fault, **variables}
    return run_engine(model, rounds=rounds, environment=environment, **llm)


def _since_fault(log: str) -> str:
    """What was logged once it had struck; it did exactly once, after something had been committed."""
    before, *others = re.split(r"fault at \w+ in epoch \d+ begins", log)
    assert len(others) == 1
    assert epochs(before)
    return others[0]


def _ends(log: str) -> Sequence[str]:
    return epochs(log, "(?:COMMITTED|SKIPPED|ABORTED|FAILED)")


def _passes_since_fault(folder: Path, rank: int) -> int:
    lines = (folder / f"rank-{rank}").read_text(encoding="utf-8").split()
    passes_before = lines.index("fault")
    assert passes_before > 0
    return lines[passes_before + 1 :].count("pass")


def _assert_served_right(run: EngineRun, one_rank: EngineRun) -> None:
    """Every token is right, and all ranks have the same maps."""
    assert run.tokens == one_rank.tokens * len(run.tokens)
    assert all(of_ranks[0] == of_ranks[1] for of_ranks in run.maps)


# -- an exception in a transfer ---------------------------------------------------------------------------


def test_a_failed_transfer_costs_one_epoch(model: Path, one_rank: EngineRun) -> None:
    """A transfer that raises on one rank aborts its epoch with the reason, later ones commit, and every token stays."""
    run = _run(model, "arrived,1,2")
    failed, *later = _ends(_since_fault(run.log))
    assert "ABORTED(TRANSFER_ERROR)" in failed
    assert any("COMMITTED" in end for end in later), later
    _assert_served_right(run, one_rank)


def test_rows_that_never_come_stop_rebalancing(model: Path, one_rank: EngineRun) -> None:
    """A rank that raises before it sends lets the other wait in vain, so both stop with the reason and serve on."""
    # Many rounds, since what it waits for is the limit of one transfer, the sum of the two.
    limits = {"EPLB_FSM_TRANSFER_TIMEOUT_S": "2", "EPLB_FSM_PLAN_TIMEOUT_S": "3"}
    run = _run(model, "begin,1,2", rounds=6, **limits)
    since = _since_fault(run.log)
    assert "ABORTED(TRANSFER_ERROR)" in _ends(since)[0]
    assert not epochs(since)
    for rank in range(2):
        assert re.search(rf"rank {rank} epoch \d+: STOP\(TRANSPORT\)", since)
    _assert_served_right(run, one_rank)


# -- a stopped rank ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "limits"),
    [
        ("begin,1,2,4", {}),
        ("pass,1,2,4", {"EPLB_FSM_VOTE_TIMEOUT_S": "1", "EPLB_FSM_LIVENESS_TIMEOUT_S": "1"}),
    ],
    ids=["in a transfer", "in a pass, for longer than votes may take"],
)
def test_epochs_go_on_after_a_stop(model: Path, one_rank: EngineRun, fault: str, limits: dict[str, str]) -> None:
    """A rank is stopped for seconds while rows move; then generation and epochs go on, and every token stays."""
    run = _run(model, fault, **limits)
    during, after = re.split(r"fault at \w+ in epoch \d+ is over", _since_fault(run.log))
    # The engine's own collective waits for the rank, so nobody comes to a round that lacks its vote.
    assert not _ends(during)
    assert epochs(after), _ends(after)
    assert ("no sign of life from ranks [1]" in during) == bool(limits)
    _assert_served_right(run, one_rank)


def test_a_stop_that_outlasts_votes_stops_rebalancing(model: Path, one_rank: EngineRun) -> None:
    """In synchronous mode a rank that is stopped for longer than votes may take ends rounds on both; they serve on."""
    # With one buffer the other rank votes for its first chunk before it needs the stopped one again. It promises that
    # chunk and gives up reading the round, so what became of it has to be found out over the store.
    limits = {"EPLB_FSM_TRANSFER_TIMEOUT_S": "4", "EPLB_FSM_PLAN_TIMEOUT_S": "4"}
    limits |= {"EPLB_FSM_VOTE_TIMEOUT_S": "1", "EPLB_FSM_STAGING_BUFFERS": "1"}
    run = _run(model, "arrived,1,2,14", use_async=False, **limits)
    since = _since_fault(run.log)
    assert "rank 0: rebalancing stopped (TIMEOUT)" in since
    assert re.search(r"rank 1 epoch \d+: STOP\(TIMEOUT\) asked for by rank 0", since)
    assert re.search(r"FAILED\(TIMEOUT\), [1-9]\d* chunks live", _ends(since)[0])
    assert not epochs(since)
    _assert_served_right(run, one_rank)


# -- a promised commit that fails -------------------------------------------------------------------------


def test_no_pass_follows_a_failed_commit(model: Path, tmp_path: Path) -> None:
    """Where a promised commit fails on the rank that answers nobody, it makes no further pass, and the engine ends."""
    variables = {"VLLM_ON_CPU_PASSES": str(tmp_path), "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": "5"}
    with pytest.raises(EngineError) as caught:
        _run(model, "commit,1,2", **variables)
    message = str(caught.value)
    assert message.startswith("exit status 1\n")
    assert "fail-stop: a promised commit failed" in message
    # vLLM may see the death before the kernel tells it how the process ended.
    assert re.search(r"VllmWorker-1 died unexpectedly \(exit code: (70|None)\)", message)
    assert _passes_since_fault(tmp_path, rank=1) == 0


def test_an_exception_would_not_do(model: Path, one_rank: EngineRun, tmp_path: Path) -> None:
    """Where that rank only raises, vLLM drops the exception and serves wrong tokens from two maps to its good end."""
    variables = {"VLLM_ON_CPU_PASSES": str(tmp_path), "VLLM_ON_CPU_FAIL_STOP": "raise"}
    run = _run(model, "commit,1,2", **variables)
    assert _passes_since_fault(tmp_path, rank=1) > 0
    assert run.log.count("WorkerProc hit an exception") > 1
    assert run.maps[-1][0] != run.maps[-1][1]
    assert run.tokens[-1] != one_rank.tokens[0]
