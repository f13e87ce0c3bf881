"""Which rows of a chunk a rank sends, receives and copies, in the order in which both sides count them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from eplb_fsm.placement.plan import Chunk


@dataclass(slots=True)
class Route:
    """Rows between this rank and one peer, one after the other in a staging buffer.

    Attributes:
        peer: The other rank; this rank itself for local copies.
        sources: (layer, local slot on the sending rank) of each row.
        targets: Local slots of the receiving rank that each row is written to.
        first_row: Number of its first row in the buffer.
    """

    peer: int
    sources: list[tuple[int, int]] = field(default_factory=list)
    targets: list[list[int]] = field(default_factory=list)
    first_row: int = 0

    @property
    def rows(self) -> range:
        """Its rows in the buffer."""
        return range(self.first_row, self.first_row + len(self.sources))


class Routes(NamedTuple):
    """The routes of one chunk on one rank, peers in ascending order."""

    sends: list[Route]
    receives: list[Route]
    local: Route
    """Its rows lie behind those of all receives."""


def find_routes(chunk: Chunk, rank: int, num_local: int) -> Routes:
    """Sort the moves of a chunk into the routes of one rank with ``num_local`` physical experts in each layer.

    An expert that goes to two slots of a rank travels once: both sides see the same moves in the same order.
    """
    sends: dict[int, Route] = {}
    receives: dict[int, Route] = {}
    local = Route(rank)
    rows: dict[tuple[int, int, int], int] = {}
    for layer, dst, src, _ in chunk.moves.tolist():
        dst_rank, src_rank = dst // num_local, src // num_local
        if rank not in (dst_rank, src_rank):
            continue
        if dst_rank == src_rank:
            local.sources.append((layer, src % num_local))
            local.targets.append([dst % num_local])
            continue
        routes, peer = (sends, dst_rank) if src_rank == rank else (receives, src_rank)
        route = routes.setdefault(peer, Route(peer))
        row = rows.setdefault((peer, layer, src), len(route.sources))
        if row == len(route.sources):
            route.sources.append((layer, src % num_local))
            route.targets.append([])
        route.targets[row].append(dst % num_local)
    _lay_out(sends)
    local.first_row = _lay_out(receives)
    return Routes([sends[peer] for peer in sorted(sends)], [receives[peer] for peer in sorted(receives)], local)


def _lay_out(routes: dict[int, Route]) -> int:
    """Give each route its rows of the buffer; return the number of the first free row."""
    row = 0
    for peer in sorted(routes):
        routes[peer].first_row = row
        row += len(routes[peer].sources)
    return row
