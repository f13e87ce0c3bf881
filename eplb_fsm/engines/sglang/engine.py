"""SGLang as the contract sees it: where ranks meet, what moves, which tables say where, what counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.eplb.expert_distribution import get_global_expert_distribution_recorder
from sglang.srt.eplb.expert_location import get_global_expert_location_metadata
from sglang.srt.runtime_context import get_exec, get_parallel

from eplb_fsm.engines.contract import Meeting
from eplb_fsm.engines.experts import Experts, find_experts, make_probe
from eplb_fsm.engines.sglang.kernel import run_standard_slot
from eplb_fsm.engines.sglang.location import LocationTables
from eplb_fsm.engines.stores import tcp_store
from eplb_fsm.errors import BankError, ConfigError
from eplb_fsm.load.physical import PhysicalLoadRecorder
from eplb_fsm.placement.placement import Placement
from eplb_fsm.runtime.parts import EngineSide
from eplb_fsm.runtime.verify import Probe


class SGLangEngine:
    """An :class:`.EngineContract` over one of SGLang's model runners.

    Args:
        get_model: Returns the loaded model.
    """

    def __init__(self, get_model: Callable[[], torch.nn.Module]) -> None:
        self._get_model = get_model
        self._experts: Experts | None = None
        self._load: PhysicalLoadRecorder | None = None
        self._passes: CountedPasses | None = None

    def meeting(self) -> Meeting:
        """The ranks that share experts: those of one pipeline stage."""
        parallel = get_parallel()
        return Meeting(tcp_store(), parallel.moe_ep_rank, parallel.ep_size, f"eplb-sglang-{parallel.pp_rank}")

    def side(self) -> EngineSide:
        """Read everything anew from SGLang's globals."""
        metadata = get_global_expert_location_metadata()
        if metadata is None:
            raise ConfigError(
                "this model has no get_model_config_for_expert_location, so SGLang keeps no map of its experts; start "
                "without --enable-eplb"
            )
        self._experts = self._find_experts(metadata)
        bank = self._experts.bank
        rows = metadata.physical_to_logical_map.cpu().numpy()[list(bank.layer_ids)]
        placement = Placement(rows, metadata.num_logical_experts, metadata.ep_size)
        parallel = get_parallel()
        self._load = PhysicalLoadRecorder([placement], metadata.physical_to_logical_map.device)
        self.count_load()
        tables = LocationTables(
            metadata, bank.layer_ids, rank=parallel.moe_ep_rank, num_nodes=parallel.nnodes, load=self
        )
        return EngineSide(banks=[bank], placements=[placement], load_source=self._load, map_writer=tables)

    def _find_experts(self, metadata: Any) -> Experts:
        model = self._get_model()
        weights: Any = getattr(model, "routed_experts_weights_of_layer", None)
        if weights is None:
            raise BankError(
                f"{type(model).__name__} has no routed_experts_weights_of_layer, so SGLang cannot move its experts; "
                "start without --enable-eplb"
            )
        return find_experts(
            "target",
            model,
            dict(weights.items()),
            metadata.num_logical_experts,
            metadata.num_physical_experts,
            lambda name, tensor: getattr(tensor, "_sglang_require_global_experts", False),  # its own mark
        )

    def probe(self, bank: int) -> Probe | None:
        """Of the standard dispatch; kernels behind an all-to-all backend take their tokens in forms of their own."""
        if get_exec().moe.moe_a2a_backend != "none" or self._experts is None:
            return None
        return make_probe(self._experts, run_standard_slot, "hidden_size")

    def has_same_experts(self) -> bool:
        """Whether the model still computes with the tensors that were registered."""
        return self._experts is not None and self._experts.are_current()

    def count_load(self) -> None:
        """Count with SGLang's recorder, from its next pass on; again where it has made another recorder.

        Without an all-to-all backend every rank's recorder counts the tokens of all, so only the first one counts.
        """
        if self._load is None or self._experts is None:
            return
        accumulator = get_global_expert_distribution_recorder()._accumulator
        passes = accumulator._global_physical_count_of_buffered_step
        if isinstance(passes, CountedPasses):
            passes = passes.kept
        counts = get_exec().moe.moe_a2a_backend != "none" or get_parallel().moe_ep_rank == 0
        self._passes = CountedPasses(passes, self._load if counts else None, self._experts.bank.layer_ids)
        accumulator._global_physical_count_of_buffered_step = self._passes

    def remap(self, bank: int, layers: torch.Tensor, rows: torch.Tensor) -> None:
        """Tell both who count what slots hold from here on; in stream order."""
        assert self._load is not None
        self._load.remap(bank, layers, rows)
        if self._passes is not None:
            self._passes.num_since_change = 0


class CountedPasses:
    """SGLang's buffer of the counts of each pass, whose passes are counted here too.

    Args:
        kept: SGLang's own buffer, which goes on to keep them, for dumps that users ask for.
        load: Counts them; None: another rank counts the same tokens.
        layers: Rows of a pass that are MoE layers of the bank.

    Attributes:
        num_since_change: Passes since the map changed.
    """

    def __init__(self, kept: Any, load: PhysicalLoadRecorder | None, layers: tuple[int, ...]) -> None:
        self.kept = kept
        self._load = load
        self._layers = _as_slice(layers)
        self.num_since_change = len(kept.get_all())

    def append(self, value: torch.Tensor) -> None:
        """Take the counts of a pass, int32 (num_layers, num_physical_experts)."""
        if self._load is not None:
            self._load.add(0, value[self._layers])
        self.kept.append(value)
        self.num_since_change += 1

    def get_all(self) -> torch.Tensor:
        """What SGLang keeps, but zero for passes before the last change of the map: SGLang reads all by the new map."""
        passes: torch.Tensor = self.kept.get_all()
        num_passes = min(self.num_since_change, len(passes))
        newest = (self.kept._curr_index - 1 - torch.arange(num_passes)) % len(passes)
        since = torch.zeros_like(passes)
        since[newest] = passes[newest]
        return since

    def reset(self) -> None:
        """Forget the passes that SGLang keeps; a user's dump does not touch the load that plans are made from."""
        self.kept.reset()


def _as_slice(layers: tuple[int, ...]) -> slice | list[int]:
    """Layers that follow each other are a view, and copying them in every pass is saved."""
    first, last = layers[0], layers[-1]
    return slice(first, last + 1) if layers == tuple(range(first, last + 1)) else list(layers)


def is_whole() -> bool:
    """Whether all ranks of SGLang's expert-parallel group live, as far as its elastic EP knows."""
    from sglang.srt.elastic_ep.elastic_ep import ElasticEPStateManager

    state = ElasticEPStateManager.instance()
    return state is None or bool(state.active_ranks.all())
