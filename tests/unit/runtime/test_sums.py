"""The vector that ranks sum for a plan: what each puts in comes out on all, exactly."""

from __future__ import annotations

import pytest
import torch

from eplb_fsm.placement import Placement
from eplb_fsm.runtime.costs import Measured
from eplb_fsm.runtime.sums import Sums, SumVector

LIVE = [Placement.initial(2, 3, 4, 4), Placement.initial(1, 2, 4, 4)]


def loads_of(rank: int) -> list[torch.Tensor]:
    """Another load on each rank."""
    return [torch.arange(6).reshape(2, 3) + 10**rank, torch.tensor([[rank, 7]])]


def summed(num_nodes: int, speeds: list[float]) -> Sums:
    """What four ranks get."""
    vectors = [SumVector(rank, 4, num_nodes) for rank in range(4)]
    parts = [v.pack(loads_of(v.rank), Measured(v.rank, 1, 2, -3), speeds[v.rank]) for v in vectors]
    total = torch.stack(parts).sum(dim=0)
    return vectors[0].unpack(total, LIVE)


@pytest.mark.parametrize("num_nodes", [1, 2, 4])
def test_loads_are_summed_in_all_and_by_nodes(num_nodes: int) -> None:
    """Neighbouring ranks share a node."""
    sums = summed(num_nodes, [1.0] * 4)
    for bank, window in enumerate(sums.window):
        of_ranks = torch.stack([loads_of(rank)[bank] for rank in range(4)])
        assert window.tolist() == of_ranks.sum(dim=0).tolist()
        of_nodes = of_ranks.reshape(num_nodes, -1, *of_ranks.shape[1:]).sum(dim=1)
        assert sums.of_nodes[bank].swapaxes(0, 1).tolist() == of_nodes.tolist()
    assert sums.measured == Measured(6, 4, 8, -12)


def test_speeds_come_out_in_order() -> None:
    """In millionths; where all are alike there are none, and all 0 is not alike."""
    assert summed(1, [1.0, 0.25, 0.0, 0.333333]).speeds == (1.0, 0.25, 0.0, 0.333333)
    assert summed(2, [0.5] * 4).speeds == ()
    assert summed(1, [0.0] * 4).speeds == (0.0,) * 4
