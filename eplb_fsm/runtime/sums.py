"""What the ranks sum for a plan, in one vector of integers: the same on all ranks afterwards, to the last bit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from eplb_fsm.placement.digest import Int64Array
from eplb_fsm.placement.placement import Placement
from eplb_fsm.placement.task import Load, Speeds
from eplb_fsm.runtime.costs import Measured

_SPEED_UNITS = 1_000_000
"""Speeds travel as so many parts of 1."""


class Sums(NamedTuple):
    """What came of it.

    Attributes:
        window: Load of each bank, int64 ``(num_moe_layers, num_logical_experts)``.
        of_nodes: The same by the nodes of the ranks that had the tokens, ``(num_moe_layers, num_nodes,
            num_logical_experts)``.
        measured: Of all ranks together.
        speeds: Of each rank; empty where all are alike.
    """

    window: Sequence[Load]
    of_nodes: Sequence[Int64Array]
    measured: Measured
    speeds: Speeds


@dataclass(frozen=True, slots=True)
class SumVector:
    """The layout of the vector on one rank.

    Attributes:
        rank: This rank.
        num_ranks: All ranks.
        num_nodes: Nodes to sum the load of on its own; 1 makes the vector so many times shorter.
    """

    rank: int
    num_ranks: int
    num_nodes: int = 1

    def pack(self, snapshots: Sequence[torch.Tensor], measured: Measured, speed: float) -> torch.Tensor:
        """Return this rank's part; waits for the device that the snapshots are on.

        Args:
            snapshots: Its load of each bank, int64 ``(num_moe_layers, num_logical_experts)``.
            measured: What it knows of the cost of moving.
            speed: How fast it is.
        """
        load = torch.cat([snapshot.reshape(-1).to("cpu", torch.int64) for snapshot in snapshots])
        loads = torch.zeros((self.num_nodes, len(load)), dtype=torch.int64)
        loads[self.rank * self.num_nodes // self.num_ranks] = load
        speeds = [0] * self.num_ranks
        speeds[self.rank] = round(speed * _SPEED_UNITS)
        return torch.cat([loads.reshape(-1), torch.tensor([*measured, *speeds], dtype=torch.int64)])

    def unpack(self, total: torch.Tensor, live: Sequence[Placement]) -> Sums:
        """Return what all ranks' parts sum to; `live` says how large each bank is."""
        words: Int64Array = total.numpy()
        num_words = len(Measured._fields) + self.num_ranks
        loads = words[:-num_words].reshape(self.num_nodes, -1)
        shapes = [(placement.num_moe_layers, placement.num_logical_experts) for placement in live]
        ends = np.cumsum([math.prod(shape) for shape in shapes])[:-1]
        banks = [
            part.reshape(self.num_nodes, *shape) for part, shape in zip(np.split(loads, ends, 1), shapes, strict=True)
        ]
        measured, speeds = words[-num_words : -self.num_ranks].tolist(), words[-self.num_ranks :].tolist()
        return Sums(
            [bank.sum(axis=0) for bank in banks],
            [bank.swapaxes(0, 1) for bank in banks],
            Measured(*measured),
            _speeds(speeds),
        )


def _speeds(words: Sequence[int]) -> Speeds:
    if len(set(words)) == 1 and words[0]:
        return ()
    return tuple(word / _SPEED_UNITS for word in words)
