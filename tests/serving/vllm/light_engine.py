"""One rank of small MoE models over vLLM's own EPLB modules, driven through the V2 runner's controller."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from tests.dist.harness import RankLink
from tests.serving.driving import OPTIONS, Driven
from tests.serving.sglang.light_engine import expert
from tests.serving.vllm import light

NUM_LAYERS, NUM_LOGICAL, NUM_REDUNDANT, TOP_K, HIDDEN, NUM_TOKENS = 3, 16, 8, 2, 8, 24


class RoutedExperts(nn.Module):
    """The local experts of one layer, with what vLLM's class of that name shows of itself."""

    def __init__(self, weights: Sequence[torch.Tensor], rank: int, held: torch.Tensor) -> None:
        super().__init__()
        self.hidden_size = HIDDEN
        self.local_num_experts = len(held)
        self.moe_config = SimpleNamespace(moe_parallel_config=SimpleNamespace(ep_rank=rank))
        self.quant_method = SimpleNamespace(is_monolithic=False)
        self.w13_weight = nn.Parameter(weights[0][held].clone(), requires_grad=False)
        self.w2_weight = nn.Parameter(weights[1][held].clone(), requires_grad=False)

    def forward_modular(self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        """Compute what the local slots add to each token."""
        output = torch.zeros_like(x)
        first = self.moe_config.moe_parallel_config.ep_rank * self.local_num_experts
        for slot in range(self.local_num_experts):
            token, place = (topk_ids == first + slot).nonzero(as_tuple=True)
            result = expert(x[token], self.w13_weight[slot], self.w2_weight[slot])
            output.index_add_(0, token, result * topk_weights[token, place, None])
        return output


class MoELayer(nn.Module):
    """Routes, and holds the views on the state's tables that a router holds."""

    def __init__(self, experts: RoutedExperts) -> None:
        super().__init__()
        self.routed_experts = experts
        self.eplb_state: Any = None

    def get_expert_weights(self) -> list[torch.Tensor]:
        """As vLLM's."""
        return [parameter.view(len(parameter), -1) for parameter in self.routed_experts.parameters()]


class Model(nn.Module):
    """A model of MoE layers only, as vLLM's ``MixtureOfExperts`` protocol describes it."""

    def __init__(self, seed: int, rank: int, world_size: int, num_redundant: int = NUM_REDUNDANT) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        shapes = ((NUM_LOGICAL, HIDDEN, 2 * HIDDEN), (NUM_LOGICAL, 2 * HIDDEN, HIDDEN))
        self.whole = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(NUM_LAYERS)]
        self.num_moe_layers = NUM_LAYERS
        self.num_logical_experts = self.num_routed_experts = NUM_LOGICAL
        self.num_redundant_experts = num_redundant
        self.num_physical_experts = NUM_LOGICAL + num_redundant
        self.num_local_physical_experts = self.num_physical_experts // world_size
        self.num_expert_groups = 1
        held = torch.arange(self.num_physical_experts)[rank * self.num_local_physical_experts :] % NUM_LOGICAL
        held = held[: self.num_local_physical_experts]
        self.moe_layers = nn.ModuleList(MoELayer(RoutedExperts(weights, rank, held)) for weights in self.whole)
        self.expert_weights: list[list[torch.Tensor]] = []

    def to(self, device: str) -> Model:  # type: ignore[override]
        """Move what is compared with along with the experts."""
        self.whole = [[weight.to(device) for weight in weights] for weights in self.whole]
        return super().to(device)

    def set_eplb_state(self, load: torch.Tensor, slots: torch.Tensor, counts: torch.Tensor) -> None:
        """As vLLM's: each layer gets its views."""
        self.expert_weights = [layer.get_expert_weights() for layer in self.moe_layers]
        for index, layer in enumerate(self.moe_layers):
            layer.eplb_state = _layer_state(load[index], slots[index], counts[index])


def _layer_state(load: torch.Tensor, slots: torch.Tensor, counts: torch.Tensor) -> Any:
    from vllm.distributed.eplb.eplb_state import EplbLayerState

    state = EplbLayerState()
    state.expert_load_view, state.logical_to_physical_map, state.logical_replica_count = load, slots, counts
    return state


