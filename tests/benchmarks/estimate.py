"""How the balance of the next window depends on what a plan is made from: windows of few or many tokens, and memory.

Each case is planned window by window by the default policy, from the estimate of one memory or of the one that chooses
by itself. Figures: balancedness of the next window, which nobody has seen, and peer moves of all epochs. No time is
measured; the figures are the same on every machine.

    python -m tests.benchmarks.estimate             # a table for the docs
    python -m tests.benchmarks.estimate --json FILE
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from eplb_fsm.placement import Placement, Topology, balancedness, get_policy
from eplb_fsm.placement.digest import Int64Array
from eplb_fsm.placement.estimate import DECAYS, LoadEstimator
from eplb_fsm.placement.moves import num_peer_moves
from tests.benchmarks.placement.loads import LOADS, Popularity, Size

SIZE = Size(20, 128, 144, 16)
NUM_WINDOWS = 24
NUM_WARM_UP = 3
"""Windows in which a memory is still short, and whose next balance does not count."""
TOKENS = (2_000, 20_000, 200_000)
"""Of each layer in a window: what makes a window long."""


class Outcome(NamedTuple):
    """One memory in one case."""

    balance_next: float
    moves: int
    predictability: float


def _still(rng: np.random.Generator, shape: tuple[int, int]) -> Popularity:
    """A popularity that never changes."""
    return itertools.repeat(rng.lognormal(0.0, 1.1, shape))


CASES = {**LOADS, "unchanging": _still}


def make_windows(load: str, tokens: int) -> list[Int64Array]:
    """The windows of a case; the same on every machine."""
    rng = np.random.default_rng(7)
    popularity = CASES[load](rng, (SIZE.num_moe_layers, SIZE.num_logical))
    windows = []
    for now in itertools.islice(popularity, NUM_WINDOWS):
        windows.append(rng.poisson(tokens * now / now.sum(axis=1, keepdims=True)).astype(np.int64))
    return windows


def follow(windows: Sequence[Int64Array], decay: float | str) -> Outcome:
    """Plan for each window but the last, and look ahead to the one after it."""
    policy, estimator = get_policy("movement_aware", 0.95), LoadEstimator(decay)
    current = Placement.initial(*SIZE)
    ahead, moves, predictable = [], 0, []
    for window, following in itertools.pairwise(windows):
        (estimate,) = estimator.update([window])
        target = policy.plan(estimate, current, Topology(SIZE.num_ranks))
        moves += num_peer_moves(current, target)
        current = target
        ahead.append(float(balancedness(following, current).mean()))
        predictable.append(estimator.predictability)
    known = [value for value in predictable if value is not None]
    return Outcome(statistics.fmean(ahead[NUM_WARM_UP:]), moves, statistics.fmean(known))


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for every figure")
    args = parser.parse_args()
    memories: list[float | str] = [*DECAYS, "auto"]
    print("| tokens | load | predictability |", *(f"{memory} |" for memory in memories))
    print("| ---: | --- | ---: |" + " ---: |" * len(memories))
    everything: dict[str, dict[str, Outcome]] = {}
    for tokens, load in itertools.product(TOKENS, CASES):
        windows = make_windows(load, tokens)
        found = {str(memory): follow(windows, memory) for memory in memories}
        everything[f"{load}, {tokens}"] = found
        cells = (f"{it.balance_next:.3f}, {it.moves:,} |" for it in found.values())
        print(f"| {tokens:,} | {load} | {found['0.0'].predictability:.2f} |", *cells, flush=True)
    worst = max(
        max(found[str(decay)].balance_next for decay in DECAYS) - found["auto"].balance_next
        for found in everything.values()
    )
    print(f"\nauto is at most {worst:.4f} below the best memory of each case.")
    if args.json:
        named = {case: {name: it._asdict() for name, it in found.items()} for case, found in everything.items()}
        args.json.write_text(json.dumps(named, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
