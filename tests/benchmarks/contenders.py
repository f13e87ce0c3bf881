"""Who rebalances in :mod:`tests.benchmarks.serving`: vLLM's and SGLang's own code, and this library in their seams."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from tests.serving.light import SOURCES
from tests.serving.sglang import light as sglang
from tests.serving.vllm import light as vllm

OPTIONS = {"IDLE_ROUND_INTERVAL": "16", "MIN_GAIN": "0", "HORIZON_STEPS": "0", "MAX_SLOWDOWN": "0"}
NEVER = 10**9
"""Passes between two rebalances: the benchmark asks for each."""


class Shape(NamedTuple):
    """A model: layers, experts and slots of each, and an expert's weights."""

    num_layers: int
    num_logical: int
    num_physical: int
    expert_shape: tuple[int, int, int]


class Contender(Protocol):
    """What the benchmark drives, on every rank alike."""

    def start(self) -> None:
        """Connect."""

    def draw_load(self, epoch: int) -> None:
        """Take another load from here on."""

    def count_pass(self) -> None:
        """Count the tokens of a pass, as the layers do."""

    def step(self) -> None:
        """What the engine calls after a pass."""

    def trigger(self) -> None:
        """Have the next step begin a rebalance."""

    def is_over(self) -> bool:
        """Whether the rebalance has ended, on all ranks alike."""

    def map_rows(self) -> np.ndarray:
        """The physical-to-logical map."""

    def slots_are_right(self) -> bool:
        """Whether local slots hold what the map says."""

    def record(self, is_recording: bool) -> None:
        """Have passes be part of the window of a plan, or not."""

    def close(self) -> None:
        """Release what was connected."""


