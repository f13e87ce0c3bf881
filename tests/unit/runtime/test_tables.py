"""What a rank writes into its tables on several nodes, and how the balance that comes of it is told."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from eplb_fsm.placement import Placement
from eplb_fsm.runtime.tables import Tables

TWO_NODES = Placement([[0, 1, 0, 2]], 3, 4)
"""Expert 0 has a slot on both nodes, 1 on the first and 2 on the second."""
ALIKE = np.array([[[50, 50, 50], [50, 50, 50]]])
"""Load of the layer by nodes."""


class Kept:
    """A map writer that keeps the shares it is given."""

    def prepare(
        self, bank: int, layers: Sequence[int], placement: Placement, shares: np.ndarray | None = None
    ) -> np.ndarray | None:
        return shares

    def write(self, prepared: object) -> None:
        raise AssertionError("nothing is written here")


def tables(node: int) -> Tables:
    """Those of a rank that follows a load for which both nodes ask alike."""
    made = Tables(Kept(), is_weighted=True, node=node)
    made.follow([ALIKE.sum(axis=1)], np.ones(4), [ALIKE])
    return made


def test_a_rank_takes_the_replica_of_its_own_node() -> None:
    """And of experts that are on the other node only, what there is."""
    assert np.asarray(tables(0).prepare(0, [0], TWO_NODES)).tolist() == [[1.0, 1.0, 0.0, 1.0]]
    assert np.asarray(tables(1).prepare(0, [0], TWO_NODES)).tolist() == [[0.0, 1.0, 1.0, 1.0]]


def test_a_mix_of_nodes_that_changes_shows_in_the_balance() -> None:
    """The same load of every expert, but node 0 asks for nearly all of expert 0: its slot carries that now."""
    assert tables(0).balancedness([ALIKE], [TWO_NODES]) == pytest.approx(75 / 100)
    other = np.array([[[95, 10, 10], [5, 10, 10]]])
    assert tables(0).balancedness([other], [TWO_NODES]) == pytest.approx(35 / 95)
