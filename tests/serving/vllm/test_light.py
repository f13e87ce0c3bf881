"""vLLM's own EPLB modules and V2 controller, in gloo processes, with this library's state in the place of theirs."""

from __future__ import annotations

import logging.handlers
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from eplb_fsm.core.states import State
from eplb_fsm.errors import BankError, ConfigError, UsageError
from tests.dist.harness import RankFailedError, RankLink, run_ranks
from tests.serving.driving import ON_ACCELERATOR, accelerator, outcome_names
from tests.serving.light import sources_of
from tests.serving.vllm.light import VERSION, eplb_config
from tests.serving.vllm.light_elastic import NUM_LOCAL, ElasticEngine
from tests.serving.vllm.light_engine import NUM_LOGICAL, LightEngine


@pytest.fixture(scope="module")
def sources() -> Path:
    """The files of vLLM."""
    return sources_of("vllm", VERSION)


def _serve(link: RankLink, sources: Path, num_epochs: int, arguments: dict[str, Any]) -> dict[str, Any]:
    engine = LightEngine(link, sources, **arguments)
    engine.load()
    engine.run_epochs(num_epochs)
    states = list(engine.state.model_states.values())
    load = engine.fsm._parts.load_source
    load.rotate()
    return {
        "outcomes": outcome_names(engine.fsm.outcomes),
        "steps": (engine.fsm.step_idx, engine.num_passes),
        "maps": [state.physical_to_logical_map.tolist() for state in states],
        "placements": [placement.physical_to_logical_map.tolist() for placement in engine.fsm.placements],
        "right": engine.slots_are_right(),
        "counted": (int(load._total.sum()), engine.num_routed),
        "own thread": engine.state.async_worker,
    }


@pytest.mark.compatibility(
    engine="vLLM",
    version="0.32.0",
    what="EPLB modules and V2 controller over 2 and 4 gloo ranks, target and draft model, float32",
    how="driven",
)
@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("num_models", [1, 2])
def test_every_token_reaches_its_expert_through_epochs(sources: Path, num_ranks: int, num_models: int) -> None:
    """Through five epochs of one or two models every token has its experts' result, and vLLM's maps are true."""
    results = run_ranks(num_ranks, _serve, sources, 6, {"num_models": num_models}, timeout_s=100)
    for name in ("outcomes", "steps", "maps"):
        assert all(result[name] == results[0][name] for result in results)
    first = results[0]
    assert first["outcomes"].count("COMMITTED") >= 5, first["outcomes"]
    assert first["steps"][0] == first["steps"][1]
    assert first["maps"] == first["placements"]
    assert first["own thread"] is None
    for result in results:
        assert result["right"]
        assert result["counted"][0] == result["counted"][1]


@pytest.mark.compatibility(
    engine="vLLM",
    version="0.32.0",
    what="EPLB modules over 2 gloo ranks, experts on an accelerator that they share (CUDA)",
    how="driven",
)
@ON_ACCELERATOR
@pytest.mark.parametrize("use_async", [True, False])
def test_the_same_on_an_accelerator(sources: Path, use_async: bool) -> None:
    """With experts, counts and maps of both models on a device that the ranks share, in both modes."""
    arguments = {"num_models": 2, "device": accelerator(), "eplb_config": eplb_config(use_async=use_async)}
    for result in run_ranks(2, _serve, sources, 6, arguments, timeout_s=100):
        assert result["outcomes"].count("COMMITTED") >= 5, result["outcomes"]
        assert result["maps"] == result["placements"]
        assert result["right"]
        assert result["counted"][0] == result["counted"][1]


def test_use_async_false_is_the_synchronous_mode(sources: Path) -> None:
    """With `use_async=False` the same machine runs through a whole epoch inside one step."""
    arguments = {"eplb_config": eplb_config(use_async=False)}
    first, second = run_ranks(2, _serve, sources, 3, arguments, timeout_s=100)
    assert first["outcomes"] == second["outcomes"]
    assert first["outcomes"].count("COMMITTED") >= 2
    assert first["right"]
    assert second["right"]


def _serve_stock(link: RankLink, sources: Path) -> Any:
    engine = LightEngine(link, sources, stock=True)
    engine.load()
    (state,) = engine.state.model_states.values()
    before = state.physical_to_logical_map.tolist()
    engine.run_passes(80)
    return before != state.physical_to_logical_map.tolist(), engine.slots_are_right()


def test_the_harness_agrees_with_vllms_own_state(sources: Path) -> None:
    """The same passes with vLLM's own asynchronous EPLB move experts too, and every token has its experts' result."""
    assert run_ranks(2, _serve_stock, sources) == [(True, True)] * 2


def _serve_with_a_wrong_map(link: RankLink, sources: Path) -> None:
    engine = LightEngine(link, sources)
    engine.load()
    engine.run_passes(2)
    (state,) = engine.state.model_states.values()
    state.logical_to_physical_map[1, [14, 15]] = state.logical_to_physical_map[1, [15, 14]]
    engine.run_passes(8)


