"""What a decode loop recorded, step by step, and what of it is compared between runs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Timeline:
    """The record of one rank's run; arrays have one row per step, of which `steps` are filled. Picklable.

    Attributes:
        steps: Steps made.
        itl_ns: From the end of the step before to the end of this one, int64; 0 for the first step.
        rebalance_ns: Wall time inside the rebalancer's `step()`, int64.
        rebalance_cpu_ns: CPU time of the decode thread inside it, int64.
        live_tokens: Tokens of this rank, int32; 0 for a dummy pass.
        rank_rows: Rows that each rank computed, int32 `(steps, num_moe_layers, num_ranks)`: the true load.
        tokens: Generated tokens by slot, int16 `(steps, slots)`; -1 where none was generated.
        logits_digests: sha256 of this rank's raw logits of each step.
        states: The rebalancer's state after each step; empty without one.
    """

    itl_ns: np.ndarray
    rebalance_ns: np.ndarray
    rebalance_cpu_ns: np.ndarray
    live_tokens: np.ndarray
    rank_rows: np.ndarray
    tokens: np.ndarray
    logits_digests: list[bytes] = field(default_factory=list)
    states: list[str] = field(default_factory=list)
    steps: int = 0

    @classmethod
    def empty(cls, most_steps: int, num_moe_layers: int, num_ranks: int, slots: int) -> Timeline:
        """Returns a timeline with room for `most_steps` steps, allocated once."""
        return cls(
            itl_ns=np.zeros(most_steps, dtype=np.int64),
            rebalance_ns=np.zeros(most_steps, dtype=np.int64),
            rebalance_cpu_ns=np.zeros(most_steps, dtype=np.int64),
            live_tokens=np.zeros(most_steps, dtype=np.int32),
            rank_rows=np.zeros((most_steps, num_moe_layers, num_ranks), dtype=np.int32),
            tokens=np.full((most_steps, slots), -1, dtype=np.int16),
        )

    def balancedness(self, first: int, last: int) -> np.ndarray:
        """Returns mean/max of the rank loads over the steps `first` to `last - 1`, float64 `(layers,)`."""
        rows = self.rank_rows[first : min(last, self.steps)].sum(0, dtype=np.int64)
        most = rows.max(1)
        return np.where(most > 0, rows.mean(1) / np.maximum(most, 1), 1.0)

    @property
    def tokens_digest(self) -> bytes:
        """sha256 of all generated tokens."""
        return hashlib.sha256(self.tokens[: self.steps].tobytes()).digest()


def logits_sha256(timelines: Sequence[Timeline]) -> str:
    """Returns one digest of the raw logits of every step of all ranks, in order of rank and step."""
    whole = hashlib.sha256()
    for timeline in timelines:
        whole.update(b"".join(timeline.logits_digests))
    return whole.hexdigest()


def tokens_sha256(timelines: Sequence[Timeline]) -> str:
    """Returns one digest of the generated tokens of all ranks, in order of rank and step."""
    return hashlib.sha256(b"".join(timeline.tokens_digest for timeline in timelines)).hexdigest()


def first_difference(one: Sequence[Timeline], other: Sequence[Timeline]) -> int | None:
    """Returns the first step at which the raw logits of two runs differ on any rank, or None."""
    different = [
        step
        for a, b in zip(one, other, strict=True)
        for step, pair in enumerate(zip(a.logits_digests, b.logits_digests, strict=False))
        if pair[0] != pair[1]
    ]
    if different:
        return min(different)
    lengths = {len(timeline.logits_digests) for timeline in (*one, *other)}
    return None if len(lengths) <= 1 else min(lengths)
