"""vLLM's own EPLB modules in a rank's process: the state, the mover, the communicator, the V2 runner's controller."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.distributed as dist

from tests.serving.light import make_packages, stand_in

VERSION = "0.32.0"

_PACKAGES = (
    "vllm",
    "vllm.config",
    "vllm.distributed",
    "vllm.distributed.device_communicators",
    "vllm.distributed.elastic_ep",
    "vllm.model_executor",
    "vllm.model_executor.layers",
    "vllm.model_executor.layers.fused_moe",
    "vllm.model_executor.layers.fused_moe.router",
    "vllm.model_executor.models",
    "vllm.models",
    "vllm.models.deepseek_v4",
    "vllm.models.deepseek_v4.common",
    "vllm.utils",
    "vllm.v1",
    "vllm.v1.worker",
    "vllm.v1.worker.gpu",
)


class _Logger(logging.LoggerAdapter):  # type: ignore[type-arg]
    """With the methods that vLLM's loggers have beside the standard ones."""

    info_once = logging.LoggerAdapter.info
    warning_once = logging.LoggerAdapter.warning


class _Event:
    """What `torch.Event` is on a device; a processor has none."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._at = 0.0

    def record(self, *args: Any) -> None:
        """Take the time."""
        self._at = time.perf_counter()

    def wait(self, *args: Any) -> None:
        """What was enqueued has run."""

    synchronize = wait

    def query(self) -> bool:
        """It has happened."""
        return True

    def elapsed_time(self, other: _Event) -> float:
        """Milliseconds."""
        return (other._at - self._at) * 1e3


def eplb_config(**changed: Any) -> SimpleNamespace:
    """What vLLM's ``EPLBConfig`` holds."""
    defaults = {
        "window_size": 20,
        "step_interval": 20,
        "num_redundant_experts": 8,
        "log_balancedness": False,
        "log_balancedness_interval": 1,
        "use_async": True,
        "policy": "default",
        "communicator": "torch_gloo",
        "enable_migration_batching": False,
        "migration_batching_enabled": False,
    }
    return SimpleNamespace(**{**defaults, **changed})


def install(
    sources: Path,
    store: dist.Store,
    rank: int,
    world_size: int,
    *,
    device: str = "cpu",
    runner_type: str = "generate",
    **parallel: Any,
) -> SimpleNamespace:
    """Make vLLM's EPLB modules importable on a rank; what is below ``vllm.distributed.eplb`` is the wheel's own.

    Args:
        sources: The wheel's files.
        store: Of the engine's process group, which is made here.
        rank: This rank.
        world_size: Number of ranks.
        device: Where the experts are.
        runner_type: Of the model: "generate" or "pooling".
        **parallel: What differs in vLLM's ``ParallelConfig``.

    Returns:
        What stands for vLLM's configuration.
    """
    make_packages(sources, _PACKAGES)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    defaults = {
        "enable_eplb": True,
        "enable_elastic_ep": False,
        "data_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "num_ubatches": 0,
        "eplb_config": eplb_config(),
    }
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(**{**defaults, **parallel}),
        model_config=SimpleNamespace(model="model", runner_type=runner_type, compute_hash=lambda: "model"),
    )
    _stand_in_config(config)
    _stand_in_groups(rank, world_size)
    _stand_in_platform()
    if device == "cpu":
        _stand_in_streams()
    return config


def _stand_in_config(config: SimpleNamespace) -> None:
    stand_in("vllm.config.utils", compute_hash_cached=lambda model_config: model_config.compute_hash())
    stand_in("vllm.config.parallel", EPLBPolicyOption=Literal["default"])
    contents = {"ModelConfig": object, "ParallelConfig": object, "get_current_vllm_config": lambda: config}
    vars(sys.modules["vllm.config"]).update(contents)
    stand_in("vllm.logger", init_logger=lambda name: _Logger(logging.getLogger(name), {}))
    stand_in(
        "vllm.model_executor.models.interfaces",
        MixtureOfExperts=object,
        get_mixture_of_experts_model=lambda model: model,
    )
    stand_in("vllm.models.deepseek_v4.common.eplb_util", dspark_draft_supports_eplb=lambda config: True)


def _stand_in_groups(rank: int, world_size: int) -> None:
    group = SimpleNamespace(
        rank_in_group=rank,
        rank=rank,
        world_size=world_size,
        device_group=dist.group.WORLD,
        cpu_group=dist.new_group(backend="gloo"),
        ranks=list(range(world_size)),
    )
    own = SimpleNamespace(**{**vars(group), "device_group": dist.new_group(backend="gloo"), "cpu_group": None})
    own.cpu_group = own.device_group
    first: Callable[[], Any] = lambda: SimpleNamespace(rank_in_group=0, world_size=1)  # noqa: E731
    stand_in(
        "vllm.distributed.parallel_state",
        GroupCoordinator=object,
        get_ep_group=lambda: group,
        get_eplb_group=lambda: own,
        get_pp_group=first,
        get_node_count=lambda: 1,
        in_the_same_node_as=None,
        is_local_first_rank=lambda: rank == 0,
    )
    stand_in("vllm.distributed.stateless_coordinator", StatelessGroupCoordinator=type("StatelessGroup", (), {}))
    stand_in("vllm.distributed.utils", StatelessProcessGroup=object, is_weak_contiguous=lambda tensor: True)
    stand_in("vllm.distributed.nixl_utils", NixlWrapper=None)
    stand_in("vllm.distributed.device_communicators.pynccl", PyNcclCommunicator=object)
    stand_in("vllm.distributed.device_communicators.pynccl_wrapper", ncclDataTypeEnum=object)


def _stand_in_platform() -> None:
    platform = SimpleNamespace(is_rocm=lambda: False, is_cuda=lambda: False, is_xpu=lambda: False)
    stand_in("vllm.platforms", current_platform=platform)
    stand_in("vllm.utils.gpu_sync_debug", gpu_sync_allowed=contextlib.nullcontext)
    stand_in("vllm.utils.torch_utils", PIN_MEMORY=False)


def _stand_in_streams() -> None:
    stream = torch.Stream(device="cpu")
    torch.Event = _Event
    torch.accelerator.current_stream = lambda *args: stream
    torch.accelerator.set_stream = lambda *args: None
    torch.accelerator.set_device_index = lambda *args: None


def stand_in_workers() -> None:
    """Make classes that the plugin guards and that need a whole engine."""
    stand_in("vllm.v1.worker.worker_base", WorkerBase=type("WorkerBase", (), {"__init__": lambda self, *args: None}))
    runner = type("GPUModelRunner", (), {"reload_weights": lambda self: "reloaded"})
    stand_in("vllm.v1.worker.gpu_model_runner", GPUModelRunner=runner)