def test_a_wrong_map_is_noticed(sources: Path) -> None:
    """Were a token sent to another expert, the comparison would fail."""
    with pytest.raises(RankFailedError, match="Tensor-likes are not close"):
        run_ranks(2, _serve_with_a_wrong_map, sources)


def _dummies(link: RankLink, sources: Path) -> dict[str, Any]:
    engine = LightEngine(link, sources, data_parallel_size=2)
    engine.load()
    engine.forward(is_profile=True)
    after_profile = engine.fsm.step_idx
    for idle_rank in (0, 1, 0, 1, 0):  # who has no requests makes dummy passes
        for _ in range(30):
            engine.forward(is_dummy=link.rank == idle_rank)
    load = engine.fsm._parts.load_source
    load.rotate()
    per_pass = engine.num_routed // engine.num_passes
    (state,) = engine.state.model_states.values()
    return {
        "profile": after_profile,
        "steps": engine.fsm.step_idx,
        "counted passes": int(load._total.sum()) / per_pass,
        "left over": int(state.expert_load_pass.sum()),
    }


@pytest.mark.compatibility(
    engine="vLLM",
    version="0.32.0",
    what="V2 runner: real, dummy and profile passes through step_eplb_after",
    how="driven",
)
def test_dummy_passes_step_and_count_no_tokens(sources: Path) -> None:
    """A dummy pass of an idle rank is a step whose tokens count for nothing; a profiling pass is no step."""
    first, second = run_ranks(2, _dummies, sources)
    assert (first["profile"], second["profile"]) == (0, 0)
    assert (first["steps"], second["steps"]) == (150, 150)
    assert (first["counted passes"], second["counted passes"]) == (60, 90)
    assert (first["left over"], second["left over"]) == (0, 0)


def _window(link: RankLink, sources: Path) -> list[tuple[bool, bool]]:
    options = {"BACKOFF_STEPS": "20"}  # so that there are passes before the next try
    engine = LightEngine(link, sources, options, eplb_config=eplb_config(step_interval=60, window_size=20))
    engine.load()
    seen = []

    def note() -> None:
        seen.append((engine.state._is_recording, bool(engine.state.should_record_tensor)))

    engine.run_passes(30)
    note()
    engine.run_passes(15)
    note()
    engine.run_until(lambda: engine.fsm.state is State.TRANSFERRING)
    engine.fsm.request_abort()
    engine.run_until(lambda: len(engine.fsm.outcomes) == 1)
    engine.run_passes(8)
    note()
    engine.run_until(lambda: len(engine.fsm.outcomes) == 2)
    seen.append((outcome_names(engine.fsm.outcomes)[1] == "COMMITTED", engine.slots_are_right()))
    return seen


def test_layers_count_only_what_a_plan_is_made_from(sources: Path) -> None:
    """Counting begins a window before an epoch is due, and goes on for the try after an abort."""
    first, second = run_ranks(2, _window, sources)
    assert first == second
    assert first == [(False, False), (True, True), (True, True), (True, True)]


def _reload(link: RankLink, sources: Path) -> list[Any]:
    engine = LightEngine(link, sources)
    engine.load()
    engine.run_passes(3)
    with engine.state.reloading():
        seen: list[Any] = [engine.fsm.health().is_drained]
    engine.run_until(lambda: "COMMITTED" in outcome_names(engine.fsm.outcomes))
    try:
        with engine.state.reloading():
            seen.append("reloaded")
    except UsageError as error:
        seen.append(str(error))
    engine.run_epochs(1)
    return [*seen, engine.fsm.health().is_frozen, engine.slots_are_right()]


def test_weights_are_reloaded_only_while_experts_are_where_they_were_at_the_start(sources: Path) -> None:
    """Before the first commit vLLM may load weights by the map of its start, later not; rebalancing goes on."""
    for could, said, *after in run_ranks(2, _reload, sources):
        assert could
        assert "experts have moved" in said
        assert after == [False, True]


_SIZES = (2, 4, 3)


def _scale(link: RankLink, sources: Path) -> dict[int, dict[str, Any]]:
    engine = ElasticEngine(link, sources, _SIZES)
    engine.load()
    seen = {}
    for before, size in zip((0, *_SIZES), _SIZES, strict=False):
        if before and link.rank < max(before, size):
            engine.scale()
        if link.rank < size:
            seen[size] = _serve_until_amid_an_epoch(engine)
    return seen


def _serve_until_amid_an_epoch(engine: ElasticEngine) -> dict[str, Any]:
    (state,) = engine.state.model_states.values()
    placed_by = int(state.last_expert_load.sum(0).argmax())
    engine.forward()
    first_map = state.physical_to_logical_map.tolist()
    engine.run_epochs(2)
    outcomes = outcome_names(engine.fsm.outcomes)
    engine.hot = 9
    engine.run_until(lambda: engine.fsm.state is State.TRANSFERRING)
    with pytest.raises(UsageError, match=r"drain_async\(\) first"):
        engine.state.rearrange()
    return {
        "placed by": placed_by,
        "first map": first_map,
        "outcomes": outcomes,
        "redundant": engine.fsm._parts.config.num_redundant_experts,
        "right": engine.slots_are_right(),
    }


