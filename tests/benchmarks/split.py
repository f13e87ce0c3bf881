"""What weighted shares are worth without a move, how close they are to the best division, and how long they take.

Each size starts from DeepSeek's placement for the first window of a lognormal load, which then drifts. Balancedness
with equal shares, with weighted ones, and with weighted ones as a table says them; the heaviest rank of the first
layers beside what a linear program reaches; microseconds a layer, one thread.

    python -m tests.benchmarks.split
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import linprog

from eplb_fsm.engines.reference.machine import describe_machine
from eplb_fsm.placement import Placement, Topology, get_policy
from eplb_fsm.placement.balancedness import mean_over_max, rank_loads
from eplb_fsm.placement.split import entered_shares, table_width, turn_tables, warm_up, weighted_shares
from tests.benchmarks.placement.loads import SIZES, Size

DRIFTS = (0.1, 0.3)
_NUM_PROVEN = 8
_NUM_TIMES = 15


def lightest_heaviest_rank(
    load: np.ndarray, row: np.ndarray, num_ranks: int, speeds: np.ndarray | float = 1.0
) -> float:
    """The least load of the heaviest rank (over its speed), by a linear program over slots' amounts and that load."""
    num_slots, num_experts = len(row), len(load)
    sums = np.zeros((num_experts, num_slots + 1))
    sums[row, np.arange(num_slots)] = 1.0
    ranks = np.zeros((num_ranks, num_slots + 1))
    ranks[np.arange(num_slots) // (num_slots // num_ranks), np.arange(num_slots)] = 1.0
    ranks[:, -1] = -np.asarray(speeds)
    solved = linprog([0.0] * num_slots + [1.0], ranks, np.zeros(num_ranks), sums, load)
    assert solved.success
    return float(solved.fun)


def drifted(size: Size, drift: float, seed: int = 1) -> tuple[Placement, np.ndarray]:
    """DeepSeek's placement for some load, and the load after a drift."""
    rng = np.random.default_rng(seed)
    load = rng.lognormal(0.0, 1.2, (size.num_moe_layers, size.num_logical)) * 1000
    first = Placement.initial(size.num_moe_layers, size.num_logical, size.num_physical, size.num_ranks)
    placement = get_policy("deepseek_global").plan(load, first, Topology(size.num_ranks))
    return placement, np.round(load * rng.lognormal(0.0, drift, load.shape))


def measure(size: Size, drift: float) -> dict[str, float]:
    """All figures of one size and drift."""
    placement, load = drifted(size, drift)
    layers = range(size.num_moe_layers)
    shares = weighted_shares(load, placement)
    tables = turn_tables(placement, layers, shares, table_width(placement, is_weighted=True))
    entered = entered_shares(tables, size.num_physical)
    weighted = rank_loads(load, placement, shares)
    optima = [
        lightest_heaviest_rank(load[layer], placement.physical_to_logical_map[layer], size.num_ranks)
        for layer in range(_NUM_PROVEN)
    ]
    return {
        "drift": drift,
        "equal": float(mean_over_max(rank_loads(load, placement)).mean()),
        "weighted": float(mean_over_max(weighted).mean()),
        "in_tables": float(mean_over_max(rank_loads(load, placement, entered)).mean()),
        "worst_beside_optimum": float((np.array(optima) / weighted[:_NUM_PROVEN].max(axis=1)).min()),
        "shares_us_a_layer": _us(lambda: weighted_shares(load, placement), size),
        "tables_us_a_layer": _us(lambda: turn_tables(placement, layers, shares, tables.shape[-1]), size),
    }


def _us(call: Callable[[], object], size: Size) -> float:
    seconds = []
    for _ in range(_NUM_TIMES):
        begun = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds) * 1e6 / size.num_moe_layers


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warm_up()
    result = {name: [measure(size, drift) for drift in DRIFTS] for name, size in SIZES.items()}
    text = json.dumps({"machine": describe_machine(), "sizes": result}, indent=2)
    print(text)
    if args.json is not None:
        args.json.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
