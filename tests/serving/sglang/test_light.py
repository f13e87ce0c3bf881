"""SGLang's own EPLB modules, in gloo processes, with this library's manager in the place of theirs."""

from __future__ import annotations

import logging.handlers
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from eplb_fsm.core.states import State
from eplb_fsm.errors import BankError, ConfigError, PeerFailed
from tests.dist.harness import RankFailedError, RankLink, run_ranks
from tests.serving.driving import ON_ACCELERATOR, accelerator, outcome_names
from tests.serving.light import sources_of
from tests.serving.sglang.light import VERSION
from tests.serving.sglang.light_engine import NUM_MOE_LAYERS, LightEngine


@pytest.fixture(scope="module")
def sources() -> Path:
    """SGLang's files."""
    return sources_of("sglang", VERSION)


def _serve(link: RankLink, sources: Path, num_epochs: int, moe: dict[str, Any]) -> dict[str, Any]:
    engine = LightEngine(link, sources, **moe)
    engine.manager.start()
    engine.run_epochs(num_epochs)
    load = engine.fsm._parts.load_source
    load.rotate()
    return {
        "outcomes": outcome_names(engine.fsm.outcomes),
        "steps": engine.fsm.step_idx,
        "passes": engine.num_passes,
        "map": engine.metadata.physical_to_logical_map.tolist(),
        "map for the host": engine.metadata.physical_to_logical_map_cpu.tolist(),
        "placement": engine.fsm.placements[0].physical_to_logical_map.tolist(),
        "right": engine.slots_are_right(),
        "routed": engine.num_routed,
        "counted": int(load._total.sum()),
    }


@pytest.mark.compatibility(
    engine="SGLang",
    version="0.5.23",
    what="EPLB modules over 2 and 4 gloo ranks, no all-to-all backend, float32",
    how="driven",
)
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_every_token_reaches_its_expert_through_epochs(sources: Path, num_ranks: int) -> None:
    """Through five epochs every token has its experts' result, SGLang's map is true, and each token is counted once."""
    results = run_ranks(num_ranks, _serve, sources, 6, {}, timeout_s=100)
    for name in ("outcomes", "steps", "map"):
        assert all(result[name] == results[0][name] for result in results)
    first = results[0]
    assert first["outcomes"].count("COMMITTED") >= 5, first["outcomes"]
    assert first["steps"] == first["passes"]
    assert first["map"][-NUM_MOE_LAYERS:] == first["placement"]
    assert all(result["right"] for result in results)
    assert sum(result["counted"] for result in results) == first["routed"]


@pytest.mark.compatibility(
    engine="SGLang",
    version="0.5.23",
    what="EPLB modules over 2 gloo ranks, experts on an accelerator that they share (CUDA)",
    how="driven",
)
@ON_ACCELERATOR
def test_the_same_on_an_accelerator(sources: Path) -> None:
    """With experts, counts and maps on a device that the ranks share; the maps' copies for the host are true too."""
    results = run_ranks(2, _serve, sources, 6, {"device": accelerator()}, timeout_s=100)
    for result in results:
        assert result["outcomes"].count("COMMITTED") >= 5, result["outcomes"]
        assert result["map"] == result["map for the host"]
        assert result["map"][-NUM_MOE_LAYERS:] == result["placement"]
        assert result["right"]
    assert sum(result["counted"] for result in results) == results[0]["routed"]


def _serve_stock(link: RankLink, sources: Path) -> Any:
    engine = LightEngine(link, sources, stock=True)
    before = engine.metadata.physical_to_logical_map.tolist()
    engine.run_passes(50)
    return before != engine.metadata.physical_to_logical_map.tolist(), engine.slots_are_right()


def test_the_harness_agrees_with_sglangs_own_manager(sources: Path) -> None:
    """The same passes with SGLang's own manager move experts too, and every token has its experts' result."""
    assert run_ranks(2, _serve_stock, sources) == [(True, True)] * 2


