"""The ranks that a placement is made for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from eplb_fsm.config import DEFAULT_CROSS_NODE_PRICE, MAX_CROSS_NODE_PRICE
from eplb_fsm.errors import ConfigError
from eplb_fsm.placement.moves import BoolArray
from eplb_fsm.placement.placement import Placement
from eplb_fsm.placement.validate import EMPTY, Float64Array

FASTEST = 100.0
"""Highest speed of a rank."""
SLOWEST = 0.01
"""Lowest speed of a rank that is to hold experts."""
_STANDING = 1e-6
"""What a rank of speed 0 counts for, as long as it holds experts, beside the fastest one."""


def check_speed(speed: float) -> float:
    """Return the speed of a rank.

    Raises:
        ConfigError: neither 0 nor from :data:`SLOWEST` to :data:`FASTEST`.
    """
    if not (speed == 0.0 or SLOWEST <= speed <= FASTEST):
        raise ConfigError(
            f"the speed of a rank is {speed}; set it to 0 (it is to hold no expert) or from {SLOWEST:g} to {FASTEST:g}"
        )
    return speed


@dataclass(frozen=True, slots=True)
class Topology:
    """Ranks, nodes and groups of experts.

    Attributes:
        num_ranks: Ranks of the expert-parallel group.
        num_nodes: Nodes they stand on, equally many ranks on each; ranks of a node are neighbours.
        num_groups: Groups of logical experts among which the router chooses first; 1 without any.
        cross_node_price: What an expert that comes from another node counts, in experts that come from the same one.
        speeds: Tokens that each rank works off in the time in which others work off one; 0: it is to hold no expert.
            Empty: all ranks are alike.

    Raises:
        ConfigError: a number is not positive, a price below 1 or not finite, the ranks do not divide among the
            nodes, or the speeds are not one for each rank, are out of their range, or all 0.
    """

    num_ranks: int
    num_nodes: int = 1
    num_groups: int = 1
    cross_node_price: float = DEFAULT_CROSS_NODE_PRICE
    speeds: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("num_ranks", "num_nodes", "num_groups"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; set it to 1 or more")
        if not 1.0 <= self.cross_node_price <= MAX_CROSS_NODE_PRICE:
            raise ConfigError(
                f"cross_node_price is {self.cross_node_price}; set it to 1 or more, at most {MAX_CROSS_NODE_PRICE}"
            )
        if self.num_ranks % self.num_nodes:
            raise ConfigError(
                f"num_ranks={self.num_ranks} does not divide among num_nodes={self.num_nodes}; "
                "set num_nodes to a divisor of num_ranks (1 ignores nodes)"
            )
        if self.speeds and len(self.speeds) != self.num_ranks:
            raise ConfigError(f"{len(self.speeds)} speeds for {self.num_ranks} ranks; give one for each, or none")
        for speed in self.speeds:
            check_speed(speed)
        if self.speeds and not any(self.speeds):
            raise ConfigError("all speeds are 0; leave a rank that holds experts")

    @property
    def ranks_per_node(self) -> int:
        """Ranks of each node."""
        return self.num_ranks // self.num_nodes

    @property
    def has_speeds(self) -> bool:
        """Whether ranks are unequally fast."""
        return len(set(self.speeds)) > 1

    @property
    def may_hold(self) -> BoolArray:
        """Which ranks may hold experts, ``(num_ranks,)``."""
        return np.array([speed > 0.0 for speed in self.speeds] or [True] * self.num_ranks)

    def held_in_vain(self, placement: Placement) -> BoolArray:
        """In which layers a rank that is to hold no expert holds one, ``(num_moe_layers,)``."""
        ranks = placement.physical_to_logical_map.reshape(placement.num_moe_layers, self.num_ranks, -1)
        return np.asarray((ranks[:, ~self.may_hold] != EMPTY).any(axis=(1, 2)))

    def empties(self, current: Placement, target: Placement) -> BoolArray:
        """In which layers the way to a target empties such a rank, ``(num_moe_layers,)``."""
        return self.held_in_vain(current) & ~self.held_in_vain(target)

    @property
    def counted_speeds(self) -> Float64Array:
        """Speeds to divide loads by, ``(num_ranks,)`` float64, 1 for the fastest; a rank of speed 0 is very slow."""
        speeds: Float64Array = np.array(self.speeds or (1.0,) * self.num_ranks)
        return np.asarray(np.maximum(speeds / speeds.max(), _STANDING))
