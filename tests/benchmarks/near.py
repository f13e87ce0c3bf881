"""How many tokens stay on their node where ranks take the replicas of their own node first.

Each size on nodes of eight ranks, placed by DeepSeek's global method for a lognormal load, with weighted shares as
tables say them. The nodes ask for all experts alike, or each for others (their shares are drawn from a Dirichlet
distribution with parameter 1). No time is measured but that of the shares; the rest is the same on every machine.

    python -m tests.benchmarks.near
"""

from __future__ import annotations

import statistics
import time

import numpy as np
import torch

from eplb_fsm.placement import Placement
from eplb_fsm.placement.balancedness import mean_over_max
from eplb_fsm.placement.near import cross_node_share, near_shares
from eplb_fsm.placement.split import entered_shares, table_width, turn_tables, weighted_shares
from tests.benchmarks.placement.loads import SIZES, Size
from tests.benchmarks.split import drifted

_RANKS_PER_NODE = 8


def rounded(shares: np.ndarray, placement: Placement) -> np.ndarray:
    """Shares as tables say them."""
    width = table_width(placement, is_weighted=True)
    tables = turn_tables(placement, range(placement.num_moe_layers), shares, width)
    return entered_shares(tables, placement.num_physical_experts)


def measure(size: Size, demand: np.ndarray, placement: Placement) -> str:
    """Tokens that cross, without and with regard to nodes, and the balance that comes of both."""
    rows, num_nodes = placement.physical_to_logical_map, demand.shape[1]
    shares = weighted_shares(demand.sum(axis=1), placement)
    seconds = []
    near = []
    for node in range(num_nodes):
        begun = time.perf_counter()
        near.append(rounded(near_shares(shares, rows, demand, node), placement))
        seconds.append(time.perf_counter() - begun)
    found = []
    for of_nodes in (np.stack([rounded(shares, placement)] * num_nodes), np.stack(near)):
        asked = np.take_along_axis(demand, np.repeat(rows[:, None], num_nodes, axis=1), axis=2)
        carried = (of_nodes.swapaxes(0, 1) * asked).sum(axis=1)
        balance = mean_over_max(carried.reshape(len(rows), size.num_ranks, -1).sum(axis=2)).mean()
        found.append(f"{cross_node_share(of_nodes, rows, demand):.3f} cross, balance {balance:.3f}")
    return "; ".join(found) + f" ({statistics.median(seconds) * 1e3:.1f} ms a plan)"


def main() -> None:
    """Print two rows for each size that has more than one node."""
    torch.set_num_threads(1)
    print(
        "size, nodes: tokens that go to another node and balancedness, by shares alone; with replicas of the own node"
    )
    rng = np.random.default_rng(1)
    for name, size in SIZES.items():
        num_nodes = size.num_ranks // _RANKS_PER_NODE
        if num_nodes < 2:
            continue
        placement, load = drifted(size, 0.1)
        parts = rng.dirichlet([1.0] * num_nodes, load.shape).swapaxes(1, 2)
        for kind, of_nodes in (("alike", np.full_like(parts, 1 / num_nodes)), ("unlike", parts)):
            print(f"{name}, {num_nodes} {kind}: {measure(size, load[:, None] * of_nodes, placement)}", flush=True)


if __name__ == "__main__":
    main()