def _serve_with_a_wrong_map(link: RankLink, sources: Path) -> None:
    engine = LightEngine(link, sources)
    engine.manager.start()
    engine.run_passes(2)
    engine.metadata.logical_to_all_physical_map[1] = engine.metadata.logical_to_all_physical_map[1].roll(1, 0)
    engine.run_passes(2)


def test_a_wrong_map_is_noticed(sources: Path) -> None:
    """Were a token sent to another expert, the comparison would fail."""
    with pytest.raises(RankFailedError, match="Tensor-likes are not close"):
        run_ranks(2, _serve_with_a_wrong_map, sources)


def _control(link: RankLink, sources: Path) -> dict[str, Any]:
    engine = LightEngine(link, sources)
    manager = engine.manager
    manager.start()
    seen: dict[str, Any] = {}
    engine.run_until(lambda: engine.fsm.state is State.TRANSFERRING)
    manager.reset_generator()
    engine.run_epochs(1)
    seen["reset"] = outcome_names(engine.fsm.outcomes)[-1]
    engine.run_until(lambda: engine.fsm.state is State.TRANSFERRING)
    manager.disable_rebalance("for a test")
    engine.run_until(lambda: engine.fsm.health().is_frozen)
    epoch = engine.fsm.health().epoch
    engine.run_passes(40)
    seen["disabled"] = engine.fsm.health().epoch - epoch
    manager.enable_rebalance()
    engine.run_epochs(2)
    seen["enabled"] = outcome_names(engine.fsm.outcomes)[-1]
    seen["right"] = engine.slots_are_right()
    return seen


def test_reset_disable_and_enable_act_at_agreed_steps(sources: Path) -> None:
    """A reset aborts the epoch under way on all ranks; nothing starts while disabled; afterwards it goes on."""
    first, second = run_ranks(2, _control, sources)
    assert first == second == {"reset": "ABORTED(REQUESTED)", "disabled": 0, "enabled": "COMMITTED", "right": True}


def _reload(link: RankLink, sources: Path) -> dict[str, Any]:
    from eplb_fsm.engines.sglang import plugin

    engine = LightEngine(link, sources)
    engine.manager.start()
    updater = SimpleNamespace(tp_worker=SimpleNamespace(model_runner=SimpleNamespace(eplb_manager=engine.manager)))
    seen: dict[str, Any] = {}

    def update_weights_from_disk(_: Any) -> str:
        health = engine.fsm.health()
        seen["during"] = (health.is_frozen, health.is_drained)
        for layer, weights in engine.weights.items():  # as SGLang's loader does it, by the map
            for weight in weights:
                weight.mul_(0.5)
            for parameter in engine.model.layers[layer].parameters():
                parameter.mul_(0.5)
        return "done"

    engine.run_until(lambda: engine.fsm.state is State.TRANSFERRING)
    seen["result"] = plugin.frozen_during(update_weights_from_disk, updater)
    seen["ended"] = outcome_names(engine.fsm.outcomes)[-1]
    engine.run_epochs(1)
    opened = plugin.frozen_from("session")(lambda _: "opened", updater)
    engine.run_passes(30)
    seen["session"] = (opened, engine.fsm.health().is_frozen)
    plugin.frozen_until("session")(lambda _: "closed", updater)
    engine.run_epochs(1)
    seen["after"] = (outcome_names(engine.fsm.outcomes)[-1], engine.slots_are_right())
    return seen


@pytest.mark.compatibility(
    engine="SGLang", version="0.5.23", what="update_weights_from_disk, weight-update session", how="driven"
)
def test_a_reload_of_weights_waits_for_nothing_in_transfer(sources: Path) -> None:
    """While SGLang writes weights no epoch is under way on any rank, and no transfer; afterwards it goes on."""
    first, second = run_ranks(2, _reload, sources)
    assert first == second
    assert first["during"] == (True, True)
    assert (first["result"], first["ended"]) == ("done", "ABORTED(FROZEN)")
    assert first["session"] == ("opened", True)
    assert first["after"] == ("COMMITTED", True)


