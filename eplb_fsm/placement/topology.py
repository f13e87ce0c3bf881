"""The ranks that a placement is made for."""

from __future__ import annotations

from dataclasses import dataclass

from eplb_fsm.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Topology:
    """Ranks, nodes and groups of experts.

    Attributes:
        num_ranks: Ranks of the expert-parallel group.
        num_nodes: Nodes they stand on, equally many ranks on each; ranks of a node are neighbours.
        num_groups: Groups of logical experts among which the router chooses first; 1 without any.

    Raises:
        ConfigError: a number is not positive, or the ranks do not divide among the nodes.
    """

    num_ranks: int
    num_nodes: int = 1
    num_groups: int = 1

    def __post_init__(self) -> None:
        for name in ("num_ranks", "num_nodes", "num_groups"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; set it to 1 or more")
        if self.num_ranks % self.num_nodes:
            raise ConfigError(
                f"num_ranks={self.num_ranks} does not divide among num_nodes={self.num_nodes}; "
                "set num_nodes to a divisor of num_ranks (1 ignores nodes)"
            )
