"""Whether it pays to move: what a lighter heaviest rank saves over a horizon, and what moving takes from the loop.

A layer of a forward pass takes as long as its heaviest rank. So of the time of a step, the share that goes to experts
is divided over the layers by the load of their heaviest ranks, and a layer whose heaviest rank gets lighter gives time
back. What an epoch takes is not guessed from hardware: the ranks measure how much longer than usual their steps were
while they moved a byte, commits included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from eplb_fsm.placement.balancedness import RankLoads, rank_loads, slowest_times
from eplb_fsm.placement.moves import BoolArray, cross_node_moves_of_layers, peer_moves_of_layers
from eplb_fsm.placement.placement import Placement
from eplb_fsm.placement.shapes import BankShape
from eplb_fsm.placement.topology import Topology
from eplb_fsm.placement.validate import Float64Array


@dataclass(frozen=True, slots=True)
class Thresholds:
    """When an epoch moves anything.

    Attributes:
        min_gain: Least gain of the mean balancedness over all layers.
        trigger_balancedness: Nothing moves while the mean balancedness over all layers is at least this; 1: no bound.
        horizon_steps: Steps over which a layer must give back more time than its bytes take; 0: it need not.
        moe_time_share: Share of a step's time that goes to the experts.
    """

    min_gain: float
    trigger_balancedness: float = 1.0
    horizon_steps: int = 0
    moe_time_share: float = 0.5


class Costs(NamedTuple):
    """What the ranks measured, as means over them, and how far predictions came true.

    Attributes:
        step_s: Seconds of a step outside of epochs.
        bytes_per_s: Bytes that all ranks together moved in a second of TRANSFERRING.
        lost_s_per_byte: Seconds that the decode loop lost for each of those bytes.
        trust: Share of the predicted gains that was measured lately, 0 to 1.
    """

    step_s: float
    bytes_per_s: float
    lost_s_per_byte: float
    trust: float


class Worth(NamedTuple):
    """What is known of each layer of all banks, one after the other: float64 ``(layers,)``.

    Attributes:
        num_bytes: Bytes that come from other ranks.
        price: What they count, `cross_node_price` times as much where they come from another node.
        saved_share: Share of the experts' time of a step that it gives back; negative if it takes more.
        saved_s: Seconds given back over the horizon, trust included.
        cost_s: Seconds that moving it takes.
        is_due: bool ``(layers,)``, whether it takes experts off a rank that is to hold none, whatever that costs.
    """

    num_bytes: Float64Array
    price: Float64Array
    saved_share: Float64Array
    saved_s: Float64Array
    cost_s: Float64Array
    is_due: BoolArray

    @property
    def pays(self) -> BoolArray:
        """Which layers give back more than they take, or have to move."""
        return np.asarray((self.saved_s > self.cost_s) | self.is_due)


def worth_of_layers(
    loads: Sequence[Float64Array],
    current: Sequence[Placement],
    targets: Sequence[Placement],
    shapes: Sequence[BankShape],
    thresholds: Thresholds,
    costs: Costs | None,
    topology: Topology,
    loads_of: RankLoads = rank_loads,
) -> Worth:
    """Weigh each layer's way from its live placement to its target.

    The time of a rank counts as its load over its speed, times the bytes of an expert, so that banks with experts of
    other sizes can be compared. The gain begins when the bytes have arrived, so the horizon is shorter by the transfer.

    Args:
        loads: Load of each bank, ``(layers, experts)``.
        current: Live placement of each bank.
        targets: Wanted placement of each bank.
        shapes: Sizes of each bank's experts.
        thresholds: Horizon, and the experts' share of a step.
        costs: None: moving takes no time, and every saving pays.
        topology: Ranks with their speeds, and nodes; the layers share what all bytes take by what theirs count.
        loads_of: How tokens are divided among replicas.
    """
    is_due = np.concatenate([topology.empties(*pair) for pair in zip(current, targets, strict=True)])
    num_bytes, price, before, after = (
        np.concatenate(parts)
        for parts in zip(
            *(_of_bank(*each, topology, loads_of) for each in zip(loads, current, targets, shapes, strict=True)),
            strict=True,
        )
    )
    saved_share = (before - after) / max(float(before.sum()), np.finfo(np.float64).tiny)
    if costs is None:
        return Worth(num_bytes, price, saved_share, saved_share, np.zeros_like(num_bytes), is_due)
    step_s = max(costs.step_s, np.finfo(np.float64).tiny)
    transfer_steps = float(num_bytes.sum()) / costs.bytes_per_s / step_s
    steps = max(0.0, thresholds.horizon_steps - transfer_steps)
    saved_s = costs.trust * steps * costs.step_s * thresholds.moe_time_share * saved_share
    cost_s = price * (costs.lost_s_per_byte * num_bytes.sum() / max(float(price.sum()), 1.0))
    return Worth(num_bytes, price, saved_share, saved_s, cost_s, is_due)


def _of_bank(
    load: Float64Array,
    current: Placement,
    target: Placement,
    shape: BankShape,
    topology: Topology,
    loads_of: RankLoads,
) -> tuple[Float64Array, Float64Array, Float64Array, Float64Array]:
    row_bytes = np.array(shape.row_bytes, dtype=np.float64)
    speeds = topology.counted_speeds
    before, after = (slowest_times(loads_of(load, placement), speeds) * row_bytes for placement in (current, target))
    moves = peer_moves_of_layers(current, target)
    crossing = cross_node_moves_of_layers(current, target, topology.num_nodes)
    price = moves + (topology.cross_node_price - 1.0) * crossing
    return moves * row_bytes, price * row_bytes, before, after
