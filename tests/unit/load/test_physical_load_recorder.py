"""Counts per physical expert become counts per logical expert, by the map that held while they were made."""

from __future__ import annotations

import torch

from eplb_fsm.load.physical import PhysicalLoadRecorder
from eplb_fsm.placement.placement import Placement


def test_counts_belong_to_the_expert_that_the_slot_held() -> None:
    """What was counted before a change of the map counts for the old expert, what comes after for the new one."""
    load = PhysicalLoadRecorder([Placement([[0, 1, 2, 0], [2, 1, 0, -1]], 3, 2)])
    load.add(0, torch.tensor([[1, 2, 3, 4], [5, 6, 7, 0]], dtype=torch.int32))
    load.remap(0, torch.tensor([1]), torch.tensor([[0, 1, 2, 2]]))
    load.add(0, torch.tensor([[1, 0, 0, 0], [10, 0, 0, 20]], dtype=torch.int32))
    load.snapshot()
    assert load.snapshots[0].tolist() == [[6, 2, 3], [17, 6, 25]]
    load.snapshot()
    assert load.snapshots[0].sum() == 0


def test_an_empty_slot_counts_for_nobody() -> None:
    """Tokens that an engine counted for a slot without an expert are in no expert's load."""
    load = PhysicalLoadRecorder([Placement([[0, 1, -1, 0]], 2, 2)])
    load.add(0, torch.tensor([[1, 2, 99, 4]]))
    load.snapshot()
    assert load.snapshots[0].tolist() == [[5, 2]]


def test_the_window_forgets_whole_buckets() -> None:
    """What was counted before as many rotations as there are buckets is out of the window."""
    load = PhysicalLoadRecorder([Placement([[0, 1]], 2, 2)], num_buckets=2)
    load.add(0, torch.tensor([[100, 100]]))
    for passes in range(3):
        load.rotate()
        load.add(0, torch.tensor([[passes, 1]]))
    load.snapshot()
    assert load.snapshots[0].tolist() == [[3, 3]]


def test_an_engine_may_add_its_passes_up() -> None:
    """What nobody has taken yet is taken before the map changes, before a bucket closes and for a snapshot."""
    load = PhysicalLoadRecorder([Placement([[0, 1]], 2, 2)], num_buckets=2)
    counts = torch.zeros((1, 2), dtype=torch.int32)
    load.taker(0, counts)
    counts += torch.tensor([[1000, 1]], dtype=torch.int32)
    load.rotate()
    assert not counts.any()
    load.rotate()
    counts += torch.tensor([[100, 1]], dtype=torch.int32)
    load.remap(0, torch.tensor([0]), torch.tensor([[1, 0]]))
    counts += torch.tensor([[10, 1]], dtype=torch.int32)
    load.rotate()
    counts += torch.tensor([[2, 3]], dtype=torch.int32)
    load.snapshot()
    assert load.snapshots[0].tolist() == [[101 + 3, 11 + 2]]
    assert not counts.any()
