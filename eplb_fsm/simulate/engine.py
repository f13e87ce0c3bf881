"""The engine of a simulated rank: tiny experts that say who they are, and forward passes that check it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache

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
        # The check of every pass compares bytes, which takes a fraction of the time of tensor operations.
        self._held = _contents(placement.physical_to_logical_map[:, self._mine], shape)
        self.weights, self.scales = map(torch.from_numpy, self._held)
        self._right_bytes = _right_bytes(shape, rank, num_local)
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
        used_map = table.tobytes()
        self.num_forwards += 1
        self.on_forward(pass_id, used_map)
        weights, scales = self._held
        if (weights.tobytes(), scales.tobytes()) != self._right_bytes(used_map):
            right_weights, right_scales = _contents(table[:, self._mine], self.shape)
            is_right = (weights == right_weights).all(-1) & (scales == right_scales)
            is_right |= table[:, self._mine] < 0  # an empty slot still has what was there before
            if not is_right.all():
                raise WrongForwardError(
                    f"rank {self.rank} pass {pass_id}: slots, by layer, that hold the right expert: {is_right.tolist()}"
                )


def _contents(experts: npt.NDArray[np.int64], shape: Shape) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Weights and scales of experts, which are given by layer and slot."""
    layers = np.arange(shape.num_moe_layers)[:, None]
    weights = (experts * 1_000_003 + layers * 101 + 7)[..., None] * np.arange(1, shape.num_words + 1)
    return weights, (experts + 100 * layers).astype(np.float32) + np.float32(0.5)


@cache
def _right_bytes(shape: Shape, rank: int, num_local: int) -> Callable[[bytes], tuple[bytes, bytes]]:
    """Return what a rank's slots should hold under a map, worked out once for all runs."""

    @lru_cache(1024)
    def right_bytes(used_map: bytes) -> tuple[bytes, bytes]:
        table = np.frombuffer(used_map, np.int64).reshape(shape.num_moe_layers, -1, num_local)
        weights, scales = _contents(table[:, rank], shape)
        return weights.tobytes(), scales.tobytes()

    return right_bytes
