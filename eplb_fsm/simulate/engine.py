"""The engine of a simulated rank: tiny experts that say who they are, and forward passes that check it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

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
        weights, scales = _contents(placement.physical_to_logical_map[:, self._mine].tobytes(), shape)
        self.weights, self.scales = torch.from_numpy(weights.copy()), torch.from_numpy(scales.copy())
        # Views for the check of every pass: comparing bytes takes a fraction of the time of tensor operations.
        self._held_weights, self._held_scales = self.weights.numpy(), self.scales.numpy()
        self._table: npt.NDArray[np.int64] | None = None

    def bank(self) -> Bank:
        """Return the experts as a bank."""
        tensors = [{"weight": w, "scale": s} for w, s in zip(self.weights, self.scales, strict=True)]
        return Bank("simulated", self.shape.num_logical_experts, self.shape.num_physical_experts, tensors)

    def forward(self, pass_id: int, maps: BankMaps) -> None:
        """Note the map this pass uses and check every local slot against it; runs in stream order.

        Raises:
            WrongForwardError: Naming rank and slots.
        """
        table = self._table
        if table is None:
            # The maps are written in place, so one view serves all passes; making one costs more than the rest.
            table = self._table = maps.physical_to_logical_map.numpy()
        self.num_forwards += 1
        self.on_forward(pass_id, table.tobytes())
        mine = table[:, self._mine].tobytes()
        if _content_bytes(mine, self.shape) != (self._held_weights.tobytes(), self._held_scales.tobytes()):
            weights, scales = _contents(mine, self.shape)
            is_right = (weights == self._held_weights).all(-1) & (scales == self._held_scales)
            raise WrongForwardError(
                f"rank {self.rank} pass {pass_id}: slots, by layer, that hold the right expert: {is_right.tolist()}"
            )


def _contents(experts_of_slots: bytes, shape: Shape) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Weights and scales that slots should hold under the part of the map that is theirs, layer by layer."""
    experts = np.frombuffer(experts_of_slots, np.int64).reshape(shape.num_moe_layers, -1)
    layers = np.arange(shape.num_moe_layers)[:, None]
    weights = (experts * 1_000_003 + layers * 101 + 7)[..., None] * np.arange(1, shape.num_words + 1)
    return weights, (experts + 100 * layers).astype(np.float32) + np.float32(0.5)


@lru_cache(4096)
def _content_bytes(experts_of_slots: bytes, shape: Shape) -> tuple[bytes, bytes]:
    weights, scales = _contents(experts_of_slots, shape)
    return weights.tobytes(), scales.tobytes()
