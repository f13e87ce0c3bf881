"""The engine of a simulated rank: tiny experts that say who they are, and forward passes that check it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from eplb_fsm.placement.placement import Placement
from eplb_fsm.runtime.bank import Bank
from eplb_fsm.runtime.maps import BankMaps


@dataclass(frozen=True, slots=True)
class Shape:
    """Size of the simulated model.

    Attributes:
        num_words: int64 words of one expert's weight; its scale is one float more.
    """

    num_moe_layers: int = 2
    num_logical_experts: int = 8
    num_physical_experts: int = 12
    num_words: int = 3


class WrongForwardError(AssertionError):
    """A forward pass saw a slot that does not hold what the map says (``LiveEqualsMap``)."""


class SimulatedEngine:
    """One rank's weights and forward passes.

    Args:
        rank: The rank.
        shape: Size of the model.
        placement: What its slots hold at first.

    Attributes:
        num_forwards: Forward passes executed.
        on_forward: Told of each executed pass: its number, and the map that it used as bytes.
    """

    def __init__(self, rank: int, shape: Shape, placement: Placement) -> None:
        self.rank = rank
        self.shape = shape
        self.num_forwards = 0
        self.on_forward: Callable[[int, bytes], None] = lambda pass_id, used_map: None
        num_local = placement.num_local_physical_experts
        self._mine = slice(rank * num_local, (rank + 1) * num_local)
        self._first_expert = torch.arange(shape.num_moe_layers)[:, None] * shape.num_logical_experts
        all_experts = torch.arange(shape.num_logical_experts)
        layers = range(shape.num_moe_layers)
        self._right_weights = torch.cat([self._weight_of(layer, all_experts) for layer in layers])
        self._right_scales = torch.cat([self._scale_of(layer, all_experts) for layer in layers])
        held = self._wanted(torch.from_numpy(placement.physical_to_logical_map.copy()))
        self.weights = self._right_weights[held].view(shape.num_moe_layers, num_local, -1)
        self.scales = self._right_scales[held].view(shape.num_moe_layers, num_local)

    def bank(self) -> Bank:
        """Return the experts as a bank."""
        tensors = [{"weight": w, "scale": s} for w, s in zip(self.weights, self.scales, strict=True)]
        return Bank("simulated", self.shape.num_logical_experts, self.shape.num_physical_experts, tensors)

    def forward(self, pass_id: int, maps: BankMaps) -> None:
        """Note the map this pass uses and check every local slot against it; runs in stream order.

        Raises:
            WrongForwardError: Naming rank and slots.
        """
        table = maps.physical_to_logical_map
        self.num_forwards += 1
        self.on_forward(pass_id, table.numpy().tobytes())
        wanted = self._wanted(table)
        weights = self._right_weights.index_select(0, wanted).view_as(self.weights)
        scales = self._right_scales.index_select(0, wanted).view_as(self.scales)
        if not (torch.equal(weights, self.weights) and torch.equal(scales, self.scales)):
            right = (weights == self.weights).all(-1) & (scales == self.scales)
            raise WrongForwardError(
                f"rank {self.rank} pass {pass_id}: slots, by layer, that hold the right expert: {right.tolist()}"
            )

    def _wanted(self, table: torch.Tensor) -> torch.Tensor:
        """Rows of the right contents that this rank's slots should hold, all layers one after the other."""
        return (table[:, self._mine] + self._first_expert).reshape(-1)

    def _weight_of(self, layer: int, experts: torch.Tensor) -> torch.Tensor:
        words = torch.arange(1, self.shape.num_words + 1)
        return (experts[:, None] * 1_000_003 + layer * 101 + 7) * words

    def _scale_of(self, layer: int, experts: torch.Tensor) -> torch.Tensor:
        return (experts + 100 * layer).to(torch.float32) + 0.5
