"""Epochs: several ranks, real processes, weights equal to the map in every forward pass."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch.distributed as dist
from torch.distributed import PrefixStore

from eplb_fsm.core.states import State
from eplb_fsm.runtime import connect
from eplb_fsm.runtime.maps import TensorMapWriter
from tests.dist.decode import DecodeLoop
from tests.dist.harness import RankLink, run_ranks


def _epochs(link: RankLink, mode: str, integrity: str, count: int) -> tuple[list[str], int, list[int]]:
    loop = DecodeLoop(link, mode=mode, integrity=integrity)
    with loop.fsm as fsm:
        fsm.arm()
        loop.run_epochs(count)
        loop.run_steps(20)
        return loop.outcome_names, fsm.moved_bytes, loop.digests


@pytest.mark.parametrize("world_size", [2, 4])
def test_both_modes_move_the_same_bytes_to_the_same_placement(world_size: int) -> None:
    """The same sequence of plans moves the same bytes in async and sync mode and ends in one placement everywhere."""
    results = [run_ranks(world_size, _epochs, mode, "wire", 3) for mode in ("async", "sync")]
    for outcomes, moved_bytes, digests in results[0] + results[1]:
        assert outcomes == ["COMMITTED"] * 3
        assert moved_bytes > 0
        assert digests == results[0][0][2]
    assert [r[1] for r in results[0]] == [r[1] for r in results[1]]


@pytest.mark.parametrize("mode", ["async", "sync"])
@pytest.mark.parametrize("integrity", ["off", "slot"])
def test_every_kind_of_integrity_commits(mode: str, integrity: str) -> None:
    """Rows move right without hashes, and with committed rows read back."""
    assert all(outcomes == ["COMMITTED"] * 2 for outcomes, _, _ in run_ranks(2, _epochs, mode, integrity, 2))


def _as_many_ranks(link: RankLink, mode: str) -> list[str]:
    connect._MAX_MESH_RANKS = link.world_size - 1
    connect.MeshVoteChannel = None  # type: ignore[assignment,misc]  # is not asked for
    loop = DecodeLoop(link, mode=mode)
    with loop.fsm as fsm:
        fsm.arm()
        loop.run_epochs(2)
        loop.run_steps(20)
        return loop.outcome_names


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_more_ranks_than_a_mesh_is_made_for_vote_over_gloo(mode: str) -> None:
    """Where there are more ranks than that votes go by a reduction, and epochs commit as over a mesh."""
    assert run_ranks(2, _as_many_ranks, mode) == [["COMMITTED"] * 2] * 2


def _two_domains(link: RankLink) -> tuple[list[tuple[list[str], int]], list[int]]:
    """Two pipeline stages with one store each behind a prefix of a launcher, as torchrun gives it."""
    store: dist.Store = PrefixStore("launcher/attempt_0", link.store())
    loops = [
        DecodeLoop(link, store=store, banks=("target", "draft"), connect={"name": name})
        for name in ("stage0", "stage1")
    ]
    for loop in loops:
        loop.fsm.arm()
    initial = loops[0].digests[0]
    loops[0].run_epochs(1)
    untouched = loops[1].fsm.moved_bytes
    loops[1].run_epochs(2)
    found = [(loop.outcome_names, untouched) for loop in loops]
    moved = [len({placement.digest, initial}) for loop in loops for placement in loop.fsm.placements]
    for loop in loops:
        loop.fsm.close()
    return found, moved


def test_domains_share_a_store_and_each_has_two_banks() -> None:
    """Two domains behind one prefixed store agree apart from each other, each moving a target and a draft model."""
    for (stage0, stage1), moved in run_ranks(2, _two_domains):
        assert moved == [2, 2, 2, 2]
        assert stage0 == (["COMMITTED"], 0)
        assert stage1 == (["COMMITTED"] * 2, 0)


class _CountingWriter(TensorMapWriter):
    """An engine's own writer, here of the library's tables; counts and keeps what it was asked."""

    def __init__(self, placements: list[object]) -> None:
        super().__init__(placements)  # type: ignore[arg-type]
        self.num_writes = 0

    def write(self, prepared: object) -> None:
        self.num_writes += 1
        super().write(prepared)


def _own_writer(link: RankLink) -> tuple[int, int, str]:
    from eplb_fsm import Placement
    from tests.dist.decode import SHAPE

    placement = Placement.initial(
        SHAPE.num_moe_layers, SHAPE.num_logical_experts, SHAPE.num_physical_experts, link.world_size
    )
    writer = _CountingWriter([placement])
    loop = DecodeLoop(link, connect={"map_writer": writer})
    with loop.fsm as fsm:
        try:
            fsm.maps()
            said = ""
        except Exception as error:
            said = str(error)
        loop.read_maps = lambda bank=0: writer.maps[bank]  # the engine reads its own
        fsm.arm()
        loop.run_epochs(2)
        loop.run_steps(3)
        return writer.num_writes, sum(o.num_commits for o in fsm.outcomes), said


def test_an_engine_writes_its_own_tables() -> None:
    """An own MapWriter is asked to write once for each commit, and fsm.maps() says where the maps are."""
    for num_writes, num_commits, said in run_ranks(2, _own_writer):
        assert num_writes == num_commits > 2
        assert "read the maps from it" in said


def _interval(link: RankLink) -> tuple[int, list[int], State]:
    loop = DecodeLoop(link, records=True, step_interval=64, policy="deepseek", planner="process")
    with loop.fsm as fsm:
        fsm.arm()
        loop.run(lambda: len(fsm.outcomes) >= 3)
        return fsm.step_idx, [o.start_step for o in fsm.outcomes], fsm.state


def test_epochs_start_by_themselves_at_the_interval() -> None:
    """With a step_interval every rank starts the same epochs at the same steps, at least an interval apart."""
    first, second = run_ranks(2, _interval)
    assert first == second
    starts = first[1]
    assert all(b - a >= 64 for a, b in pairwise(starts))
    assert first[2] is State.IDLE
