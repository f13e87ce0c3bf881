"""The reference engine as the contract sees it: its tables are the library's, and the library counts its tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from eplb_fsm.engines.contract import Meeting
from eplb_fsm.engines.reference.model import ParallelModel
from eplb_fsm.engines.reference.ranks import RankContext
from eplb_fsm.observe.events import Observer
from eplb_fsm.runtime.bank import Bank
from eplb_fsm.runtime.failstop import raise_error
from eplb_fsm.runtime.parts import EngineSide
from eplb_fsm.runtime.verify import Probe

_NUM_PROBED = 16


class ReferenceEngine:
    """An :class:`.EngineContract` over one rank of the reference engine.

    Args:
        context: This rank.
        model: Its share of the model.
        name: Of the run; runs share a store.
        observers: Take every event.
    """

    def __init__(self, context: RankContext, model: ParallelModel, name: str, observers: Sequence[Observer]) -> None:
        self._context = context
        self._model = model
        self._name = name
        self._observers = observers

    def meeting(self) -> Meeting:
        """All ranks of the run."""
        context = self._context
        return Meeting(context.store, context.rank, context.world_size, f"eplb-{self._name}")

    def side(self) -> EngineSide:
        """The experts of all layers; an exception ends a rank of this engine."""
        placement = self._model.placement
        bank = Bank("model", placement.num_logical_experts, placement.num_physical_experts, self._model.expert_tensors)
        return EngineSide(banks=[bank], placements=[placement], observers=self._observers, fail_stop=raise_error)

    def probe(self, bank: int) -> Probe | None:
        """The products of a forward pass."""

        def probe(layer: int, local_slot: int) -> torch.Tensor:
            experts = self._model.experts[layer]
            hidden = torch.randn(_NUM_PROBED, experts.hidden, generator=torch.Generator().manual_seed(layer))
            return experts.run_slot(hidden, local_slot)

        return probe
