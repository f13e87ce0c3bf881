"""How many moves between nodes the policy `movement_aware` saves, by `cross_node_price`.

Nodes of eight ranks, equal shares, one plan for each case from DeepSeek's placement for the window before. No time is
measured; the figures are the same on every machine.

    python -m tests.benchmarks.nodes
"""

from __future__ import annotations

import torch

from eplb_fsm.placement import Placement, Topology, get_policy
from eplb_fsm.placement.moves import num_cross_node_moves, num_peer_moves
from tests.benchmarks.placement.contestants import own
from tests.benchmarks.placement.loads import Case, cases

CASES = ("A lognormal 1.1", "A domains", "B zipf", "C heavy tail 2.4", "E lognormal 0.8")
TARGETS = (0.95, 0.99)
PRICES = (1.0, 2.0, 4.0, 9.0)
_RANKS_PER_NODE = 8


def measure(case: Case, target: float) -> list[tuple[int, int]]:
    """Moves between nodes, and all peer moves, for each price."""
    size = case.size
    num_nodes = size.num_ranks // _RANKS_PER_NODE
    first = Placement.initial(size.num_moe_layers, size.num_logical, size.num_physical, size.num_ranks)
    current = own("deepseek_global", 1.0)(case.windows[0], first)
    policy = get_policy("movement_aware", target)
    found = []
    for price in PRICES:
        planned = policy.plan(case.windows[1], current, Topology(size.num_ranks, num_nodes, 1, price))
        found.append((num_cross_node_moves(current, planned, num_nodes), num_peer_moves(current, planned)))
    return found


def main() -> None:
    """Print a row for each case and target."""
    torch.set_num_threads(1)
    print("case, target: moves between nodes of all peer moves, at prices", *(f"{price:g}" for price in PRICES))
    for case in cases(None):
        for target in TARGETS if case.name in CASES else ():
            row = "; ".join(f"{cross:,} of {peer:,}" for cross, peer in measure(case, target))
            print(f"{case.name}, {target}: {row}", flush=True)


if __name__ == "__main__":
    main()
