"""Which copy of an expert is read when a rank needs it: local if there is one, else one of its node, else balanced."""

from __future__ import annotations

from collections.abc import Sequence

# Expert -> rank -> first slot of that rank which holds it.
Holders = dict[int, dict[int, int]]


def holders_of(row: Sequence[int], num_local: int) -> Holders:
    """Where each expert of a layer can be read.

    Args:
        row: Expert of each slot, -1 for an empty one.
        num_local: Slots of each rank.
    """
    holders: Holders = {}
    for slot, expert in enumerate(row):
        if expert >= 0:
            holders.setdefault(expert, {}).setdefault(slot // num_local, slot)
    return holders


class SenderChoice:
    """Chooses the sending rank of every transfer of one part of a layer.

    Args:
        holders: Where the experts are before the part.
        budget: Most rows that one rank sends in the part.
        sent: Rows that each rank sends in earlier parts; breaks ties, and is counted up by `settle`.
        ranks_per_node: Neighbouring ranks between which bytes are cheaper than between others.
    """

    def __init__(self, holders: Holders, budget: int, sent: list[int], ranks_per_node: int) -> None:
        self._holders, self._budget, self._sent = holders, budget, sent
        self._ranks_per_node = ranks_per_node
        self.counts = [0] * len(sent)
        # (expert, receiving rank) -> sending rank; one transfer however many slots it is written to.
        self._sender: dict[tuple[int, int], int] = {}

    def can_bring(self, expert: int, rank: int) -> bool:
        """Whether `rank` can get the expert within the senders' budget."""
        held = self._holders[expert]
        if rank in held or (expert, rank) in self._sender:
            return True
        counts, budget = self.counts, self._budget
        return any(counts[sender] < budget for sender in held)

    def can_bring_all(self, transfers: Sequence[tuple[int, int]]) -> bool:
        """Whether all of these (expert, receiving rank) fit the senders' budget together."""
        before = self.counts
        self.counts = list(before)
        try:
            for expert, rank in transfers:
                held = self._holders[expert]
                if rank in held or (expert, rank) in self._sender:
                    continue
                sender = self._best(held, rank)
                self.counts[sender] += 1
                if self.counts[sender] > self._budget:
                    return False
            return True
        finally:
            self.counts = before

    def bring(self, expert: int, rank: int) -> None:
        """Choose the sender; the caller has asked :meth:`can_bring` or :meth:`can_bring_all`."""
        held = self._holders[expert]
        if (expert, rank) in self._sender:
            return
        if rank in held:
            self._sender[expert, rank] = rank
            return
        sender = self._best(held, rank)
        self._sender[expert, rank] = sender
        self.counts[sender] += 1

    def settle(self) -> dict[tuple[int, int], int]:
        """Even the senders out, now that all transfers are known, and return the choice.

        Returns:
            Sending rank by (expert, receiving rank); the receiver itself for a local copy.
        """
        movable = [
            (key, self._holders[key[0]])
            for key, sender in self._sender.items()
            if sender != key[1] and len(self._holders[key[0]]) > 1
        ]
        # Each change brings a transfer into its node, or lowers the sum of squares of the counts, so this ends.
        changed = bool(movable)
        while changed:
            changed = False
            for key, held in movable:
                now, best = self._sender[key], self._best(held, key[1])
                farther = self._is_far(now, key[1]) - self._is_far(best, key[1])
                is_nearer = farther > 0 and self.counts[best] < self._budget
                if is_nearer or (farther == 0 and self.counts[best] + 1 < self.counts[now]):
                    self._sender[key] = best
                    self.counts[now] -= 1
                    self.counts[best] += 1
                    changed = True
        for rank, count in enumerate(self.counts):
            self._sent[rank] += count
        return self._sender

    def _best(self, held: dict[int, int], receiver: int) -> int:
        """Within the budget, on the receiver's node if there is one, the least loaded."""
        if len(held) == 1:
            return next(iter(held))
        counts, sent, budget = self.counts, self._sent, self._budget
        return min(
            held,
            key=lambda rank: (counts[rank] >= budget, self._is_far(rank, receiver), counts[rank], sent[rank], rank),
        )

    def _is_far(self, sender: int, receiver: int) -> bool:
        return sender // self._ranks_per_node != receiver // self._ranks_per_node
