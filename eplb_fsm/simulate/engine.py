"""The engine of a simulated rank: tiny experts that say who they are, and forward passes that check it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
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
        self._right_bytes: dict[bytes, tuple[bytes, bytes]] = {}
        """Weights and scales under each map seen so far."""
        self.weights, self.scales = self._right_contents(placement.physical_to_logical_map)
        # Views for the check of every pass: comparing bytes takes a fraction of the time of tensor operations.
        self._held_weights, self._held_scales = self.weights.numpy(), self.scales.numpy()

    def bank(self) -> Bank:
        """Return the experts as a bank."""
        tensors = [{"weight": w, "scale": s} for w, s in zip(self.weights, self.scales, strict=True)]
        return Bank("simulated", self.shape.num_logical_experts, self.shape.num_physical_experts, tensors)

    def forward(self, pass_id: int, maps: BankMaps) -> None:
        """Note the map this pass uses and check every local slot against it; runs in stream order.

        Raises:
            WrongForwardError: Naming rank and slots.
        """
        table = maps.physical_to_logical_map.numpy()
        used_map = table.tobytes()
        self.num_forwards += 1
        self.on_forward(pass_id, used_map)
        right = self._right_bytes.get(used_map)
        if right is None:
            weights, scales = self._right_contents(table)
            right = self._right_bytes[used_map] = weights.numpy().tobytes(), scales.numpy().tobytes()
        if right != (self._held_weights.tobytes(), self._held_scales.tobytes()):
            weights, scales = self._right_contents(table)
            is_right = (weights == self.weights).all(-1) & (scales == self.scales)
            raise WrongForwardError(
                f"rank {self.rank} pass {pass_id}: slots, by layer, that hold the right expert: {is_right.tolist()}"
            )

    def _right_contents(self, table: npt.NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and scales that this rank's slots should hold under a map."""
        experts = torch.from_numpy(table[:, self._mine].copy())
        layers = torch.arange(self.shape.num_moe_layers)[:, None]
        words = torch.arange(1, self.shape.num_words + 1)
        weights = (experts * 1_000_003 + layers * 101 + 7)[..., None] * words
        return weights, (experts + 100 * layers).to(torch.float32) + 0.5
