"""Two data-parallel engine cores of vLLM that share the experts: who idles steps too, through waves and pauses.

Data parallelism with expert parallelism does not run on vLLM's CPU backend, so the worker is a stand-in.

**vLLM's own**, unchanged and in processes that vLLM starts: the frontend (`AsyncLLM`, `DPLBAsyncMPClient`), the DP
coordinator, two `DPEngineCoreProc` made by their own `__init__` and run by `run_engine_core` (busy loop, engine step,
wave handling, `_has_global_unfinished_reqs`, `execute_dummy_batch`, pause and resume, sockets and queues), the
scheduler, `UniProcExecutor` (under a name of ours), the process groups of the ranks, and of the second model runner
`EPLBController` and `step_eplb_after`. **This library's own**: the plugin, by which vLLM makes `BackgroundEplbStateV2`.

**Stands in** (`dp_worker.py`, `dp_model.py`): the worker, the model runner and the model, whose layers meet in gloo
collectives where a GPU's would meet in an all-to-all; there are neither attention nor a KV cache. vLLM's CPU platform
turns asynchronous scheduling off, so that the engine core steps without its batch queue.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.serving.vllm.checkpoint import CONFIG
from tests.serving.vllm.harness import EngineError, engine_python, run_script
from tests.serving.vllm.test_background import BACKGROUND

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

_ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "skip_tokenizer_init": True,
    "enable_prefix_caching": False,
    "disable_log_stats": True,
    "max_model_len": 256,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "data_parallel_size": 2,
    "enable_expert_parallel": True,
    "enable_eplb": True,
    "eplb_config": {"use_async": True, "step_interval": 10, "window_size": 12, "num_redundant_experts": 8},
    "distributed_executor_backend": "dp_worker.InProcess",
    "worker_cls": "dp_worker.Worker",
}
_NUM_TOKENS = 100
"""Of each request but those of short waves, as in `run_dp_loop.py`."""
_MODES = ("keep", "wait", "abort")
_ACTS = [("serve_one_rank", 0), ("serve_one_rank", 1), ("end_waves",), *(("pause", mode) for mode in _MODES)]

Ranks = list[dict[str, Any]]


def _serve(folder: Path, acts: list[Any], environment: dict[str, str]) -> tuple[dict[str, Any], str]:
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    request = {"engine": {**_ENGINE, "model": str(folder)}, "acts": acts}
    variables = {**BACKGROUND, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", **environment}
    return run_script("run_dp_loop.py", request, variables, 900)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What was seen in one run through all acts."""
    engine_python()  # skips before anything is written
    return _serve(tmp_path_factory.mktemp("model"), _ACTS, {})[0]


def _of_acts(seen: dict[str, Any]) -> list[list[Ranks]]:
    return [[look["ranks"] for look in act] for act in seen["acts"]]


def _committed(ranks: Ranks) -> int:
    number: int = ranks[0]["outcomes"]["COMMITTED"]
    return number


@pytest.mark.compatibility(
    engine="vLLM",
    version="0.32.0",
    what="DPEngineCoreProc, two data-parallel cores: busy and idle rank, waves, with a stand-in worker",
    how="driven",
)
def test_who_idles_steps_as_often_as_who_serves(seen: dict[str, Any]) -> None:
    """While only one rank has requests, both make as many passes and steps, and epochs commit the same maps on both."""
    assert seen["client"] == "DPLBAsyncMPClient"
    before = seen["start"]["ranks"]
    assert [rank["steps"] for rank in before] == [0, 0]
    for serving, (after,) in enumerate(_of_acts(seen)[:2]):
        made = [
            rank["passes"]["dummy"] - old["passes"].get("dummy", 0) for rank, old in zip(after, before, strict=True)
        ]
        assert made[1 - serving] == after[0]["steps"] - before[0]["steps"]  # all that the idle rank made
        assert made[serving] < made[1 - serving]
        assert _committed(after) >= _committed(before) + 2
        before = after
    for first, second in (ranks for act in _of_acts(seen) for ranks in act):
        for rank in (first, second):
            assert rank["steps"] == rank["passes"].get("real", 0) + rank["passes"]["dummy"]
            assert rank["map"] == rank["placement"]
        assert [first[name] for name in ("steps", "outcomes", "map")] == [
            second[name] for name in ("steps", "outcomes", "map")
        ]


def test_tokens_are_right_and_those_of_dummies_count_for_nothing(seen: dict[str, Any]) -> None:
    """Every token gets the whole model's result, and each rank has counted the tokens of its real passes only."""
    for kept in seen["tokens"]:
        assert kept["got"] == kept["wanted"][: len(kept["got"])]
    for ranks in (ranks for act in _of_acts(seen) for ranks in act):
        assert [rank["wrong"] for rank in ranks] == [0, 0]
        assert [rank["counted"] for rank in ranks] == [rank["routed"].get("real", 0) for rank in ranks]
        assert all(rank["routed"]["dummy"] > 0 for rank in ranks)


def test_rebalancing_goes_on_in_the_next_wave(seen: dict[str, Any]) -> None:
    """A wave that ends amid an epoch stops both loops and aborts nothing; a wave on one rank goes on with the epoch."""
    looks = seen["acts"][2]
    ended, stood, after = (look["ranks"] for look in looks)
    assert [look["has_work"] for look in looks] == [[False, False]] * 3
    assert ended[0]["state"] == ended[1]["state"] != "IDLE"
    assert stood == ended
    assert after[1]["passes"]["real"] == stood[1]["passes"]["real"]  # that rank had no request
    assert after[0]["steps"] == after[1]["steps"] > stood[0]["steps"]
    assert _committed(after) >= _committed(stood) + 2
    assert _is_healthy(after)


@pytest.mark.compatibility(
    engine="vLLM", version="0.32.0", what="DPEngineCoreProc: pause and resume (keep, wait, abort)", how="driven"
)
@pytest.mark.parametrize("mode", _MODES)
def test_a_pause_stops_the_steps_of_both_ranks(seen: dict[str, Any], mode: str) -> None:
    """Paused, both loops stand after the same step with what they have, and resumed they serve and rebalance on."""
    looks = seen["acts"][3 + _MODES.index(mode)]
    paused, stood, after = (look["ranks"] for look in looks)
    assert [look["has_work"] for look in looks] == [[False, False]] * 3
    assert stood == paused
    running_before, late_before, running, late = looks[0]["lengths"]
    assert (late_before, late) == (0, _NUM_TOKENS)  # what came in the pause has waited
    assert (running_before == _NUM_TOKENS) == (mode == "wait")
    assert running == (running_before if mode == "abort" else _NUM_TOKENS)
    assert after[0]["steps"] == after[1]["steps"] > stood[0]["steps"]
    assert _committed(after) >= _committed(stood) + 2
    assert _is_healthy(after)


def _is_healthy(ranks: Ranks) -> bool:
    return all(
        rank["is_worker_alive"] and not rank["why_stopped"] and rank["outcomes"]["ABORTED"] == 0 for rank in ranks
    )


def test_a_rank_that_no_longer_steps_is_noticed(tmp_path: Path) -> None:
    """Where an idle rank leaves out the steps after its dummy passes, the busy one misses its votes and says so."""
    environment = {"DP_LOOP_STEPPED_DUMMIES": "30", "EPLB_FSM_RESOLVE_TIMEOUT_S": "2"}
    engine_python()
    try:
        _, log = _serve(tmp_path, [("serve_one_rank", 0)], environment)
    except EngineError as error:  # a commit was being voted on, so that the rank must not serve on
        log = str(error)
    assert "the votes of a round were not there" in log
