"""One rank of a small MoE model over SGLang's own EPLB modules, driven as SGLang's model runner drives them."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from tests.dist.harness import RankLink
from tests.serving.driving import OPTIONS, Driven
from tests.serving.sglang import light

NUM_LAYERS, NUM_MOE_LAYERS, NUM_LOGICAL, NUM_REDUNDANT, TOP_K, HIDDEN, NUM_TOKENS = 4, 3, 16, 8, 2, 8, 24
"""The first layer has no experts, as in DeepSeek's models."""
_SHAPES = ((NUM_LOGICAL, HIDDEN, 2 * HIDDEN), (NUM_LOGICAL, 2 * HIDDEN, HIDDEN))


class Experts(nn.Module):
    """The local experts of one layer; what SGLang calls ``FusedMoE``."""

    def __init__(self, weights: list[torch.Tensor], held: torch.Tensor) -> None:
        super().__init__()
        self.hidden_size = HIDDEN
        self.num_local_experts = len(held)
        self.w13_weight = nn.Parameter(weights[0][held].clone(), requires_grad=False)
        self.w2_weight = nn.Parameter(weights[1][held].clone(), requires_grad=False)

    def run_moe_core(self, dispatch_output: Any) -> SimpleNamespace:
        """Compute what the local slots add to each token; ids of slots, -1 for those of other ranks."""
        hidden, routed = dispatch_output.hidden_states, dispatch_output.topk_output
        output = torch.zeros_like(hidden)
        for slot in range(self.num_local_experts):
            token, place = (routed.topk_ids == slot).nonzero(as_tuple=True)
            result = expert(hidden[token], self.w13_weight[slot], self.w2_weight[slot])
            output.index_add_(0, token, result * routed.topk_weights[token, place, None])
        return SimpleNamespace(hidden_states=output)


def expert(hidden: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
    """One expert's output."""
    return functional.silu(hidden @ w13) @ w2


class Model(nn.Module):
    """Three MoE layers behind one without experts."""

    def __init__(self, weights: dict[int, list[torch.Tensor]], map_of_rank: torch.Tensor) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            Experts(weights[layer], map_of_rank[layer]) if layer in weights else nn.Identity()
            for layer in range(NUM_LAYERS)
        )
        self.routed_experts_weights_of_layer = {
            layer: [parameter.data for parameter in self.layers[layer].parameters()] for layer in weights
        }


