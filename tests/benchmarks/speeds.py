"""What it is worth to know that one rank is slow, or is to hold nothing, and what it takes.

One plan for each case from DeepSeek's placement for the window before, target 0.95. Balancedness by time: 1 where the
layer takes as long as if all tokens were divided among the ranks by their speeds. No time is measured; the figures are
the same on every machine.

    python -m tests.benchmarks.speeds
"""

from __future__ import annotations

import numpy as np
import torch

from eplb_fsm.placement import Placement, Topology, get_policy
from eplb_fsm.placement.balancedness import mean_over_max, rank_loads
from eplb_fsm.placement.moves import num_peer_moves
from eplb_fsm.placement.split import entered_shares, table_width, turn_tables, weighted_shares
from tests.benchmarks.placement.contestants import own
from tests.benchmarks.placement.loads import Case, cases

CASES = ("A lognormal 1.1", "A domains", "C heavy tail 2.4", "D zipf", "E lognormal 0.8")
SPEEDS = (0.5, 0.9, 0.0)
"""Of the second rank; the others have 1. At D the others have too few slots to do without it."""
_TARGET = 0.95


def balance(load: np.ndarray, placement: Placement, speeds: np.ndarray, split: str) -> float:
    """Mean balancedness by time, with weighted shares as a table says them."""
    shares = None
    if split == "weighted":
        width = table_width(placement, is_weighted=True)
        wanted = weighted_shares(load, placement, speeds=speeds)
        tables = turn_tables(placement, range(len(load)), wanted, width)
        shares = entered_shares(tables, placement.num_physical_experts)
    return float(mean_over_max(rank_loads(load, placement, shares), speeds).mean())


def measure(case: Case, speed: float) -> str:
    """Balance and moves where the speed is not known, and where it is."""
    size = case.size
    first = Placement.initial(size.num_moe_layers, size.num_logical, size.num_physical, size.num_ranks)
    current = own("deepseek_global", 1.0)(case.windows[0], first)
    load = case.windows[1]
    alike = Topology(size.num_ranks)
    known = Topology(size.num_ranks, speeds=(1.0, speed, *(1.0,) * (size.num_ranks - 2)))
    found = []
    for split, topology in (("equal", alike), ("equal", known), ("weighted", known)):
        planned = get_policy("movement_aware", _TARGET, split).plan(load, current, topology)
        moves = num_peer_moves(current, planned)
        found.append(f"{balance(load, planned, known.counted_speeds, split):.3f}, {moves:,} moves")
    return "; ".join(found)


def main() -> None:
    """Print a row for each case and speed."""
    torch.set_num_threads(1)
    print("case, speed of one rank: balancedness by time if it is not known; known; known, with weighted shares")
    for case in cases(None):
        for speed in SPEEDS if case.name in CASES else ():
            if speed == 0.0 and case.size.num_physical * (1 - 1 / case.size.num_ranks) < case.size.num_logical:
                continue
            print(f"{case.name}, {speed:g}: {measure(case, speed)}", flush=True)


if __name__ == "__main__":
    main()
