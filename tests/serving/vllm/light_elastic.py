"""Ranks that come and go: vLLM's own elastic executor over the light engine, in memberships set up beforehand."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from tests.dist.harness import RankLink
from tests.serving.light import stand_in
from tests.serving.vllm.light_engine import NUM_LOGICAL, LightEngine, Model, MoELayer

NUM_LOCAL = 12
"""Slots of a rank, which stay as many whatever the number of ranks."""


class Group:
    """One of vLLM's groups.

    Args:
        ranks: The members; every process makes all groups, in one order.
        rank: This process.
        store: All members reach it.
    """

    def __init__(self, ranks: Sequence[int], rank: int, store: dist.Store) -> None:
        self.ranks, self.rank, self.world_size = list(ranks), rank, len(ranks)
        self.rank_in_group = self.ranks.index(rank) if rank in self.ranks else -1
        self.device_group = self.cpu_group = dist.new_group(self.ranks)
        self.tcp_store_group, self.store = self, store


class StatelessGroup(Group):
    """One that vLLM makes for elastic scaling, with a store of its own."""

    def broadcast(self, tensor: torch.Tensor, src: int) -> torch.Tensor:
        """As vLLM's."""
        dist.broadcast(tensor, src, group=self.cpu_group)
        return tensor

    def destroy(self) -> None:
        """The processes of other memberships still need theirs."""


class Membership:
    """The groups of some ranks: data and expert parallelism are the same here.

    Args:
        ranks: The members.
        rank: This process.
        store: Of all processes.
    """

    def __init__(self, ranks: Sequence[int], rank: int, store: dist.Store) -> None:
        own = dist.PrefixStore(f"membership of {len(ranks)}", store)
        self.dp = self.ep = self.world = StatelessGroup(ranks, rank, own)
        self.eplb = Group(ranks, rank, own)  # not a stateless one, over which vLLM moves experts with NCCL or NIXL only


@dataclass
class _ParallelLayout:
    ep_rank: int


@dataclass
class MoEConfig:
    """What of vLLM's configuration of a layer the executor changes."""

    num_experts: int
    num_local_experts: int
    moe_parallel_config: Any


class ElasticEngine(LightEngine):
    """A rank that is in some of the memberships, with the worker and the runner around vLLM's elastic executor.

    Args:
        link: The process.
        sources: vLLM's files.
        sizes: Number of ranks of each membership, one after the other.
        **parallel: As for :class:`LightEngine`.
    """

    def __init__(self, link: RankLink, sources: Path, sizes: Sequence[int], **parallel: Any) -> None:
        self._sizes = sizes
        self._current = next(index for index, size in enumerate(sizes) if link.rank < size)
        self.is_new = self._current > 0
        super().__init__(
            link,
            sources,
            enable_elastic_ep=True,
            elastic_ep_max_dp_size=max(sizes),
            data_parallel_size=sizes[self._current],
            data_parallel_rank=link.rank,
            tensor_parallel_size=1,
            use_sequence_parallel_moe=False,
            all2all_backend="nixl_ep",  # its kernels need no new capture
            **parallel,
        )
        from vllm.distributed.elastic_ep.elastic_execute import ElasticEPScalingExecutor

        self._worker = _Worker(self)  # which the executor holds weakly
        self.executor = ElasticEPScalingExecutor(self._worker)

    @property
    def membership(self) -> Membership:
        """The one that this rank is in."""
        return self._memberships[self._current]

    def _install(self, sources: Path, parallel: dict[str, Any]) -> Any:
        config = super()._install(sources, parallel)
        store = self.link.store()
        self._memberships = [Membership(range(size), self.link.rank, store) for size in self._sizes]
        _stand_in_groups(self)
        _stand_in_engine()
        return config

    def _make_model(self, seed: int) -> Model:
        size = self._sizes[self._current]
        model = ElasticModel(seed, self.link.rank, size, NUM_LOCAL * size - NUM_LOGICAL)
        if self.is_new:
            for parameter in model.parameters():
                parameter.fill_(torch.nan)  # what vLLM calls dummy weights
        return model

    @property
    def group(self) -> Any:
        """Where layers meet."""
        return self.membership.ep.cpu_group

    def scale(self) -> None:
        """Go over into the next membership, as vLLM's workers do between two passes."""
        before, after = self._sizes[self._current - self.is_new :][:2]
        self.executor.reconfig_request = SimpleNamespace(
            new_data_parallel_size=after,
            new_data_parallel_rank=_RankTypes.KEEP_CURRENT_RANK,
            new_data_parallel_rank_local=_RankTypes.KEEP_CURRENT_RANK,
            new_data_parallel_master_ip="127.0.0.1",
            new_data_parallel_master_port=0,
        )
        is_leaving = self.link.rank >= after
        if not self.is_new and not is_leaving:
            self.executor._wait_for_group_cleanup()
            self.executor._prepare_eplb_communicator(self._memberships[self._current + 1].eplb)
        if after > before:
            self.executor.commit_scale_up(not self.is_new)
        else:
            self.executor.commit_scale_down(after, is_leaving)
        self.is_new = False
        self.hot = 0
        self.draw.manual_seed(after)  # who has come draws what the others draw

    def switch(self, groups: Any) -> tuple[()]:
        """What vLLM calls to make other groups the active ones; without groups this rank has left."""
        self._current += groups is not None
        return ()