class LightEngine(Driven):
    """What SGLang's model runner does around its EPLB manager.

    Args:
        link: The rank.
        sources: SGLang's files.
        options: Variables ``EPLB_FSM_...`` for this rank, without their prefix.
        stock: Use SGLang's own manager.
        device: Where the model is.
        **moe: SGLang's arguments of MoE layers.
    """

    def __init__(
        self,
        link: RankLink,
        sources: Path,
        options: dict[str, str] | None = None,
        *,
        stock: bool = False,
        device: str = "cpu",
        **moe: Any,
    ) -> None:
        for name, value in {**OPTIONS, **(options or {})}.items():
            os.environ[f"EPLB_FSM_{name}"] = value
        self.link = link
        self.device = device
        moe = {"ep_num_redundant_experts": NUM_REDUNDANT, **moe}
        self.context = light.install(sources, link.rank, link.world_size, device, **moe)
        dist.init_process_group("gloo", store=link.store(), rank=link.rank, world_size=link.world_size)
        self._import_engine()
        self.draw = torch.Generator().manual_seed(7)  # without an all-to-all every rank has the same tokens
        self.weights = {
            layer: [torch.randn(shape).to(device) for shape in _SHAPES]
            for layer in range(NUM_LAYERS - NUM_MOE_LAYERS, NUM_LAYERS)
            if torch.manual_seed(layer)
        }
        self.metadata = self.location.ExpertLocationMetadata.init_trivial(None, link.rank)
        self.location.set_global_expert_location_metadata(self.metadata)
        self.recorder = self.distribution.ExpertDistributionRecorder.init_new(self.metadata, link.rank)
        self.distribution.set_global_expert_distribution_recorder(self.recorder)
        self.num_routed = 0
        self.routed = torch.zeros(NUM_LAYERS, NUM_LOGICAL, dtype=torch.int64)
        self.num_experts = NUM_LOGICAL
        self.manager = self._make_manager(stock)
        num_local = self.metadata.num_local_physical_experts
        own = slice(link.rank * num_local, (link.rank + 1) * num_local)
        self.model = Model(self.weights, self.metadata.physical_to_logical_map[:, own])

    def _import_engine(self) -> None:
        from sglang.srt.eplb import expert_distribution, expert_location, expert_location_dispatch
        from sglang.srt.eplb.expert_location_updater import ExpertLocationUpdater

        self.distribution, self.location, self.dispatch = expert_distribution, expert_location, expert_location_dispatch
        self.updater = ExpertLocationUpdater()
        described = expert_location.ModelConfigForExpertLocation(NUM_LAYERS, NUM_LOGICAL, None)
        expert_location.ModelConfigForExpertLocation.from_model_config = staticmethod(lambda config: described)

    def _make_manager(self, stock: bool) -> Any:
        from sglang.srt.eplb.eplb_manager import EPLBManager

        kind = EPLBManager
        if not stock:
            from eplb_fsm.engines.sglang.controller import BackgroundEPLBManager

            kind = BackgroundEPLBManager
        return kind(
            model_config=None,
            get_model=lambda: self.model,
            get_expert_location_updater=lambda: self.updater,
            get_expert_backup_client=lambda: None,
            get_weight_updater=lambda: SimpleNamespace(update_weights_from_disk=None),
        )

    @property
    def fsm(self) -> Any:
        """The machine under the manager."""
        return self.manager.session.fsm

    def forward(self) -> None:
        """A pass as SGLang makes it: every token's result is compared with that of the experts it asked for."""
        self.num_passes += 1
        with self.recorder.with_forward_pass(self.num_passes, None):
            for layer in self.weights:
                with self.recorder.with_current_layer(layer):
                    self._forward_layer(layer)
        self.manager.on_forward_pass_end()

    def _forward_layer(self, layer: int) -> None:
        skew = torch.ones(NUM_LOGICAL).index_fill_(0, torch.tensor([self.hot, self.hot + 1]), 8.0)
        logical = torch.multinomial(skew.expand(NUM_TOKENS, -1), TOP_K, generator=self.draw).to(self.device)
        hidden = torch.randn(NUM_TOKENS, HIDDEN, generator=self.draw).to(self.device)
        share = torch.rand(NUM_TOKENS, TOP_K, generator=self.draw).to(self.device)
        physical = self.dispatch.topk_ids_logical_to_physical(
            logical, self.dispatch.ExpertLocationDispatchInfo.init_new(layer)
        )
        self.recorder.on_select_experts(physical)
        self.routed[layer] += torch.bincount(logical.flatten().cpu(), minlength=NUM_LOGICAL)
        self.num_routed += physical.numel()
        experts = self.model.layers[layer]
        local = physical - self.link.rank * experts.num_local_experts
        is_own = (local >= 0) & (local < experts.num_local_experts)
        routed = light.TopKOutput(share, torch.where(is_own, local, -1), logical)
        output = experts.run_moe_core(light.DispatchOutput(hidden, None, routed)).hidden_states
        dist.all_reduce(output)
        w13, w2 = self.weights[layer]
        wanted = sum(
            torch.stack([expert(hidden[t], w13[e], w2[e]) for t, e in enumerate(logical[:, k])]) * share[:, k, None]
            for k in range(TOP_K)
        )
        torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-4)

    def slots_are_right(self) -> bool:
        """Whether every local slot holds, to the bit, the expert that SGLang's map names."""
        num_local = self.metadata.num_local_physical_experts
        metadata = self.location.get_global_expert_location_metadata()
        held = metadata.physical_to_logical_map[:, self.link.rank * num_local :][:, :num_local]
        return all(
            torch.equal(parameter, self.weights[layer][index][held[layer]])
            for layer in self.weights
            for index, parameter in enumerate(self.model.layers[layer].parameters())
        )
