"""The frozen list of cases: model sizes, and loads that change from window to window; the same on every machine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

NUM_WINDOWS = 6
"""Windows of a case: the first one makes the placement that it starts from, the last one is only looked ahead to."""
_TOKENS = 200_000
"""Tokens of a layer in one window; each goes to one expert, so rare experts are seen by chance."""


class Size(NamedTuple):
    """A model and its ranks."""

    num_moe_layers: int
    num_logical: int
    num_physical: int
    num_ranks: int


SIZES = {
    "A": Size(58, 256, 288, 32),
    "B": Size(58, 256, 320, 64),
    "C": Size(60, 160, 192, 16),
    "D": Size(48, 128, 144, 8),
    "E": Size(61, 384, 448, 64),
}
REAL_SIZE = Size(12, 128, 144, 8)


@dataclass(frozen=True)
class Case:
    """One size under one load."""

    name: str
    size: Size
    windows: tuple[np.ndarray, ...]
    """Load of each window, float64 (layers, experts), whole numbers."""


Popularity = Iterator[np.ndarray]
"""The popularity of the experts in one window after the other, (layers, experts)."""


def _drift(rng: np.random.Generator, popularity: np.ndarray) -> Popularity:
    """A popularity that drifts by a tenth from window to window."""
    while True:
        yield popularity
        popularity = popularity * rng.lognormal(0.0, 0.1, popularity.shape)


def _zipf(rng: np.random.Generator, shape: tuple[int, int], swapped: float) -> Popularity:
    """A Zipf popularity with exponent 1 in which some experts exchange their places in each window."""
    order = np.argsort(rng.random(shape), axis=1)
    while True:
        yield 1.0 / (1.0 + order)
        for layer in order:
            some = rng.choice(shape[1], size=max(2, int(swapped * shape[1])), replace=False)
            layer[some] = layer[rng.permutation(some)]


def _domains(rng: np.random.Generator, shape: tuple[int, int], sigma: float) -> Popularity:
    """Four domains with something in common; every second window the text changes to the next one."""
    common = rng.lognormal(0.0, 0.5 * sigma, shape)
    domains = [common * rng.lognormal(0.0, sigma, shape) for _ in range(4)]
    while True:
        for domain in domains:
            yield domain
            yield domain * rng.lognormal(0.0, 0.05, shape)


LOADS: dict[str, Callable[[np.random.Generator, tuple[int, int]], Popularity]] = {
    "lognormal 0.8": lambda rng, shape: _drift(rng, rng.lognormal(0.0, 0.8, shape)),
    "lognormal 1.1": lambda rng, shape: _drift(rng, rng.lognormal(0.0, 1.1, shape)),
    "lognormal 1.4": lambda rng, shape: _drift(rng, rng.lognormal(0.0, 1.4, shape)),
    "heavy tail 1.5": lambda rng, shape: _drift(rng, 1.0 + rng.pareto(1.5, shape)),
    "heavy tail 2.4": lambda rng, shape: _drift(rng, 1.0 + rng.pareto(2.4, shape)),
    "zipf": lambda rng, shape: _zipf(rng, shape, 0.05),
    "domains": lambda rng, shape: _domains(rng, shape, 1.0),
}


def _case(name: str, size: Size, popularity: Popularity, rng: np.random.Generator) -> Case:
    windows = []
    for _ in range(NUM_WINDOWS):
        now = next(popularity)
        windows.append(rng.poisson(_TOKENS * now / now.sum(axis=1, keepdims=True)).astype(np.float64))
    return Case(name, size, tuple(windows))


def cases(real: Path | None = None) -> Iterator[Case]:
    """All cases, each made when it is asked for.

    Args:
        real: A file with real counts, ``{"counts": [[tokens of each expert] for each layer]}``: one more case.
    """
    for letter, size in SIZES.items():
        for index, (load, make) in enumerate(LOADS.items()):
            rng = np.random.default_rng([ord(letter), index])
            yield _case(f"{letter} {load}", size, make(rng, (size.num_moe_layers, size.num_logical)), rng)
    if real is not None:
        counts = np.array(json.loads(real.read_text(encoding="utf-8"))["counts"], dtype=np.float64)
        rng = np.random.default_rng(0)
        yield _case("real", REAL_SIZE, _drift(rng, 1.0 + counts), rng)
