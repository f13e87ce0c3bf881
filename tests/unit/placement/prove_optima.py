"""Proves the optima of `optima.json` with OR-tools' CP-SAT, and writes them; takes minutes.

pip install 'ortools>=9.12'
python tests/unit/placement/prove_optima.py
"""

from __future__ import annotations

import json
from itertools import pairwise
from math import lcm
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("optima.json")


def lightest_heaviest_rank(load: list[int], num_physical: int, num_ranks: int) -> float:
    """The least load of the heaviest rank, over all placements without two replicas of an expert on a rank.

    Raises:
        ArithmeticError: It was not proven within two minutes.
    """
    from ortools.sat.python import cp_model

    model = cp_model.CpModel()
    most = min(num_ranks, num_physical - len(load) + 1)
    counts, ranks = range(1, most + 1), range(num_ranks)
    scale = lcm(*counts)  # shares are integers
    heaviest = model.new_int_var(-(-sum(load) * scale // num_ranks), sum(load) * scale, "heaviest")
    carried: list[list[Any]] = [[] for _ in ranks]
    held: list[list[Any]] = [[] for _ in ranks]
    for expert, tokens in enumerate(load):
        has = [model.new_bool_var(f"{expert} has {count}") for count in counts]
        model.add_exactly_one(has)
        on = [[model.new_bool_var(f"{expert} on {rank}, one of {count}") for count in counts] for rank in ranks]
        for index, count in enumerate(counts):
            model.add(sum(on[rank][index] for rank in ranks) == count * has[index])
            for rank in ranks:
                carried[rank].append(tokens * scale // count * on[rank][index])
        for rank in ranks:
            held[rank] += on[rank]
        if tokens == max(load):  # ranks are alike: the first ones have it
            for first, second in pairwise(on):
                model.add(sum(first) >= sum(second))
    for rank in ranks:
        model.add(sum(held[rank]) <= num_physical // num_ranks)
        model.add(sum(carried[rank]) <= heaviest)
    model.minimize(heaviest)
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = 120
    if solver.solve(model) != cp_model.OPTIMAL:
        raise ArithmeticError(f"not proven: {load}")
    return float(solver.objective_value / scale)


def main() -> None:
    """Prove all of them anew."""
    instances = json.loads(FILE.read_text(encoding="utf-8"))
    for instance in instances:
        instance["optimum"] = lightest_heaviest_rank(instance["load"], instance["num_physical"], instance["num_ranks"])
    FILE.write_text("[\n" + ",\n".join(map(json.dumps, instances)) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
