"""The load that a plan is made for: what earlier windows still count beside the last one.

A short memory follows a change at once and is noisy; a long one is smooth and late. Which is better depends on the
traffic, so by default the windows decide: each memory is scored by how closely it foretold the next window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from eplb_fsm.placement.digest import Int64Array
from eplb_fsm.placement.validate import Float64Array

DECAYS = (0.0, 0.5, 0.75, 0.9)
"""What "auto" chooses from: memories of 1, 2, 4 and 10 windows."""
_WEIGHT_OF_LAST = 0.3
"""Weight of the last window in a memory's score."""
_DIGITS = 6
"""Of a score: what ranks whose processors round the last bits otherwise agree on."""


class LoadEstimator:
    """Makes an estimate of the load from one window after the other; one thread at a time, below a millisecond each.

    A memory is the sum of all windows, each counting ``decay`` times as much as the one after it. Every rank that is
    given the same windows makes the same estimate.

    Args:
        decay: From 0 (the last window alone) to below 1; "auto": the one of :data:`DECAYS` that foretold the last
            windows most closely, the smaller of equals. What is compared is the logarithm of the mean squared error of
            the experts' shares: squares, since the load of a rank is off by as much as its hottest experts are, and a
            logarithm, so that a change that nothing could foretell does not outweigh all else.

    Attributes:
        predictability: Share of the last window's load that went where the estimate before it had it go, mean over
            the layers with load in both; None before the second window.
    """

    def __init__(self, decay: float | str) -> None:
        self._decays = DECAYS if decay == "auto" else (float(decay),)
        self._memories: list[list[Float64Array]] = []
        self._scores = [0.0] * len(self._decays)
        self.predictability: float | None = None

    def update(self, windows: Sequence[Int64Array]) -> list[Int64Array]:
        """Take the newest window of each bank, int64 ``(layers, experts)``, and return the estimates, alike."""
        if self._memories:
            self._score(windows)
            self._memories = [
                [decay * old + new for old, new in zip(memory, windows, strict=True)]
                for memory, decay in zip(self._memories, self._decays, strict=True)
            ]
        else:
            self._memories = [[window.astype(np.float64) for window in windows] for _ in self._decays]
        return [np.rint(memory).astype(np.int64) for memory in self._memories[self._best]]

    @property
    def decay(self) -> float:
        """The one that the last estimate was made with."""
        return self._decays[self._best]

    @property
    def _best(self) -> int:
        """Of equals the first."""
        return max(range(len(self._scores)), key=self._scores.__getitem__)

    def _score(self, windows: Sequence[Int64Array]) -> None:
        """Compare what each memory foretold with what came."""
        shares = [_shares(memory, windows) for memory in self._memories]
        if not shares[0][0].size:
            return
        old, new = shares[self._best]
        is_first = self.predictability is None
        self.predictability = float(np.minimum(old, new).sum(axis=1).mean())
        weight = 1.0 if is_first else _WEIGHT_OF_LAST
        scores = [-_log_error(*each) for each in shares]
        self._scores = [
            round(before + weight * (now - before), _DIGITS) for before, now in zip(self._scores, scores, strict=True)
        ]


def _shares(memory: Sequence[Float64Array], windows: Sequence[Int64Array]) -> tuple[Float64Array, Float64Array]:
    """Share of each expert in its layer's load, foretold and seen; of the layers that have load in both."""
    width = max(window.shape[1] for window in windows)
    found = []
    for loads in zip(memory, windows, strict=True):
        sums = [load.sum(axis=1, keepdims=True) for load in loads]
        has_load = (sums[0] > 0)[:, 0] & (sums[1] > 0)[:, 0]
        found.append(
            [_widened(load[has_load] / total[has_load], width) for load, total in zip(loads, sums, strict=True)]
        )
    old, new = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return old, new


def _widened(rows: Float64Array, width: int) -> Float64Array:
    """Banks may have fewer experts than others; the columns that they lack hold nothing."""
    return np.pad(rows, ((0, 0), (0, width - rows.shape[1])))


def _log_error(old: Float64Array, new: Float64Array) -> float:
    """Mean over the layers of the logarithm of the root of the summed squares."""
    squares = ((old - new) ** 2).sum(axis=1)
    return 0.5 * sum(math.log(max(square, np.finfo(np.float64).tiny)) for square in squares.tolist()) / len(squares)