def _dump(link: RankLink, sources: Path) -> tuple[bool, bool]:
    engine = LightEngine(link, sources)
    engine.manager.start()
    engine.run_epochs(2)
    engine.routed.zero_()
    engine.run_passes(7)
    dumped = engine.recorder.dump_record(output_mode="object")["logical_count"]
    committed = outcome_names(engine.fsm.outcomes)[-1] == "COMMITTED"
    return committed, torch.equal(dumped.sum(0), engine.routed.int() * link.world_size)


def test_a_dump_of_the_recorder_holds_passes_of_one_map(sources: Path) -> None:
    """What a user dumps after a commit are the passes since, which SGLang reads by the map they were made with."""
    assert run_ranks(2, _dump, sources) == [(True, True)] * 2


def _replace_experts(link: RankLink, sources: Path) -> tuple[bool, int, list[str]]:
    from eplb_fsm.engines.sglang import plugin

    log = logging.handlers.BufferingHandler(1000)
    logging.getLogger("eplb_fsm").addHandler(log)
    engine = LightEngine(link, sources)
    engine.manager.start()
    engine.run_passes(3)
    updater = SimpleNamespace(tp_worker=SimpleNamespace(model_runner=SimpleNamespace(eplb_manager=engine.manager)))

    def end_weight_update(_: Any) -> None:
        experts: Any = engine.model.layers[1]
        experts.w2_weight = torch.nn.Parameter(experts.w2_weight.clone(), requires_grad=False)

    plugin.frozen_until("begin_weight_update")(end_weight_update, updater)
    before = engine.metadata.physical_to_logical_map.clone()
    engine.hot = 5
    engine.run_passes(60)
    moved = int((engine.metadata.physical_to_logical_map != before).sum())
    for _ in engine.manager.rebalance():  # as after a rank fault
        pass
    errors = [record.getMessage() for record in log.buffer if record.levelno >= logging.ERROR]
    return engine.manager.session.is_abandoned, moved, errors


def test_tensors_that_a_reload_has_replaced_end_rebalancing(sources: Path) -> None:
    """Where SGLang computes with other tensors after a reload, nobody moves experts any more, and serving goes on.

    Nor is the map adopted that SGLang makes after a rank fault.
    """
    for is_abandoned, num_moved, errors in run_ranks(2, _replace_experts, sources):
        assert is_abandoned
        assert num_moved == 0
        (error,) = errors
        assert "SGLang has replaced tensors of experts" in error


def _recover(link: RankLink, sources: Path) -> dict[str, Any]:
    engine = LightEngine(link, sources)
    engine.manager.start()
    engine.run_until(lambda: engine.fsm.state is State.TRANSFERRING)
    abandoned = engine.fsm
    for _ in engine.manager.rebalance():  # as SGLang drains it inside a forward pass
        pass
    recovered = engine.metadata.physical_to_logical_map[-NUM_MOE_LAYERS:].tolist()
    adopted = engine.fsm.placements[0].physical_to_logical_map.tolist()
    right = engine.slots_are_right()
    engine.run_epochs(2)
    return {
        "adopted": recovered == adopted,
        "right": (right, engine.slots_are_right()),
        "abandoned": abandoned.state.value,
        "after": outcome_names(engine.fsm.outcomes),
        "stale commits": len(abandoned.outcomes),
    }


@pytest.mark.compatibility(
    engine="SGLang", version="0.5.23", what="elastic EP: rank fault, recovery by SGLang, adopt", how="driven"
)
def test_a_rank_fault_gives_the_epoch_up_and_adopts_the_map_of_sglangs_recovery(sources: Path) -> None:
    """SGLang's own rebalance runs in the middle of an epoch; its map is read back, and further epochs start from it."""
    first, second = run_ranks(2, _recover, sources)
    assert first == second
    assert first["adopted"]
    assert first["right"] == (True, True)
    assert first["abandoned"] == "STOPPED"
    assert "COMMITTED" in first["after"]


