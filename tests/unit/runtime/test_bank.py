"""Registrations that cannot work are refused when they are made, with what to change."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from eplb_fsm import Bank, Placement, RebalanceConfig, find_unregistered_tensors
from eplb_fsm.errors import BankError, ConfigError, PlacementError
from eplb_fsm.runtime.assembly import check_banks, check_links, plan_task
from eplb_fsm.runtime.device import CpuDevice
from eplb_fsm.runtime.domain import Domain
from eplb_fsm.runtime.parts import EngineSide
from eplb_fsm.runtime.rowlayout import RowLayout
from eplb_fsm.runtime.staging import StagingArea

_LOGICAL, _PHYSICAL, _LOCAL = 8, 12, 6


def _tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def _bank(tensors: list[dict[str, torch.Tensor]], **further: Any) -> Bank:
    return Bank("target", _LOGICAL, _PHYSICAL, tensors, **further)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ([], "at least one layer"),
        ([{}], "at least one tensor"),
        ([{"w": _tensor(6, 4)}, {}], "at least one tensor"),
        ([{"w": _tensor(6, 4).t().contiguous().t()}], "is not contiguous"),
        ([{"w": _tensor(12, 4)[::2]}], "is not contiguous"),
        ([{"w": _tensor(6, 4), "scale": _tensor(4)}], "the first dimension of every tensor"),
        ([{"w": _tensor(6, 4), "scale": torch.tensor(1.0)}], "the first dimension of every tensor"),
        ([{"w": _tensor(6, 0)}], "is empty; leave it out"),
        ([{"w": _tensor(0, 4)}], "the first dimension of every tensor"),
        ([{"w": _tensor(6, 4)}, {"v": _tensor(6, 4)}], "every layer must register the same tensors"),
        ([{"w": _tensor(6, 4)}, {"w": _tensor(6, 5)}], "other sizes in other layers"),
    ],
)
def test_tensors_that_cannot_be_moved_are_refused(tensors: list[dict[str, torch.Tensor]], words: str) -> None:
    """One BankError names the bank and what is wrong with the registration."""
    with pytest.raises(BankError, match="bank 'target'") as raised:
        _bank(tensors)
    assert words in str(raised.value)


def test_layer_ids_go_with_layers() -> None:
    """As many layer ids as layers."""
    with pytest.raises(BankError, match="2 layer_ids for 1 layers"):
        _bank([{"w": _tensor(6, 4)}], layer_ids=[3, 4])


def test_a_bank_fits_the_ranks() -> None:
    """Local rows times ranks are the physical experts."""
    bank = _bank([{"w": _tensor(6, 4)}])
    bank.check_ranks(2)
    with pytest.raises(BankError, match="6 rows on each of 3 ranks are not num_physical_experts = 12"):
        bank.check_ranks(3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.uint8, torch.bool, torch.float64])
def test_rows_are_bytes_of_any_dtype(dtype: torch.dtype) -> None:
    """A row view writes through to the live tensor, also of dtypes whose rows are no whole words."""
    live = torch.zeros(6, 3, dtype=dtype)
    bank = _bank([{"w": live, "scale": _tensor(6)}])
    for view in bank.live_row(0, 4):
        view.fill_(1)
    assert live[4].view(torch.uint8).sum() == 3 * live.element_size()
    assert not live[3].any()
    assert bank.layout == RowLayout.of([3 * live.element_size(), 4])
    assert bank.layout.payload_bytes % 8 == 0


def test_tensors_that_nobody_registered_are_found() -> None:
    """A parameter with the dimension of the local experts, neither registered nor ignored, is refused by name."""
    module = torch.nn.Module()
    module.w13 = torch.nn.Parameter(_tensor(6, 4))
    module.w13_scale = torch.nn.Parameter(_tensor(6, 1))
    module.gate = torch.nn.Parameter(_tensor(8, 4))
    bank = _bank([{"w13": module.w13}])
    with pytest.raises(BankError, match=r"w13_scale \(6, 1\).*register them, or name them in `ignore`"):
        find_unregistered_tensors(module.named_parameters(), bank)
    find_unregistered_tensors(module.named_parameters(), bank, ignore=["w13_scale"])
    complete = _bank([{"w13": module.w13, "w13_scale": module.w13_scale}])
    find_unregistered_tensors(module.named_parameters(), complete)


def _placement(layers: int = 1, logical: int = _LOGICAL, physical: int = _PHYSICAL, ranks: int = 2) -> Placement:
    return Placement.initial(layers, logical, physical, ranks)


@pytest.mark.parametrize(
    ("placements", "redundant", "kind", "words"),
    [
        ([], 4, PlacementError, "0 placements for 1 banks"),
        ([_placement(layers=2)], 4, PlacementError, "make the placement for this model and these ranks"),
        ([_placement(logical=9)], 3, PlacementError, "(1, 12, 8, 2), its placement (1, 12, 9, 2)"),
        ([_placement(physical=10)], 2, PlacementError, "its placement (1, 10, 8, 2)"),
        ([_placement(ranks=4)], 4, PlacementError, "its placement (1, 12, 8, 4)"),
        ([_placement()], 3, ConfigError, "num_redundant_experts = 3: bank 'target' has 4 redundant experts"),
    ],
)
def test_placement_bank_and_options_fit(
    placements: list[Placement], redundant: int, kind: type[Exception], words: str
) -> None:
    """A placement that does not fit its bank, or a wrong number of redundant experts, is refused with both sides."""
    bank = _bank([{"w": _tensor(6, 4)}])
    config = RebalanceConfig(num_redundant_experts=redundant)
    with pytest.raises(kind) as raised:
        check_banks(config, Domain(0, 2), [bank], placements)
    assert words in str(raised.value)


def test_no_bank_is_refused() -> None:
    """A domain without any bank has nothing to move."""
    with pytest.raises(BankError, match="no bank was registered"):
        check_banks(RebalanceConfig(), Domain(0, 2), [], [])


@pytest.mark.parametrize(
    ("device", "width", "commit_bytes"), [("cpu", 10, 4 << 20), ("meta", 10, 8 << 20), ("cpu", 3 << 20, 3 << 22)]
)
def test_a_commit_writes_at_least_one_expert_by_default(device: str, width: int, commit_bytes: int) -> None:
    """However large an expert is, serving starts without an option for it; small ones are several to a commit."""
    experts = torch.empty(_LOCAL, width, device=device)  # of which nothing is touched
    task = plan_task(RebalanceConfig(integrity="off"), Domain(0, 2), [_bank([{"w": experts}])])
    assert task.budget.commit_bytes - commit_bytes in range(64)  # a row carries a word or two beside its expert


def test_commit_bytes_must_hold_one_expert_and_fit_memory() -> None:
    """The error says how much one expert takes; staging that cannot be allocated says what it would take."""
    bank = _bank([{"w": _tensor(6, 100)}])
    with pytest.raises(ConfigError, match="commit_bytes = 100: one expert takes 408 bytes; raise commit_bytes"):
        StagingArea([bank], 0, num_buffers=2, commit_bytes=100, integrity="wire")
    with pytest.raises(ConfigError, match="lower commit_bytes or staging_buffers"):
        StagingArea([bank], 0, num_buffers=64, commit_bytes=1 << 40, integrity="wire")
    assert StagingArea([bank], 0, num_buffers=2, commit_bytes=408, integrity="wire").num_bytes == 4 * 408


def test_memory_that_rows_cannot_be_staged_from_is_refused() -> None:
    """Neither the host's nor an accelerator's; and experts on two devices."""
    nowhere = _bank([{"w": torch.zeros(6, 4, device="meta")}])
    with pytest.raises(BankError, match="is on meta, from which rows cannot be staged"):
        check_links(RebalanceConfig(), [nowhere], None, None)
    split = _bank([{"w": torch.zeros(6, 4), "scale": torch.zeros(6, device="meta")}])
    with pytest.raises(BankError, match="'scale' is on meta and others are on cpu; all banks of a domain must"):
        check_links(RebalanceConfig(), [split], None, None)


def test_a_stream_of_the_host_is_refused_for_experts_elsewhere() -> None:
    """Its events would be done before any copy of theirs."""
    nowhere = _bank([{"w": torch.zeros(6, 4, device="meta")}])
    side = EngineSide(banks=[nowhere], placements=[], device=CpuDevice())
    with pytest.raises(ConfigError, match="the experts are on meta: leave `device` out"):
        side.stream()


@pytest.mark.parametrize(("rank", "world_size"), [(-1, 2), (2, 2), (0, 0)])
def test_ranks_are_numbered_from_zero(rank: int, world_size: int) -> None:
    """A rank outside of its domain is refused."""
    with pytest.raises(ConfigError, match="ranks are numbered from 0 to world_size - 1"):
        Domain(rank, world_size)