class LightEngine(Driven):
    """What vLLM's second model runner does around its EPLB controller; with a draft model if there are two.

    Attributes:
        is_new: This rank is about to join others that serve.

    Args:
        link: The rank.
        sources: vLLM's files.
        options: Variables ``EPLB_FSM_...`` for this rank, without their prefix.
        stock: Use vLLM's own state.
        device: Where the models are.
        num_models: 2: a target and a draft model.
        **parallel: vLLM's parallel configuration.
    """

    is_new = False

    def __init__(
        self,
        link: RankLink,
        sources: Path,
        options: dict[str, str] | None = None,
        *,
        stock: bool = False,
        device: str = "cpu",
        num_models: int = 1,
        **parallel: Any,
    ) -> None:
        for name, value in {**OPTIONS, **(options or {})}.items():
            os.environ[f"EPLB_FSM_{name}"] = value
        self.link = link
        self.device = device
        self.config = self._install(sources, parallel)
        from vllm.v1.worker.gpu import eplb_utils

        if not stock:
            from eplb_fsm.engines.vllm.state import BackgroundEplbStateV2

            eplb_utils.EplbState = BackgroundEplbStateV2
        self.draw = torch.Generator().manual_seed(7)
        self.num_routed = 0
        self.num_experts = NUM_LOGICAL
        self.models = [self._make_model(seed) for seed in range(num_models)]
        self.eplb = eplb_utils.EPLBController(self.config.parallel_config, torch.device(device))
        runner = type("Runner", (), {"eplb": self.eplb, "pass_": lambda _, **kwargs: self._forward(**kwargs)})
        self._runner = runner()
        self._real = eplb_utils.step_eplb_after()(runner.pass_)
        self._dummy = eplb_utils.step_eplb_after(is_dummy=True)(runner.pass_)
        self.stock = stock

    def _install(self, sources: Path, parallel: dict[str, Any]) -> Any:
        rank, world_size = self.link.rank, self.link.world_size
        return light.install(sources, self.link.store(), rank, world_size, device=self.device, **parallel)

    def _make_model(self, seed: int) -> Model:
        return Model(seed, self.link.rank, self.link.world_size).to(self.device)

    @property
    def group(self) -> Any:
        """Where layers meet."""
        return dist.group.WORLD

    def load(self) -> None:
        """Register the models, the draft first as the V2 runner does, and start what rebalances."""
        self.eplb.prepare_load()
        if self.stock:
            self.eplb.state.device_index = 0  # where vLLM's own worker asserts an accelerator
        for index, model in reversed(list(enumerate(self.models))):
            name = f"model {index}"
            model_config = SimpleNamespace(model=name, compute_hash=lambda name=name: name)
            assert self.eplb.maybe_register_model(model, model_config)
        self.eplb.maybe_start_async_loop(True, load_dummy_weights=self.is_new)

    @property
    def state(self) -> Any:
        """What stands for vLLM's ``EplbState``."""
        return self.eplb.state

    @property
    def fsm(self) -> Any:
        """The machine under the state."""
        return self.state.session.fsm

    @torch.inference_mode()
    def forward(self, *, is_dummy: bool = False, is_profile: bool = False) -> None:
        """A pass and its step, through vLLM's own decorator."""
        if is_dummy or is_profile:
            self._dummy(self._runner, is_profile=is_profile)
        else:
            self._real(self._runner)

    def _forward(self, **kwargs: Any) -> None:
        self.num_passes += 1
        for model in self.models:
            for layer in range(NUM_LAYERS):
                self._forward_layer(model, layer)

    def _forward_layer(self, model: Model, layer: int) -> None:
        skew = torch.ones(NUM_LOGICAL).index_fill_(0, torch.tensor([self.hot, self.hot + 1]), 8.0)
        logical = torch.multinomial(skew.expand(NUM_TOKENS, -1), TOP_K, generator=self.draw).to(self.device)
        hidden = torch.randn(NUM_TOKENS, HIDDEN, generator=self.draw).to(self.device)
        share = torch.rand(NUM_TOKENS, TOP_K, generator=self.draw).to(self.device)
        module = model.moe_layers[layer]
        physical = self._route(module.eplb_state, logical)
        self.num_routed += physical.numel()
        output = module.routed_experts.forward_modular(hidden, share, physical)
        dist.all_reduce(output, group=self.group)
        w13, w2 = model.whole[layer]
        wanted = sum(
            torch.stack([expert(hidden[t], w13[e], w2[e]) for t, e in enumerate(logical[:, k])]) * share[:, k, None]
            for k in range(TOP_K)
        )
        torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-4)

    @staticmethod
    def _route(state: Any, logical: torch.Tensor) -> torch.Tensor:
        """Take a replica of each expert, the same on every rank, and count it."""
        row = torch.arange(len(logical), device=logical.device)[:, None]
        replica = row % state.logical_replica_count[logical]
        physical = state.logical_to_physical_map[logical, replica]
        if state.should_record_tensor:
            counted = functional.one_hot(physical.flatten(), len(state.expert_load_view)).sum(0)
            state.expert_load_view.add_(counted.to(state.expert_load_view.dtype))
        return physical

    def slots_are_right(self) -> bool:
        """Whether every local slot holds, to the bit, the expert that vLLM's map names."""
        states = list(self.state.model_states.values())[::-1]
        return all(
            torch.equal(parameter, model.whole[layer][index][self._held(state, layer)])
            for model, state in zip(self.models, states, strict=True)
            for layer in range(NUM_LAYERS)
            for index, parameter in enumerate(model.moe_layers[layer].routed_experts.parameters())
        )

    def _held(self, state: Any, layer: int) -> torch.Tensor:
        num_local = self.models[0].num_local_physical_experts
        held: torch.Tensor = state.physical_to_logical_map[layer, self.link.rank * num_local :][:num_local]
        return held
