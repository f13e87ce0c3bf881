"""vLLM as the contract sees it: where ranks meet, what moves, which tables say where, what counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from vllm.distributed.parallel_state import get_ep_group, get_pp_group

from eplb_fsm.engines.contract import Meeting
from eplb_fsm.engines.experts import Experts, find_experts, make_probe
from eplb_fsm.engines.stores import tcp_store
from eplb_fsm.engines.vllm.kernel import run_slot
from eplb_fsm.load.physical import PhysicalLoadRecorder
from eplb_fsm.placement.placement import Placement
from eplb_fsm.placement.split import table_width
from eplb_fsm.runtime.maps import BankMaps, TensorMapWriter
from eplb_fsm.runtime.parts import EngineSide
from eplb_fsm.runtime.verify import Probe

_EXCLUDED = ("e_score_correction_bias", "w13_input_scale", "w2_input_scale", "hash_indices_table")
"""Parameters that vLLM's ``get_expert_weights`` leaves out."""


class VllmEngine:
    """An :class:`.EngineContract` over vLLM's EPLB states, one bank for each model (target and draft).

    Args:
        model_states: vLLM's ``EplbModelState`` of each model; the tables in it are those that layers read.
    """

    def __init__(self, model_states: Mapping[str, Any]) -> None:
        self._states = model_states
        self._experts: list[Experts] = []
        self._load: PhysicalLoadRecorder | None = None
        self._counts: list[torch.Tensor] = []
        self._takers: list[Callable[[], object]] = []

    def meeting(self) -> Meeting:
        """The expert-parallel group; with elastic scaling every membership has a store of its own."""
        group = get_ep_group()
        members = getattr(group, "tcp_store_group", None)
        store = tcp_store() if members is None else members.store
        return Meeting(store, group.rank_in_group, group.world_size, f"eplb-vllm-{get_pp_group().rank_in_group}")

    def side(self) -> EngineSide:
        """Read everything anew from vLLM's states."""
        states = list(self._states.values())
        num_ranks = get_ep_group().world_size
        placements = [
            Placement(state.physical_to_logical_map.cpu().numpy(), state.logical_replica_count.shape[1], num_ranks)
            for state in states
        ]
        self._experts = [_find_experts(state, placement) for state, placement in zip(states, placements, strict=True)]
        self._counts = [state.expert_load_pass for state in states]
        self._load = PhysicalLoadRecorder(placements, self._counts[0].device)
        self._takers = [self._load.taker(bank, counts) for bank, counts in enumerate(self._counts)]
        self.forget_pass()  # of a pass before this connection, whose slots may have held other experts
        maps = [_maps(state, placement) for state, placement in zip(states, placements, strict=True)]
        return EngineSide(
            banks=[experts.bank for experts in self._experts],
            placements=placements,
            load_source=self._load,
            map_writer=TensorMapWriter(placements, maps=maps, load=self._load),
        )

    def probe(self, bank: int) -> Probe | None:
        """Of the kernel that a layer's quantisation has chosen; None where it routes by itself."""
        experts = self._experts[bank]
        modules: Sequence[Any] = experts.modules
        if any(module.quant_method.is_monolithic for module in modules):
            return None
        return make_probe(experts, run_slot, "hidden_size")

    def count_pass(self) -> None:
        """Take what the layers have counted since; they add passes up."""
        for take in self._takers:
            take()

    def take_loads(self) -> list[torch.Tensor]:
        """Take this rank's tokens per expert, of the window last planned for and since.

        Returns:
            int64 (layers, logical experts) of each model.
        """
        assert self._load is not None
        planned = [snapshot.clone() for snapshot in self._load.snapshots]
        self._load.snapshot()
        return [before + since for before, since in zip(planned, self._load.snapshots, strict=True)]

    def forget_pass(self) -> None:
        """Drop what the layers have counted since: nobody asked for those tokens."""
        for counts in self._counts:
            counts.zero_()


def _maps(state: Any, placement: Placement) -> BankMaps:
    """VLLM's tables; of the one with 1,024 columns only those that any placement can fill."""
    width = table_width(placement, is_weighted=False)
    return BankMaps(
        state.physical_to_logical_map, state.logical_to_physical_map[:, :, :width], state.logical_replica_count
    )


def _find_experts(state: Any, placement: Placement) -> Experts:
    weights = dict(enumerate(state.model.expert_weights))
    return find_experts(
        state.model_name, state.model, weights, placement.num_logical_experts, placement.num_physical_experts, _stays
    )


def _stays(name: str, tensor: torch.Tensor) -> bool:
    """Whether a tensor is the same for every expert, as vLLM says of those that it leaves out."""
    return name.rsplit(".", 1)[-1] in _EXCLUDED and bool((tensor == tensor[:1]).all())
