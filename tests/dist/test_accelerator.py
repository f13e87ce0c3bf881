"""Epochs over experts on an accelerator: enqueued passes read each slot while the host is ahead of them.

The ranks share one accelerator, which is enough to see the order of what is enqueued. Skipped where there is none.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from eplb_fsm import Placement, RebalanceFSM
from eplb_fsm.errors import ConfigMismatch
from eplb_fsm.load.recorder import LoadRecorder
from eplb_fsm.runtime.bank import Bank
from eplb_fsm.runtime.device import AcceleratorDevice
from eplb_fsm.runtime.failstop import raise_error
from eplb_fsm.runtime.maps import BankMaps
from tests.dist.decode import config_of
from tests.dist.harness import RankLink, run_ranks

pytestmark = pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")

_LAYERS, _LOGICAL, _PHYSICAL, _WORDS = 4, 8, 12, 40_000
_PASSES_AHEAD = 3
_BUSY = 2048
"""Rows of the products that keep the device busy between reading a map and reading the weights."""


class _DeviceEngine:
    """Experts whose words say who they are, and passes that compare them with the map they began with, enqueued."""

    def __init__(self, rank: int, world_size: int) -> None:
        device = torch.accelerator.current_accelerator()
        assert device is not None
        self.placement = Placement.initial(_LAYERS, _LOGICAL, _PHYSICAL, world_size)
        num_local = _PHYSICAL // world_size
        self._own = slice(rank * num_local, (rank + 1) * num_local)
        experts = torch.from_numpy(self.placement.physical_to_logical_map[:, self._own].copy()).to(device)
        self._words = torch.arange(_WORDS, device=device)
        self.weights = [(row[:, None] * _WORDS + self._words).contiguous() for row in experts]
        self.scales = [row[:, None].to(torch.int32).expand(-1, 3).contiguous() for row in experts]
        self.num_torn = torch.zeros((), dtype=torch.int64, device=device)
        self._busy = torch.randn(_BUSY, _BUSY, device=device)
        self._ahead: deque[torch.Event] = deque()
        self._device = device
        self.bank = Bank(
            "target",
            _LOGICAL,
            _PHYSICAL,
            [{"weight": w, "scale": s} for w, s in zip(self.weights, self.scales, strict=True)],
        )

    def enqueue_pass(self, maps: BankMaps) -> None:
        """Read the map, be busy, and count slots that hold another expert than it said."""
        used = maps.physical_to_logical_map[:, self._own].clone()
        for layer in range(_LAYERS):
            torch.mm(self._busy, self._busy)
            wanted = used[layer][:, None]
            self.num_torn += (self.weights[layer] != wanted * _WORDS + self._words).any(1).sum()
            self.num_torn += (self.scales[layer] != wanted).any(1).sum()

    def let_host_run_ahead(self) -> None:
        """Note the end of a pass, and wait for the one before the last few."""
        event = torch.Event(self._device)
        event.record(torch.accelerator.current_stream(self._device))
        self._ahead.append(event)
        if len(self._ahead) > _PASSES_AHEAD:
            self._ahead.popleft().synchronize()


class _Careless(AcceleratorDevice):
    """Enqueues commits beside the engine's stream, not on it."""

    def enqueue(self, operation: Callable[[], object]) -> None:
        with self.worker_stream():
            super().enqueue(operation)


class _Found(NamedTuple):
    outcomes: list[str]
    moved_bytes: int
    num_torn: int
    digest: int


def _epochs(link: RankLink, count: int, is_careless: bool, is_captured: bool, options: dict[str, Any]) -> _Found:
    """Decode through so many epochs."""
    engine = _DeviceEngine(link.rank, link.world_size)
    meeting: Any = dist.ProcessGroupGloo(dist.PrefixStore("engine", link.store()), link.rank, link.world_size)
    with RebalanceFSM.connect(
        link.store(),
        link.rank,
        link.world_size,
        [engine.bank],
        [engine.placement],
        config_of(commit_bytes=1 << 21, **options),
        fail_stop=raise_error,
        device=_Careless(engine.bank.device, _PASSES_AHEAD) if is_careless else None,
    ) as fsm:
        enqueue = _capture(engine, fsm.maps()) if is_captured else lambda: engine.enqueue_pass(fsm.maps())
        fsm.arm()
        while len(fsm.outcomes) < count:
            ended = len(fsm.outcomes)
            fsm.request_rebalance()
            while len(fsm.outcomes) == ended:
                meeting.allreduce([torch.zeros(1)]).wait()
                enqueue()
                engine.let_host_run_ahead()
                fsm.step()
        torch.accelerator.synchronize()
        names = [outcome.kind.name for outcome in fsm.outcomes]
        return _Found(names, fsm.moved_bytes, int(engine.num_torn), fsm.placements[0].digest)


