"""Splitting tokens unequally among replicas: beside the optimum of a linear program, and as an engine's table."""

from __future__ import annotations

import numpy as np
import pytest

from eplb_fsm.errors import LoadError
from eplb_fsm.placement import Placement
from eplb_fsm.placement.balancedness import rank_loads
from eplb_fsm.placement.split import (
    entered_shares,
    table_width,
    turn_tables,
    warm_up,
    weighted_rank_loads,
    weighted_shares,
)
from tests.benchmarks.placement.loads import SIZES, Size
from tests.benchmarks.split import drifted, lightest_heaviest_rank

SMALL = Size(1, 24, 32, 8)
LAYERS = [*(size._replace(num_moe_layers=1) for size in SIZES.values()), SMALL, Size(1, 12, 18, 3)]


@pytest.mark.parametrize("size", LAYERS, ids=str)
def test_the_heaviest_rank_is_as_light_as_the_linear_program_can_make_it(size: Size) -> None:
    """Within 1 %, at real sizes; and lighter than with equal shares."""
    for seed in range(5):
        placement, load = drifted(size, 0.3, seed)
        heaviest = weighted_rank_loads(load, placement).max()
        optimum = lightest_heaviest_rank(load[0], placement.physical_to_logical_map[0], size.num_ranks)
        assert optimum * (1 - 1e-9) <= heaviest <= optimum * 1.01
        assert heaviest <= rank_loads(load, placement).max() * (1 + 1e-9)


def test_load_runs_through_a_chain_of_ranks() -> None:
    """Each expert has replicas on two neighbouring ranks; all the load is at one end, and the optimum is even."""
    num_ranks = 12
    row = [expert for rank in range(num_ranks) for expert in (rank, max(rank - 1, 0))]
    row[1] = num_ranks  # an expert of its own beside the first one
    load = np.array([[100.0] * (num_ranks // 2) + [1.0] * (num_ranks // 2) + [0.0]])
    placement = Placement([row], num_ranks + 1, num_ranks)
    optimum = lightest_heaviest_rank(load[0], np.array(row), num_ranks)
    assert weighted_rank_loads(load, placement).max() <= optimum * 1.01


def test_shares_add_up_and_are_what_the_rank_loads_say() -> None:
    """For each expert to 1, whatever is empty, idle or twice on a rank."""
    placement = Placement([[0, 0, 1, 2, 0, 3, 2, -1]], 4, 4)
    load = np.array([[80.0, 10.0, 0.0, 30.0]])
    shares = weighted_shares(load, placement)
    row = placement.physical_to_logical_map[0]
    assert shares[0, row < 0] == 0.0
    assert [shares[0, row == expert].sum() for expert in range(4)] == pytest.approx([1.0] * 4)
    assert shares[0, row == 2].tolist() == [0.5, 0.5]  # without load
    assert shares[0, 0] == shares[0, 1]  # on one rank
    amounts = np.where(row >= 0, load[0, row], 0.0) * shares[0]
    assert weighted_rank_loads(load, placement)[0] == pytest.approx(amounts.reshape(4, 2).sum(axis=1))


def test_bad_loads_are_refused() -> None:
    """As everywhere."""
    placement = Placement.initial(1, 4, 8, 2)
    with pytest.raises(LoadError, match="counts from 0 to 1e"):
        weighted_shares([[1.0, -1.0, 0.0, 0.0]], placement)


def test_shares_in_a_table_are_close_to_the_wanted_ones() -> None:
    """And sum to 1 for each expert, on every layer."""
    placement, load = drifted(SMALL, 0.3)
    shares = weighted_shares(load, placement)
    entered = entered_shares(turn_tables(placement, [0], shares, table_width(placement, is_weighted=True)), 32)
    row = placement.physical_to_logical_map[0]
    assert [entered[0, row == expert].sum() for expert in range(24)] == pytest.approx([1.0] * 24)
    assert np.abs(entered - shares).max() < 1 / 64
    assert np.abs(entered - shares).max() > 0.0
    assert rank_loads(load, placement, entered).max() <= weighted_rank_loads(load, placement).max() * 1.02


@pytest.mark.parametrize("is_compiled", [True, False])
def test_interpreted_kernels_are_warned_of(
    is_compiled: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, at the start, and with what to install."""
    monkeypatch.setattr("eplb_fsm.placement.kernels.compiled.IS_COMPILED", is_compiled)
    warm_up()
    assert [record.levelname for record in caplog.records] == ([] if is_compiled else ["WARNING"])
    assert ("eplb-fsm[fast]" in caplog.text) is not is_compiled


def table_of(shares: list[float], width: int) -> list[int]:
    """The entries of an expert that has a slot for each share, on a rank each."""
    placement = Placement([[0] * len(shares)], 1, len(shares))
    row = turn_tables(placement, [0], np.array([shares]), width)[0, 0].tolist()
    used = row.index(-1) if -1 in row else width
    assert set(row[used:]) <= {-1}
    return row[:used]


@pytest.mark.parametrize(
    ("shares", "width", "entries"),
    [
        ([1.0], 4, [0]),
        ([0.5, 0.5], 9, [0, 1]),
        ([1 / 3, 1 / 3, 1 / 3], 9, [0, 1, 2]),
        ([0.75, 0.25], 9, [0, 0, 1, 0]),
        ([0.0, 1.0], 9, [1]),
        ([0.5, 0.25, 0.25], 4, [0, 1, 2, 0]),
    ],
)
def test_a_table_names_each_slot_as_often_as_its_share_wants(
    shares: list[float], width: int, entries: list[int]
) -> None:
    """With as few entries as do; the slots of one take turns with the others'."""
    assert table_of(shares, width) == entries


def test_what_a_table_cannot_say_exactly_it_says_closely() -> None:
    """The shares of many random tables are off by less than an entry."""
    rng = np.random.default_rng(3)
    for _ in range(100):
        shares, width = rng.dirichlet([1.0] * int(rng.integers(2, 6))), int(rng.integers(8, 40))
        entries = table_of(shares.tolist(), width)
        got = np.bincount(entries, minlength=len(shares)) / len(entries)
        assert np.abs(got - shares).max() < 1 / width


def test_tables_of_equal_shares_are_those_without_a_split() -> None:
    """Bit for bit, so that nothing changes for who does not split."""
    placement, _ = drifted(SMALL, 0.3)
    equal = 1.0 / placement.logical_replica_count[0][placement.physical_to_logical_map]
    assert turn_tables(placement, [0], equal, 9).tolist() == placement.logical_to_physical(9, [0]).tolist()
