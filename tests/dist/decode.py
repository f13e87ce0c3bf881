"""A decode loop of one rank for tests: engines whose experts say who they are, checked before every step."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from eplb_fsm import Placement, RebalanceConfig, RebalanceFSM
from eplb_fsm.observe.events import Event
from eplb_fsm.runtime.failstop import raise_error
from eplb_fsm.runtime.maps import BankMaps
from eplb_fsm.simulate.engine import Shape, SimulatedEngine
from tests.dist.harness import RankLink, group_members

SHAPE = Shape(num_moe_layers=4, num_logical_experts=8, num_physical_experts=12, num_words=250)
SHUFFLED = "tests.dist.policies:Shuffled"

OPTIONS: dict[str, Any] = {
    "policy": SHUFFLED,
    "planner": "thread",
    "step_interval": 0,
    "idle_round_interval": 8,
    "window_size": 64,
    "num_redundant_experts": SHAPE.num_physical_experts - SHAPE.num_logical_experts,
    "commit_bytes": 8 * 1024,
    "min_gain": 0.0,
    "horizon_steps": 0,
    "lag": 2,
    "backoff_steps": 1,
    "max_backoff_steps": 16,
    "vote_timeout_s": 20.0,
    "resolve_timeout_s": 20.0,
    "transfer_timeout_s": 20.0,
    "start_timeout_s": 30.0,
    "max_slowdown": 0.0,
    "awaiting_consensus_deadline_steps": 1_000_000,
    "collecting_deadline_steps": 1_000_000,
    "computing_deadline_steps": 1_000_000,
    "drain_deadline_steps": 1_000_000,
    "transfer_slack_steps": 1_000_000,
}
"""Small and patient: an epoch of several chunks, and nothing that passes a deadline on a slow machine."""


def config_of(**options: Any) -> RebalanceConfig:
    """Return the tests' configuration with some options changed."""
    return RebalanceConfig(**{**OPTIONS, **options})


class Watcher:
    """An observer that keeps every event, and calls hooks."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.hooks: list[Callable[[Event], None]] = []

    def on_event(self, event: Event) -> None:
        """Keep it."""
        self.events.append(event)
        for hook in self.hooks:
            hook(event)


class DecodeLoop:
    """One rank's engine and machine.

    Args:
        link: The rank.
        banks: One simulated model for each of these names.
        lockstep: Whether the ranks meet in every forward pass, as engines do, in a collective of their own, which
            fails after ``collective_s``.
        pass_s: Seconds that a forward pass takes.
        records: Whether tokens are counted. Without load no plan loses, so :data:`SHUFFLED` always moves something.
        store: Where to connect; None: the test's store.
        connect: Further arguments of ``RebalanceFSM.connect``.
        options: Of the configuration.
    """

    def __init__(
        self,
        link: RankLink,
        *,
        banks: Sequence[str] = ("target",),
        lockstep: bool = True,
        collective_s: float = 30.0,
        pass_s: float = 0.0005,
        records: bool = False,
        store: dist.Store | None = None,
        connect: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.link = link
        self.pass_s = pass_s
        self.records = records
        self.watcher = Watcher()
        self.num_passes = 0
        store = store or link.store()
        placement = Placement.initial(
            SHAPE.num_moe_layers, SHAPE.num_logical_experts, SHAPE.num_physical_experts, link.world_size
        )
        self.engines = [SimulatedEngine(link.rank, SHAPE, placement) for _ in banks]
        registered = [engine.bank() for engine in self.engines]
        for bank, name in zip(registered, banks, strict=True):
            bank.name = name
        further = {"fail_stop": raise_error, "observers": (self.watcher,), **(connect or {})}
        self.fsm = RebalanceFSM.connect(
            store, link.rank, link.world_size, registered, [placement] * len(banks), config_of(**options), **further
        )
        self.read_maps: Callable[[int], BankMaps] = self.fsm.maps
        self._generator = torch.Generator().manual_seed(link.rank)
        self._group: Any = None
        if lockstep:
            name = dist.PrefixStore(f"engine/{further.get('name', '')}", store)
            self._group = dist.ProcessGroupGloo(name, link.rank, link.world_size, timedelta(seconds=collective_s))

    def forward(self) -> None:
        """One forward pass: meet the others, check every slot against the live map, count tokens."""
        if self._group is not None:
            self._group.allreduce([torch.zeros(1)], dist.AllreduceOptions()).wait()
        if self.pass_s:
            time.sleep(self.pass_s)
        self.num_passes += 1
        for bank, engine in enumerate(self.engines):
            engine.forward(self.num_passes, self.read_maps(bank))
            for layer in range(SHAPE.num_moe_layers if self.records else 0):
                ids = (torch.rand(8, 2, generator=self._generator) ** 2 * SHAPE.num_logical_experts).long()
                self.fsm.record(layer, ids, bank=bank)

    def step(self) -> None:
        """A forward pass and its step."""
        self.forward()
        self.fsm.step()

    def run(self, until: Callable[[], bool], max_s: float = 40.0) -> None:
        """Decode until something holds; with an agreed condition, until the same step on all ranks."""
        deadline = time.monotonic() + max_s
        while not until():
            assert time.monotonic() < deadline, f"not reached in {max_s} s: {self.fsm.health()}"
            self.step()

    def run_epochs(self, count: int, max_s: float = 40.0) -> None:
        """Ask for epochs, one after the other, until that many more have ended in an agreed way."""
        for _ in range(count):
            ended = len(self.fsm.outcomes)
            self.fsm.request_rebalance()
            self.run(lambda ended=ended: len(self.fsm.outcomes) > ended, max_s)  # type: ignore[misc]

    def run_steps(self, count: int) -> None:
        """Decode that many steps."""
        for _ in range(count):
            self.step()

    @property
    def outcome_names(self) -> list[str]:
        """``COMMITTED``, or ``ABORTED(REASON)``, of every epoch."""
        return [f"{o.kind.name}{f'({o.reason.name})' if o.reason else ''}" for o in self.fsm.outcomes]

    @property
    def digests(self) -> list[int]:
        """Digest of the live placement of each bank."""
        return [placement.digest for placement in self.fsm.placements]


def own_threads() -> list[str]:
    """Names of the library's threads that are alive in this process."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("eplb-fsm")]


def own_children() -> list[str]:
    """Processes of this rank's process group besides itself."""
    return [line for line in group_members(os.getpgrp()) if not line.startswith(f"{os.getpid()} ")]


def num_sockets() -> int:
    """Open sockets of this process."""
    count = 0
    for entry in os.listdir("/proc/self/fd"):
        try:
            count += os.readlink(f"/proc/self/fd/{entry}").startswith("socket:")
        except OSError:
            continue
    return count
