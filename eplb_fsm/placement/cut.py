"""Cutting one layer's change into parts, each of which leaves a valid placement.

A part may overwrite a slot when its expert has another copy, counting what the part itself brings. When
every slot left holds an only copy, those experts wait for each other in a cycle over ranks. Because the
slots of a rank are interchangeable, a cycle can be chosen that writes one slot of each of its ranks
and reads one: so every change can be cut for a budget of one expert per rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from eplb_fsm.errors import PlanError
from eplb_fsm.placement.moves import LayerDifference
from eplb_fsm.placement.senders import Holders, SenderChoice, holders_of

Move = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Part:
    """Moves of one layer that become visible together.

    Attributes:
        layer: MoE layer of the bank.
        moves: (destination slot, source slot, expert); source and expert are -1 for a slot to empty.
        writes: Expert rows that each rank writes.
        sends: Expert rows that each rank sends to others.
    """

    layer: int
    moves: list[Move]
    writes: list[int]
    sends: list[int]


def cut_layer(
    difference: LayerDifference,
    row: Sequence[int],
    num_logical_experts: int,
    num_local: int,
    budget: int,
    sent: list[int],
    ranks_per_node: int,
) -> list[Part]:
    """Cut the change of one layer into parts.

    Args:
        difference: What changes; its lists are used up.
        row: Live expert of each slot.
        num_logical_experts: Logical experts of the layer.
        num_local: Slots of each rank.
        budget: Most expert rows that a rank writes in a part, and most that it sends; 1 or more.
        sent: Rows that each rank sends in the parts cut so far, of all layers; breaks ties among senders
            and is counted up.
        ranks_per_node: Neighbouring ranks that prefer to send to each other.

    Returns:
        Parts in the order in which they must be committed; together they are the whole change.
    """
    cutter = _Cutter(difference, list(row), num_logical_experts, num_local, budget, sent, ranks_per_node)
    parts = []
    while any(difference.outgoing):
        parts.append(cutter.take_part())
    return parts


class _Cutter:
    """The layer while it is cut: what is left to do, and how many copies each expert has."""

    def __init__(
        self,
        difference: LayerDifference,
        row: list[int],
        num_experts: int,
        num_local: int,
        budget: int,
        sent: list[int],
        ranks_per_node: int,
    ) -> None:
        self._difference = difference
        self._outgoing, self._incoming = difference.outgoing, difference.incoming
        self._row, self._num_local, self._budget, self._sent = row, num_local, budget, sent
        self._ranks_per_node = ranks_per_node
        # One more entry, which copies[-1] reads: an empty slot may always be overwritten.
        self._copies = [0] * num_experts + [2]
        for expert in row:
            if expert >= 0:
                self._copies[expert] += 1
        self._ranks = [rank for rank, slots in enumerate(self._outgoing) if slots]

    def take_part(self) -> Part:
        """Take as many moves as the budget and a valid outcome allow, and apply them."""
        holders = holders_of(self._row, self._num_local)
        self._senders = SenderChoice(holders, self._budget, self._sent, self._ranks_per_node)
        self._writes = [0] * len(self._outgoing)
        self._taken: list[tuple[int, int]] = []
        while any(self._outgoing) and (self._take_single_moves() or self._close_cycle()):
            pass
        if not self._taken:
            raise PlanError(
                f"layer {self._difference.layer} cannot be cut: the target placement drops an expert; "
                "the policy must keep every expert at least once"
            )
        moves = self._sourced(holders)
        for slot, expert in self._taken:
            self._row[slot] = expert
        self._ranks = [rank for rank in self._ranks if self._outgoing[rank]]
        return Part(self._difference.layer, moves, self._writes, self._senders.counts)

    def _take_single_moves(self) -> bool:
        """Overwrite what has another copy; a gain may free further slots, so the caller asks again."""
        progress = False
        for rank in self._ranks:
            while (slot := self._free_slot(rank)) is not None:
                expert = self._acceptable(rank)
                if expert is None:
                    break
                self._take(rank, slot, expert)
                progress = True
        return progress

    def _free_slot(self, rank: int) -> int | None:
        copies, row = self._copies, self._row
        for slot in self._outgoing[rank]:
            if copies[row[slot]] > 1:
                return slot
        return None

    def _acceptable(self, rank: int) -> int | None:
        """The expert to bring next: the rarest, since its new copy is the likeliest to free a slot."""
        copies = self._copies
        full = self._writes[rank] >= self._budget
        best: int | None = None
        for expert in self._incoming[rank]:
            if expert < 0:
                # Emptying a slot frees nobody else's: only when nothing can be brought.
                best = expert if best is None else best
            elif (
                not full
                and (best is None or best < 0 or copies[expert] < copies[best])
                and self._senders.can_bring(expert, rank)
            ):
                best = expert
        return best

    def _take(self, rank: int, slot: int, expert: int) -> None:
        self._outgoing[rank].remove(slot)
        self._incoming[rank].remove(expert)
        old = self._row[slot]
        if old >= 0:
            self._copies[old] -= 1
        if expert >= 0:
            self._copies[expert] += 1
            self._writes[rank] += 1
            self._senders.bring(expert, rank)
        self._taken.append((slot, expert))

    def _close_cycle(self) -> bool:
        """Take a cycle of only copies, if the rest of the budget holds one."""
        open_ranks = [rank for rank in self._ranks if self._has_room(rank)]
        wanted: dict[int, int] = {}
        for rank in open_ranks:
            for expert in self._incoming[rank]:
                if expert >= 0 and self._senders.can_bring(expert, rank):
                    wanted.setdefault(expert, rank)
        for rank in open_ranks:
            cycle = self._cycle_from(rank, wanted)
            if cycle and self._senders.can_bring_all([(expert, rank) for rank, _, expert in cycle]):
                for step in cycle:
                    self._take(*step)
                return True
        return False

    def _has_room(self, rank: int) -> bool:
        return bool(self._outgoing[rank]) and self._writes[rank] < self._budget

    def _cycle_from(self, start: int, wanted: dict[int, int]) -> list[tuple[int, int, int]]:
        """Follow "my slot's expert is wanted by that rank" until a rank comes again; [] when it ends."""
        ranks, slots, arriving = [start], [-1], [-1]
        while True:
            step = next(((slot, e) for slot in self._outgoing[ranks[-1]] if (e := self._row[slot]) in wanted), None)
            if step is None:
                return []
            slots[-1], expert = step
            rank = wanted[expert]
            if rank in ranks:
                first = ranks.index(rank)
                arriving[first] = expert
                return list(zip(ranks[first:], slots[first:], arriving[first:], strict=True))
            ranks.append(rank)
            slots.append(-1)
            arriving.append(expert)

    def _sourced(self, holders: Holders) -> list[Move]:
        source = self._senders.settle()
        moves = []
        for slot, expert in self._taken:
            rank = slot // self._num_local
            moves.append((slot, holders[expert][source[expert, rank]] if expert >= 0 else -1, expert))
        moves.sort()
        return moves