@pytest.mark.compatibility(
    engine="vLLM",
    version="0.32.0",
    what="elastic scaling by vLLM's executor, 2 to 4 to 3 ranks: drain, reshuffle by vLLM, connect anew",
    how="driven",
)
def test_elastic_scaling_ends_an_epoch_and_rebalancing_goes_on_among_other_ranks(sources: Path) -> None:
    """Amid an epoch vLLM scales up, then down; each time its reshuffle knows the load, and epochs commit after it."""
    results = run_ranks(4, _scale, sources, timeout_s=100)
    for size in _SIZES:
        first, *others = (result[size] for result in results if size in result)
        assert len(others) == size - 1
        assert all({**other, "right": True} == first for other in others)
        assert all(one["right"] for one in (first, *others))
        assert first["redundant"] == NUM_LOCAL * size - NUM_LOGICAL == len(first["first map"][0]) - NUM_LOGICAL
        assert "COMMITTED" in first["outcomes"]
    assert [results[0][size]["placed by"] in (9, 10) for size in _SIZES] == [False, True, True]


def _scale_and_fail(link: RankLink, sources: Path, case: str) -> tuple[str, bool, list[str]]:
    engine = ElasticEngine(link, sources, (2, 3))
    engine.load()
    if not engine.is_new:
        engine.run_passes(3)
    engine.scale()
    (state,) = engine.state.model_states.values()
    experts: Any = engine.models[0].moe_layers[1].routed_experts
    forward = experts.forward_modular
    if link.rank == 2 and case == "map":
        state.physical_to_logical_map[1, :2] = state.physical_to_logical_map[1, :2].flip(0)
    elif link.rank == 2 and case == "options":
        os.environ["EPLB_FSM_NONE_SUCH"] = "1"
    elif case == "kernel":
        packed = experts.w2_weight.clone()
        experts.forward_modular = lambda x, weights, ids: x @ experts.w13_weight[0] @ packed[0]
    log = logging.handlers.BufferingHandler(100)
    logging.getLogger("eplb_fsm").addHandler(log)
    engine.eplb.step()  # after a pass of vLLM's own that nobody checks
    experts.forward_modular = forward
    engine.run_passes(5)
    (error,) = [record.getMessage() for record in log.buffer if record.levelno >= logging.ERROR]
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("eplb-fsm")]
    return error, engine.state.session is None and not engine.state.should_record_tensor, left


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("map", "digest of the placement"),
        ("options", "EPLB_FSM_NONE_SUCH"),
        ("kernel", "gave another output after its registered tensors"),
    ],
)
def test_where_the_ranks_of_a_scaling_cannot_be_connected_they_serve_on_without_rebalancing(
    sources: Path, case: str, reason: str
) -> None:
    """Another map or option on a rank that has come, or a kernel of their own: all say why, and nothing is left."""
    for error, is_over, left in run_ranks(3, _scale_and_fail, sources, case):
        assert "EPLB has ended with elastic scaling" in error
        assert reason in error
        assert is_over
        assert left == []


def _start_refused(link: RankLink, sources: Path, case: str, arguments: dict[str, Any]) -> str:
    try:
        engine = LightEngine(link, sources, **arguments)
        experts: Any = engine.models[0].moe_layers[1].routed_experts
        if case == "unregistered":
            engine.models[0].moe_layers[1].get_expert_weights = lambda: [
                experts.w13_weight.view(len(experts.w2_weight), -1)
            ]
        elif case == "repacked":
            packed = experts.w2_weight.clone()
            experts.forward_modular = lambda x, weights, ids: x @ experts.w13_weight[0] @ packed[0]
        if case == "V1":
            from eplb_fsm.engines.vllm.state import BackgroundEplbState

            BackgroundEplbState(engine.config.parallel_config, torch.device("cpu"))
        engine.load()
    except (ConfigError, BankError) as error:
        return str(error)
    return "started"


@pytest.mark.parametrize(
    ("case", "arguments", "reason"),
    [
        ("V1", {"pipeline_parallel_size": 2}, "--pipeline-parallel-size 2 with the V1 model runner"),
        ("V1", {"runner_type": "pooling"}, "a pooling model with the V1 model runner"),
        ("V2", {"runner_type": "pooling"}, "started"),
        ("", {"eplb_config": eplb_config(policy="swipe")}, "policy='swipe'"),
        ("", {"options": {"REPLICA_SPLIT": "weighted"}}, "every rank has to pick the same replica"),
        ("unregistered", {}, "every layer must register the same tensors"),
        ("repacked", {}, "gave another output after its registered tensors"),
    ],
)
def test_what_would_not_be_moved_is_refused_at_start(
    sources: Path, case: str, arguments: dict[str, Any], reason: str
) -> None:
    """What vLLM was started with, or a tensor that would stay behind, ends the start with the reason on all ranks."""
    for message in run_ranks(2, _start_refused, sources, case, arguments):
        assert reason in message
