"""The fewest peer moves that reach a balancedness: an oracle for small instances, by integer programming."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from eplb_fsm.placement import Placement


class Row(NamedTuple):
    """A constraint: columns with their factors, and the bounds of the sum."""

    factors: dict[int, float]
    least: float
    most: float


class Program:
    """The program of one layer.

    A column for each expert, rank and number says that the rank holds one of so many replicas; another one for each
    expert and number says that there are so many.
    """

    def __init__(self, load: np.ndarray, current: Placement, target: float) -> None:
        self.load, self.target = load, target
        self.experts, self.ranks = range(current.num_logical_experts), range(current.num_ranks)
        self.room = current.num_local_physical_experts
        self.counts = range(1, 1 + min(current.num_ranks, current.num_redundant_experts + 1))
        self.held = [set(rank) for rank in current.physical_to_logical_map.reshape(len(self.ranks), -1).tolist()]
        self.num_columns = len(self.experts) * (len(self.ranks) + 1) * len(self.counts)

    def on(self, expert: int, rank: int, count: int) -> int:
        """The column that says: this rank holds one of so many replicas."""
        return (expert * (len(self.ranks) + 1) + rank) * len(self.counts) + count - 1

    def has(self, expert: int, count: int) -> int:
        """The column that says: there are so many replicas."""
        return self.on(expert, len(self.ranks), count)

    def rows(self) -> Iterator[Row]:
        """All constraints."""
        for expert in self.experts:
            yield Row({self.has(expert, count): 1.0 for count in self.counts}, 1.0, 1.0)
            for count in self.counts:
                held = {self.on(expert, rank, count): 1.0 for rank in self.ranks}
                yield Row({**held, self.has(expert, count): -float(count)}, 0.0, 0.0)
        limit = self.load.sum() / len(self.ranks) / self.target
        for rank in self.ranks:
            here = list(product(self.experts, self.counts))
            yield Row({self.on(expert, rank, count): 1.0 for expert, count in here}, 0.0, float(self.room))
            yield Row({self.on(expert, rank, count): self.load[expert] / count for expert, count in here}, 0.0, limit)

    def costs(self) -> np.ndarray:
        """1 for each column that says that a rank holds what it did not hold."""
        cost = np.zeros(self.num_columns)
        for expert, rank, count in product(self.experts, self.ranks, self.counts):
            cost[self.on(expert, rank, count)] = expert not in self.held[rank]
        return cost


def fewest_moves(load: np.ndarray, current: Placement, target: float) -> int:
    """The fewest experts that have to come from another rank so that one layer reaches a balancedness.

    Args:
        load: (experts) load of each expert.
        current: A placement of one layer, without empty slots.
        target: The balancedness.

    Raises:
        ValueError: it cannot be reached.
    """
    program = Program(load, current, target)
    rows = list(program.rows())
    entries = [(index, column, value) for index, row in enumerate(rows) for column, value in row.factors.items()]
    index, column, value = zip(*entries, strict=True)
    matrix = coo_array((value, (index, column)), shape=(len(rows), program.num_columns)).tocsr()
    found = milp(
        program.costs(),
        constraints=LinearConstraint(matrix, [row.least for row in rows], [row.most for row in rows]),
        integrality=np.ones(program.num_columns),
        bounds=Bounds(0.0, 1.0),
    )
    if not found.success:
        raise ValueError(found.message)
    return round(found.fun)