class ElasticModel(Model):
    """With what the executor asks a model and its layers."""

    def __init__(self, seed: int, rank: int, world_size: int, num_redundant: int) -> None:
        super().__init__(seed, rank, world_size, num_redundant)
        self.moe_layers: Any
        for layer in self.moe_layers:
            config = MoEConfig(self.num_physical_experts, NUM_LOCAL, _ParallelLayout(rank))
            layer.routed_experts.moe_config = layer.moe_config = config
            layer._set_moe_config = lambda config, layer=layer: setattr(layer.routed_experts, "moe_config", config)
            layer._quant_method = None

    def update_physical_experts_metadata(self, num_physical_experts: int, num_local_physical_experts: int) -> None:
        """As vLLM's models."""
        assert num_local_physical_experts == self.num_local_physical_experts
        self.num_physical_experts = num_physical_experts
        self.num_redundant_experts = num_physical_experts - self.num_logical_experts


class _Runner:
    """The second model runner, as the executor sees it."""

    def __init__(self, engine: ElasticEngine) -> None:
        self._engine = engine
        self.model = engine.models[0]
        self.model_config = SimpleNamespace(compute_hash=lambda: "model 0")
        self.cudagraph_manager = SimpleNamespace(release_graphs=lambda: None)

    @property
    def eplb_state(self) -> Any:
        return self._engine.state

    def get_model(self) -> Model:
        return self.model

    def setup_eplb_from_mapping(self, mapping: torch.Tensor) -> None:
        self._engine.eplb.setup_from_mapping(self.model_config, mapping)


class _Worker:
    device = torch.device("cpu")
    use_v2_model_runner = True

    def __init__(self, engine: ElasticEngine) -> None:
        self.vllm_config = engine.config
        self.model_runner = _Runner(engine)


def _stand_in_groups(engine: ElasticEngine) -> None:
    def of(name: str) -> Callable[[], Group]:
        return lambda: getattr(engine.membership, name)

    def standby(name: str) -> Callable[[], Group]:
        return lambda: getattr(engine._memberships[engine._current + 1], name)

    one: Callable[[], Any] = lambda: SimpleNamespace(world_size=1)  # noqa: E731
    parallel_state: Any = sys.modules["vllm.distributed.parallel_state"]
    groups = {f"get_{name}_group": of(name) for name in ("dp", "ep", "eplb", "world")}
    vars(parallel_state).update(
        **groups,
        _replace_active_groups=lambda *, ep, **_: engine.switch(ep),
        in_the_same_node_as=lambda group, rank: [True] * group.world_size,
    )
    distributed: Any = sys.modules["vllm.distributed"]
    vars(distributed).update(**groups, get_tp_group=one, get_pcp_group=one)
    stand_in("vllm.distributed.stateless_coordinator", StatelessGroupCoordinator=StatelessGroup)
    stand_in(
        "vllm.distributed.elastic_ep.standby_state",
        **{f"get_standby_{name}_group": standby(name) for name in ("dp", "ep", "eplb", "world")},
        create_standby_groups=None,
        pop_standby_groups=lambda: dict.fromkeys(("world", "dp", "eplb", "node_count")) | {"ep": standby("ep")()},
    )


@contextmanager
def _as_configured(config: Any) -> Iterator[None]:
    yield


def _stand_in_engine() -> None:
    """What of vLLM the executor imports beside its EPLB modules, for parts that a processor does not have."""
    manager = SimpleNamespace(commit_ep_size=lambda: None)
    vars(sys.modules["vllm.config"]).update(set_current_vllm_config=_as_configured)
    vars(sys.modules["vllm.utils"]).update(is_moe_layer=lambda module: isinstance(module, MoELayer))
    of_layers = "vllm.model_executor.layers.fused_moe"
    stand_in(f"{of_layers}.all2all_utils", get_ep_all2all_manager=lambda *args: manager)
    layouts = SimpleNamespace(make=lambda **_: _ParallelLayout(dist.get_rank()))
    stand_in(f"{of_layers}.config", FusedMoEParallelConfig=layouts)
    stand_in("vllm.v1.engine", ReconfigureDistributedRequest=object, ReconfigureRankType=_RankTypes)
    sys.modules["vllm.platforms"].current_platform.set_device = lambda device: None
    torch.accelerator.synchronize = torch.accelerator.empty_cache = lambda *args: None
    stand_in("vllm.compilation.wrapper", reset_compile_wrapper=lambda model: None)
    for module, names in _UNUSED.items():
        stand_in(module, **dict.fromkeys(names))


class _RankTypes:
    KEEP_CURRENT_RANK = -1


_UNUSED = {
    "vllm.compilation.cuda_graph": ("CUDAGraphWrapper",),
    "vllm.model_executor.layers.fused_moe.eep_reconfigure": ("make_eep_staged_quant_method",),
    "vllm.model_executor.warmup.flashinfer_autotune_cache": ("sync_flashinfer_autotune_cache",),
    "vllm.model_executor.warmup.kernel_warmup": ("kernel_warmup",),
    "vllm.v1.worker.dp_utils": ("skip_dp_coordination",),
    "vllm.v1.worker.gpu.cudagraph_utils": ("CudaGraphManager",),
    "vllm.v1.worker.gpu_ubatch_wrapper": ("UBatchWrapper",),
    "vllm.v1.worker.workspace": ("lock_workspace", "unlock_workspace"),
}
"""Not called where kernels need no new capture."""