def _capture(engine: _DeviceEngine, maps: BankMaps) -> Callable[[], None]:
    """Return what replays a pass that was captured once."""
    with torch.cuda.stream(torch.cuda.Stream()):
        engine.enqueue_pass(maps)
    torch.accelerator.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        engine.enqueue_pass(maps)
    return graph.replay


@pytest.mark.parametrize("is_captured", [False, True])
@pytest.mark.parametrize("world_size", [2, 4])
def test_no_pass_that_was_enqueued_sees_half_a_commit(world_size: int, is_captured: bool) -> None:
    """Slots and scales hold what the map said when the pass began, also where the pass is a replayed graph."""
    if is_captured and not torch.cuda.is_available():
        pytest.skip("graphs are CUDA's")
    found = run_ranks(world_size, _epochs, 4, False, is_captured, {})
    for rank in found:
        assert rank.outcomes == ["COMMITTED"] * 4
        assert rank.moved_bytes > 0
        assert rank.num_torn == 0
        assert rank.digest == found[0].digest


def test_commits_beside_the_stream_are_seen() -> None:
    """The test above can fail: a commit that is not on the engine's stream tears a pass."""
    assert sum(rank.num_torn for rank in run_ranks(2, _epochs, 4, True, False, {})) > 0


@pytest.mark.parametrize("options", [{"mode": "sync"}, {"integrity": "slot"}, {"integrity": "off"}])
def test_sync_mode_and_every_kind_of_integrity_commit(options: dict[str, Any]) -> None:
    """The same rows move; rows that are read back are read after their commit has run."""
    for rank in run_ranks(2, _epochs, 2, False, False, options):
        assert (rank.outcomes, rank.num_torn) == (["COMMITTED"] * 2, 0)


def test_tokens_are_counted_on_the_device_and_in_a_graph() -> None:
    """Every routed token of every replay is in the window's sum, padding is not."""
    device = torch.accelerator.current_accelerator()
    assert device is not None
    recorder = LoadRecorder([(_LAYERS, _LOGICAL)], device)
    ids = torch.tensor([[0, 7], [3, -1], [1, 2]], device=device)
    valid = torch.tensor([True, True, False], device=device)
    recorder.record(0, 1, ids, valid)
    replay: Callable[[], None] = lambda: recorder.record(0, 1, ids, valid)  # noqa: E731  # or a graph's method
    if torch.cuda.is_available():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            recorder.record(0, 1, ids, valid)
        replay = graph.replay
    for _ in range(5):
        replay()
        recorder.rotate()
    recorder.rotate()
    recorder.snapshot()
    wanted = torch.zeros(_LAYERS, _LOGICAL, dtype=torch.int64)
    wanted[1, [0, 3, 7]] = 3  # of the four closed buckets that count the last one is empty
    assert torch.equal(recorder.snapshots[0].cpu(), wanted)


def _start_on_two_kinds(link: RankLink) -> str:
    engine = _DeviceEngine(link.rank, link.world_size)
    where = "cpu" if link.rank else engine.bank.device
    tensors = [{name: tensor.to(where) for name, tensor in layer.items()} for layer in engine.bank.tensors]
    bank = Bank("target", _LOGICAL, _PHYSICAL, tensors)
    with pytest.raises(ConfigMismatch) as raised:
        RebalanceFSM.connect(
            link.store(), link.rank, link.world_size, [bank], [engine.placement], config_of(commit_bytes=1 << 21)
        )
    return str(raised.value)


def test_ranks_whose_experts_are_on_different_kinds_of_devices_do_not_start() -> None:
    """What a commit and a round take differs too much; every rank says which is where."""
    device = torch.accelerator.current_accelerator()
    assert device is not None
    for message in run_ranks(2, _start_on_two_kinds):
        assert f"bank 0: kind of device is '{device.type}' on rank 0, 'cpu' on rank 1" in message
