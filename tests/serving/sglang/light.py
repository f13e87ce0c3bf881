"""SGLang's own EPLB modules in a rank's process: the recorder, the map, the planner, the mover, the manager."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from tests.serving.light import make_packages, stand_in

VERSION = "0.5.23"

_PACKAGES = (
    "sglang",
    "sglang.srt",
    "sglang.srt.elastic_ep",
    "sglang.srt.layers",
    "sglang.srt.layers.moe",
    "sglang.srt.layers.moe.token_dispatcher",
    "sglang.srt.managers",
    "sglang.srt.managers.scheduler_components",
    "sglang.srt.model_executor",
    "sglang.srt.model_executor.model_runner_components",
    "sglang.srt.observability",
    "sglang.srt.plugins",
)

MOE: dict[str, Any] = {
    "enable_eplb": True,
    "ep_num_redundant_experts": 8,
    "ep_join_mode": None,
    "elastic_ep_backend": None,
    "eplb_algorithm": "auto",
    "eplb_rebalance_num_iterations": 20,
    "eplb_rebalance_layers_per_chunk": None,
    "eplb_min_rebalancing_utilization_threshold": 1.0,
    "ep_dispatch_algorithm": "dynamic",
    "moe_a2a_backend": "none",
    "deepep_mode": "auto",
    "expert_distribution_recorder_mode": "stat",
    "expert_distribution_recorder_buffer_size": 20,
    "expert_balancedness_report_mode": "off",
}
"""What ``get_exec().moe`` holds after SGLang has resolved its arguments."""


class TopKOutput(NamedTuple):
    """As SGLang's ``StandardTopKOutput``."""

    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    router_logits: torch.Tensor


class DispatchOutput(NamedTuple):
    """As SGLang's ``StandardDispatchOutput``."""

    hidden_states: torch.Tensor
    hidden_states_scale: torch.Tensor | None
    topk_output: TopKOutput


class _Withable:
    """As SGLang's: a value for the time of a block."""

    def __init__(self) -> None:
        self.value: Any = None

    @contextlib.contextmanager
    def with_value(self, value: Any) -> Iterator[None]:
        """Have the value until the block ends."""
        assert self.value is None
        self.value = value
        try:
            yield
        finally:
            self.value = None


class _Setting:
    def __init__(self, value: Any) -> None:
        self.get = lambda: value


def install(sources: Path, rank: int, world_size: int, device: str = "cpu", **moe: Any) -> SimpleNamespace:
    """Make SGLang's EPLB modules importable on a rank; everything below ``sglang.srt.eplb`` is the wheel's own file.

    Args:
        sources: The wheel's files.
        rank: This rank.
        world_size: Number of ranks.
        device: Where the experts are.
        **moe: What differs from :data:`MOE`.

    Returns:
        What the stand-in for SGLang's runtime context holds.
    """
    make_packages(sources, _PACKAGES)
    context = SimpleNamespace(
        exec=SimpleNamespace(moe=SimpleNamespace(**{**MOE, **moe}), overlap=SimpleNamespace()),
        parallel=SimpleNamespace(
            ep_size=world_size,
            tp_size=world_size,
            tp_rank=rank,
            moe_ep_rank=rank,
            pp_rank=0,
            nnodes=1,
            elastic_ep_initial_size=None,
            ep_join_rank_offset=0,
        ),
        device=SimpleNamespace(device=device),
        resources=SimpleNamespace(expert_location_metadata=None, expert_distribution_recorder=None),
        model=SimpleNamespace(),
        platform=SimpleNamespace(is_hip=False),
        schedule=SimpleNamespace(),
        elastic=None,
    )
    _stand_in_runtime(context)
    _stand_in_engine(context)
    if not hasattr(torch.cpu, "empty_cache"):
        torch.cpu.empty_cache = lambda: None
    return context


def _stand_in_runtime(context: SimpleNamespace) -> None:
    parts = {f"get_{name}": (lambda name=name: getattr(context, name)) for name in vars(context)}
    stand_in(
        "sglang.srt.runtime_context",
        **parts,
        reports_expert_balancedness=lambda: False,
        logs_expert_balancedness_to_server_log=lambda: False,
    )
    settings = {
        "SGLANG_EPLB_P2P_BATCH_CHUNK_SIZE": 32,
        "SGLANG_LOG_EXPERT_LOCATION_METADATA": False,
        "SGLANG_AITER_MEGA_EPLB_PREFILL_ONLY": False,
        "SGLANG_AITER_MEGA_RANK_SYNC": False,
        "SGLANG_PLUGINS": "",
        "SGLANG_PLATFORM": "",
    }
    envs = SimpleNamespace(**{name: _Setting(value) for name, value in settings.items()})
    stand_in("sglang.srt.environ", envs=envs)
    stand_in(
        "sglang.srt.utils",
        Withable=_Withable,
        get_bool_env_var=lambda name, default="false": False,
        get_int_env_var=lambda name, default=0: default,
        get_device=lambda *args: context.device.device,
    )


def _stand_in_engine(context: SimpleNamespace) -> None:
    stand_in(
        "sglang.srt.layers.moe", get_moe_a2a_backend=lambda: SimpleNamespace(is_megamoe=lambda: False)
    ).__path__ = []
    stand_in("sglang.srt.layers.moe.token_dispatcher").__path__ = []
    stand_in("sglang.srt.layers.moe.token_dispatcher.standard", StandardDispatchOutput=DispatchOutput)
    stand_in("sglang.srt.layers.moe.topk", StandardTopKOutput=TopKOutput)
    stand_in(
        "sglang.srt.model_executor.forward_batch_info",
        ForwardBatch=object,
        ForwardMode=SimpleNamespace(EXTEND=1, SPLIT_PREFILL=2),
    )
    stand_in(
        "sglang.srt.observability.metrics_collector",
        STAT_LOGGER_ROLE_EXPERT_DISPATCH="",
        ExpertDispatchCollector=object,
        resolve_collector_class=lambda *args: None,
    )
    stand_in(
        "sglang.srt.elastic_ep.elastic_ep",
        ElasticEPStateManager=SimpleNamespace(instance=lambda: context.elastic),
        elastic_expanded_world_enabled=lambda: False,
    )
    stand_in("sglang.srt.model_executor.model_runner_components.moe_ep_setup", init_lplb_solvers=lambda **kwargs: None)


def stand_in_hooked() -> None:
    """Make classes that the plugin hooks into and that need a whole server."""
    runner = type("ModelRunner", (), {"is_draft_worker": False, "eplb_manager": None, "initialize": lambda self: None})
    stand_in("sglang.srt.model_executor.model_runner", ModelRunner=runner)
    names = ("update_weights_from_disk", "update_weights_from_ipc", "begin_weight_update", "end_weight_update")
    memory = ("release_memory_occupation", "resume_memory_occupation")
    updater = type("SchedulerWeightUpdaterManager", (), dict.fromkeys((*names, *memory), lambda self: None))
    stand_in("sglang.srt.managers.scheduler_components.weight_updater", SchedulerWeightUpdaterManager=updater)
