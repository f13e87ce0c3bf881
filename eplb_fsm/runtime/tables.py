"""What goes into the engine's tables: the placement, and with ``replica_split="weighted"`` each slot's share.

On several nodes a rank's table prefers the replicas of its own node.

Shares are each rank's own business. Any replica of an expert gives the same result, so it does no harm if one
rank splits its tokens by other shares than the next, or from another step on. So they need no round: a rank works them
out from the load that all ranks have summed for the plan, and writes them for the live placement once the plan is
there, whatever the plan is. Each commit then brings the shares for its placement.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from eplb_fsm.placement.balancedness import mean_over_max, rank_loads
from eplb_fsm.placement.digest import Int64Array
from eplb_fsm.placement.near import near_shares
from eplb_fsm.placement.placement import Placement
from eplb_fsm.placement.split import warm_up, weighted_shares
from eplb_fsm.placement.task import Load
from eplb_fsm.placement.validate import Float64Array
from eplb_fsm.runtime.maps import MapWriter


class Tables:
    """Prepares and writes the tables of all banks through the engine's map writer.

    With weighted shares construction takes seconds once, to compile what works them out.

    Args:
        writer: Writes them.
        is_weighted: Whether slots of an expert get weighted shares.
        node: This rank's node, where load is summed by nodes.
    """

    def __init__(self, writer: MapWriter, *, is_weighted: bool, node: int = 0) -> None:
        self._writer = writer
        self.is_weighted = is_weighted
        self._node = node
        self._loads: Sequence[Load] = ()
        self._speeds: Float64Array | None = None
        self._of_nodes: Sequence[Int64Array] = ()
        if is_weighted:
            warm_up()

    def follow(self, loads: Sequence[Load], speeds: Float64Array, of_nodes: Sequence[Int64Array]) -> None:
        """Split by this from here on; worker thread.

        Args:
            loads: Load of each bank.
            speeds: Of the ranks, above 0.
            of_nodes: Load of each bank by nodes.
        """
        self._loads = loads
        self._speeds = speeds
        self._of_nodes = of_nodes

    def prepare(self, bank: int, layers: Sequence[int], placement: Placement) -> object:
        """Work out what :meth:`write` copies for some layers; worker thread."""
        shares = self._shares(bank, layers, placement)
        return self._writer.prepare(bank, layers, placement, self._near(bank, layers, placement, shares, self._node))

    def prepare_shares(self, live: Sequence[Placement]) -> tuple[object, ...]:
        """Work out new shares for the live placement of each bank; worker thread. Nothing where shares are equal."""
        if not self.is_weighted:
            return ()
        return tuple(
            self.prepare(bank, range(placement.num_moe_layers), placement) for bank, placement in enumerate(live)
        )

    def balancedness(self, window_of_nodes: Sequence[Int64Array], placements: Sequence[Placement]) -> float:
        """Mean balancedness over all layers under a window, with what the last plan was made by; worker thread."""
        layers = []
        for bank, (of_nodes, placement) in enumerate(zip(window_of_nodes, placements, strict=True)):
            every_layer = range(len(of_nodes))
            shares = self._shares(bank, every_layer, placement)
            loads = sum(
                rank_loads(of_nodes[:, node], placement, self._near(bank, every_layer, placement, shares, node))
                for node in range(of_nodes.shape[1])
            )
            layers.append(mean_over_max(np.asarray(loads), self._speeds))
        return float(np.concatenate(layers).mean())

    def write(self, prepared: object) -> None:
        """Copy into the live tables; in stream order."""
        self._writer.write(prepared)

    def _shares(self, bank: int, layers: Sequence[int], placement: Placement) -> Float64Array | None:
        if not self.is_weighted or not self._loads:
            return None
        return weighted_shares(self._loads[bank], placement, layers, self._speeds)

    def _near(
        self, bank: int, layers: Sequence[int], placement: Placement, shares: Float64Array | None, node: int
    ) -> Float64Array | None:
        """Those for the tokens of one node."""
        if shares is None or self._of_nodes[bank].shape[1] == 1:
            return shares
        demand = self._of_nodes[bank][list(layers)].astype(np.float64)
        return near_shares(shares, placement.physical_to_logical_map[list(layers)], demand, node)