class _Model(nn.Module):
    """Experts that know their number, as both engines want to see them."""

    def __init__(self, rank: int, num_ranks: int, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.num_local = shape.num_physical // num_ranks
        self.first = rank * self.num_local
        count, *size = shape.expert_shape
        self.layers = nn.ModuleList()
        for layer in range(shape.num_layers):
            experts = nn.Module()
            for index in range(count):
                weight = torch.empty(self.num_local, *size)
                for slot in range(self.num_local):
                    weight[slot] = self._mark(layer, (self.first + slot) % shape.num_logical, index)
                experts.register_parameter(f"w{index}", nn.Parameter(weight, requires_grad=False))
            self.layers.append(experts)
        self.num_moe_layers, self.num_expert_groups = shape.num_layers, 1
        self.num_logical_experts = self.num_routed_experts = shape.num_logical
        self.num_physical_experts, self.num_local_physical_experts = shape.num_physical, self.num_local
        self.num_redundant_experts = shape.num_physical - shape.num_logical

    def _mark(self, layer: int, expert: int, index: int) -> float:
        return layer * 1000 + expert + index / 4

    def holds(self, rows: np.ndarray) -> bool:
        """Whether every local slot holds the expert of the map."""
        return all(
            bool((weight[slot] == self._mark(layer, int(rows[layer, self.first + slot]), index)).all())
            for layer, experts in enumerate(self.layers)
            for index, weight in enumerate(experts.parameters())
            for slot in range(self.num_local)
        )

    @property
    def weights(self) -> dict[int, list[torch.Tensor]]:
        """By layer."""
        return {layer: [p.data for p in experts.parameters()] for layer, experts in enumerate(self.layers)}


class _Base:
    def __init__(self, rank: int, num_ranks: int, store: dist.Store, shape: Shape) -> None:
        for name, value in OPTIONS.items():
            os.environ[f"EPLB_FSM_{name}"] = value
        self.rank, self.num_ranks, self.store, self.shape = rank, num_ranks, store, shape
        self.load = np.ones((shape.num_layers, shape.num_logical))
        self.model = _Model(rank, num_ranks, shape)

    def draw_load(self, epoch: int) -> None:
        """A law of Zipf, over experts in another order in each layer and epoch."""
        random = np.random.default_rng(epoch)
        law = 1000 / np.arange(1, self.shape.num_logical + 1) ** 1.1
        self.load = np.stack([law[random.permutation(len(law))] for _ in range(self.shape.num_layers)])
        self._physical: torch.Tensor | None = None

    def physical_load(self) -> torch.Tensor:
        """Tokens per slot of a pass, by the map that holds now."""
        rows = self.map_rows()
        counts = np.stack([np.bincount(row, minlength=self.shape.num_logical) for row in rows])
        each = self.load / counts
        return torch.from_numpy(np.take_along_axis(each, rows, axis=1).astype(np.int32))

    def map_rows(self) -> np.ndarray:
        """The map."""
        raise NotImplementedError

    def record(self, is_recording: bool) -> None:
        """SGLang's recorder counts in every pass, outside its step."""

    def slots_are_right(self) -> bool:
        """Compare the local slots with the map."""
        return self.model.holds(self.map_rows())

    def close(self) -> None:
        """Nothing to release."""


class _InVllm(_Base):
    """What both contenders in vLLM's seam share."""

    interval = NEVER

    def __init__(self, rank: int, num_ranks: int, store: dist.Store, shape: Shape) -> None:
        super().__init__(rank, num_ranks, store, shape)
        eplb = vllm.eplb_config(
            step_interval=self.interval, window_size=20, num_redundant_experts=shape.num_physical - shape.num_logical
        )
        config = vllm.install(
            SOURCES / f"vllm-{vllm.VERSION}", dist.PrefixStore("engine", store), rank, num_ranks, eplb_config=eplb
        )
        self.model.set_eplb_state = self._set_eplb_state  # type: ignore[assignment]
        self.state = self._make_state(config.parallel_config)
        self.step = self.state.step

    def _set_eplb_state(self, *tables: torch.Tensor) -> None:
        self.model.expert_weights = [  # type: ignore[assignment]
            [tensor.view(len(tensor), -1) for tensor in tensors] for tensors in self.model.weights.values()
        ]
        self.model.moe_layers = ()  # type: ignore[assignment]

    def _make_state(self, parallel_config: Any) -> Any:
        raise NotImplementedError

    def start(self) -> None:
        """As the model runners do."""
        self.state.add_model(self.model, SimpleNamespace(model="model", compute_hash=lambda: "model"))
        (self.own,) = self.state.model_states.values()
        self.state.start_async_loop()

    def count_pass(self) -> None:
        """Into the tensor of the layers' views."""
        self.own.expert_load_pass.add_(self.physical_load())

    def map_rows(self) -> np.ndarray:
        """VLLM's."""
        rows: np.ndarray = self.own.physical_to_logical_map.numpy().copy()
        return rows


class VllmAsync(_InVllm):
    """vLLM's own asynchronous EPLB."""

    def _make_state(self, parallel_config: Any) -> Any:
        from vllm.distributed.eplb.eplb_state import EplbState

        state = EplbState(parallel_config, torch.device("cpu"))
        state.device_index = 0  # where its worker asserts an accelerator
        return state

    def record(self, is_recording: bool) -> None:
        """Far from a rearrangement it does not, by itself."""
        self.state._should_record_current_step = lambda log_stats: is_recording

    def trigger(self) -> None:
        """Its counter reaches the interval in the next step."""
        self.state.expert_rearrangement_step = NEVER

    def is_over(self) -> bool:
        """Its last layer is live."""
        return not self.own.rebalanced


class OursInVllm(_InVllm):
    """This library in vLLM's seam."""

    interval = 0

    def _make_state(self, parallel_config: Any) -> Any:
        from eplb_fsm.engines.vllm.state import BackgroundEplbStateV2

        return BackgroundEplbStateV2(parallel_config, torch.device("cpu"))

    def start(self) -> None:
        """There is no kernel to try the experts out with."""
        self.state._engine.probe = lambda bank: None
        super().start()

    def record(self, is_recording: bool) -> None:
        """Far from an epoch it does not, by itself."""
        self.state.session.fsm._window_lead = 0 if is_recording else NEVER

    def trigger(self) -> None:
        """Ask for an epoch."""
        self.num_ended = len(self.state.session.fsm.outcomes)
        self.state.session.fsm.request_rebalance()

    def is_over(self) -> bool:
        """The epoch has ended."""
        return len(self.state.session.fsm.outcomes) > self.num_ended

    def close(self) -> None:
        """End threads and groups."""
        self.state.session.close()


class _InSglang(_Base):
    """What both contenders in SGLang's seam share."""

    def __init__(self, rank: int, num_ranks: int, store: dist.Store, shape: Shape) -> None:
        super().__init__(rank, num_ranks, store, shape)
        sglang.install(
            SOURCES / f"sglang-{sglang.VERSION}",
            rank,
            num_ranks,
            ep_num_redundant_experts=shape.num_physical - shape.num_logical,
            eplb_rebalance_num_iterations=NEVER,
        )
        dist.init_process_group("gloo", store=dist.PrefixStore("engine", store), rank=rank, world_size=num_ranks)
        from sglang.srt.eplb import expert_distribution, expert_location
        from sglang.srt.eplb.expert_location_updater import ExpertLocationUpdater

        described = expert_location.ModelConfigForExpertLocation(shape.num_layers, shape.num_logical, None)
        expert_location.ModelConfigForExpertLocation.from_model_config = staticmethod(lambda config: described)
        self.metadata = expert_location.ExpertLocationMetadata.init_trivial(None, rank)
        expert_location.set_global_expert_location_metadata(self.metadata)
        self.recorder = expert_distribution.ExpertDistributionRecorder.init_new(self.metadata, rank)
        expert_distribution.set_global_expert_distribution_recorder(self.recorder)
        self.model.routed_experts_weights_of_layer = self.model.weights  # type: ignore[assignment]
        updater = ExpertLocationUpdater()
        self.manager = self._manager()(
            model_config=None,
            get_model=lambda: self.model,
            get_expert_location_updater=lambda: updater,
            get_expert_backup_client=lambda: None,
            get_weight_updater=lambda: SimpleNamespace(update_weights_from_disk=None),
        )
        self.step = self.manager.on_forward_pass_end

    def _manager(self) -> Any:
        raise NotImplementedError

    def start(self) -> None:
        """Nothing to connect."""

    def count_pass(self) -> None:
        """Through SGLang's recorder."""
        with self.recorder.with_forward_pass(0, None):
            self.recorder._single_pass_gatherers["primary"]._data.add_(self.physical_load())

    def map_rows(self) -> np.ndarray:
        """SGLang's."""
        rows: np.ndarray = self.metadata.physical_to_logical_map.numpy().copy()
        return rows


class Sglang(_InSglang):
    """SGLang's own rebalance, which blocks."""

    def _manager(self) -> Any:
        from sglang.srt.eplb.eplb_manager import EPLBManager

        return EPLBManager

    def trigger(self) -> None:
        """The next pass ends with the rebalance, all of it in one call."""

        def rebalance() -> Any:
            yield from self.manager.rebalance()
            while True:
                yield

        self.manager._main_generator = rebalance()

    def is_over(self) -> bool:
        """It blocks until then."""
        return True


class OursInSglang(_InSglang):
    """This library in SGLang's seam."""

    def _manager(self) -> Any:
        from eplb_fsm.engines.sglang.controller import BackgroundEPLBManager

        return BackgroundEPLBManager

    def start(self) -> None:
        """There is no kernel to try the experts out with."""
        self.manager._engine.probe = lambda bank: None
        self.manager.start()

    def trigger(self) -> None:
        """Ask for an epoch."""
        self.num_ended = len(self.manager.session.fsm.outcomes)
        self.manager.session.fsm.request_rebalance()

    def is_over(self) -> bool:
        """The epoch has ended."""
        return len(self.manager.session.fsm.outcomes) > self.num_ended

    def close(self) -> None:
        """End threads and groups."""
        self.manager.session.close()


CONTENDERS: dict[str, Callable[..., Any]] = {
    "vllm_async": VllmAsync,
    "ours_in_vllm": OursInVllm,
    "sglang": Sglang,
    "ours_in_sglang": OursInSglang,
}
