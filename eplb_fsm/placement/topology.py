"""The ranks that a placement is made for."""

from __future__ import annotations

import math
from dataclasses import dataclass

from eplb_fsm.config import DEFAULT_CROSS_NODE_PRICE
from eplb_fsm.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Topology:
    """Ranks, nodes and groups of experts.

    Attributes:
        num_ranks: Ranks of the expert-parallel group.
        num_nodes: Nodes they stand on, equally many ranks on each; ranks of a node are neighbours.
        num_groups: Groups of logical experts among which the router chooses first; 1 without any.
        cross_node_price: What an expert that comes from another node counts, in experts that come from the same one.

    Raises:
        ConfigError: a number is not positive, a price below 1 or not finite, or the ranks do not divide among the
            nodes.
    """

    num_ranks: int
    num_nodes: int = 1
    num_groups: int = 1
    cross_node_price: float = DEFAULT_CROSS_NODE_PRICE

    def __post_init__(self) -> None:
        for name in ("num_ranks", "num_nodes", "num_groups"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; set it to 1 or more")
        if not 1.0 <= self.cross_node_price < math.inf:
            raise ConfigError(f"cross_node_price is {self.cross_node_price}; set it to 1 or more")
        if self.num_ranks % self.num_nodes:
            raise ConfigError(
                f"num_ranks={self.num_ranks} does not divide among num_nodes={self.num_nodes}; "
                "set num_nodes to a divisor of num_ranks (1 ignores nodes)"
            )

    @property
    def ranks_per_node(self) -> int:
        """Ranks of each node."""
        return self.num_ranks // self.num_nodes