def _elastic(link: RankLink, sources: Path) -> tuple[bool, bool, bool]:
    engine = LightEngine(link, sources, elastic_ep_backend="mooncake")
    engine.context.elastic = SimpleNamespace(
        active_ranks=torch.tensor([1, 0]), active_ranks_cpu=torch.ones(2), has_scaled=False
    )
    engine.manager.start()
    engine.run_passes(12)
    engine.manager.reset_generator()  # SGLang replaces the map of experts next
    gone = engine.manager.session.is_abandoned
    before = engine.metadata.physical_to_logical_map.tolist()
    engine.hot = 9
    engine.run_passes(30)
    return gone, before != engine.metadata.physical_to_logical_map.tolist(), engine.slots_are_right()


@pytest.mark.compatibility(
    engine="SGLang", version="0.5.23", what="elastic EP: ranks come back, SGLang's own manager goes on", how="driven"
)
def test_where_ranks_come_and_go_sglangs_own_manager_goes_on(sources: Path) -> None:
    """With a rank gone the machine is given up, and SGLang's own rebalance, which blocks, serves in its place."""
    assert run_ranks(2, _elastic, sources) == [(True, True, True)] * 2


def _start_refused(link: RankLink, sources: Path, case: str, moe: dict[str, Any], options: dict[str, str]) -> str:
    try:
        engine = LightEngine(link, sources, options, **moe)
        experts: Any = engine.model.layers[1]
        if case == "unregistered":
            experts.w13_scale = torch.nn.Parameter(torch.ones(experts.num_local_experts, 1))
        elif case == "repacked":
            packed = experts.w2_weight.clone()
            experts.run_moe_core = lambda routed: SimpleNamespace(
                hidden_states=routed.hidden_states @ experts.w13_weight[0] @ packed[0]
            )
        elif case == "one rank":
            if link.rank == 1:
                experts.w13_scale = torch.nn.Parameter(torch.ones(experts.num_local_experts, 1))
        elif case == "replaced":
            experts.w13_weight = torch.nn.Parameter(experts.w13_weight.clone())
        engine.manager.start()
    except (ConfigError, BankError, PeerFailed) as error:
        return str(error)
    return "started"


@pytest.mark.parametrize(
    ("case", "moe", "options", "reason"),
    [
        ("", {"enable_eplb": False}, {}, "start with --enable-eplb"),
        ("", {"expert_distribution_recorder_mode": "per_pass"}, {}, "--expert-distribution-recorder-mode per_pass"),
        ("", {"expert_distribution_recorder_buffer_size": -1}, {}, "keeps every pass for good"),
        ("one rank", {}, {}, "w13_scale"),
        ("", {"ep_dispatch_algorithm": "lp"}, {}, "--ep-dispatch-algorithm lp"),
        ("", {"ep_join_mode": "scale"}, {}, "--ep-join-mode"),
        ("", {"eplb_algorithm": "deepseek_vec"}, {}, "--eplb-algorithm deepseek_vec"),
        ("", {}, {"REPLICA_SPLIT": "weighted"}, "every rank has to pick the same replica"),
        ("unregistered", {}, {}, "w13_scale"),
        ("repacked", {}, {}, "gave another output after its registered tensors"),
        ("replaced", {}, {}, "are no parameters of Model"),
    ],
)
def test_what_would_not_be_moved_is_refused_at_start(
    sources: Path, case: str, moe: dict[str, Any], options: dict[str, str], reason: str
) -> None:
    """What SGLang was started with, or a tensor that would stay behind, ends the start with the reason on all ranks."""
    for message in run_ranks(2, _start_refused, sources, case, moe, options):
        assert reason in message
