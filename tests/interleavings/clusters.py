"""What the interleaving tests share: a policy that always moves, recorded clusters, and one check of everything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import numpy as np
import torch

from eplb_fsm.config import RebalanceConfig
from eplb_fsm.core.deadlines import epoch_bound_steps
from eplb_fsm.core.invariants import every_expert_reachable, find_violations
from eplb_fsm.core.rank import Outcome
from eplb_fsm.observe.events import Event
from eplb_fsm.placement import Placement, Topology, register_policy
from eplb_fsm.placement.policies import policy_names
from eplb_fsm.simulate.cluster import SimulatedCluster, SimulatedRank
from eplb_fsm.simulate.engine import Shape

torch.set_num_threads(1)
ROW_BYTES = 40
"""Staged bytes of one simulated expert: three words, a padded float, and the hash."""


class Rotate:
    """Hands every rank the experts of the next one; a change of load changes by how many ranks."""

    name = "rotate"
    deterministic = True

    def plan(self, load: np.ndarray, current: Placement, topology: Topology) -> Placement:
        by = 1 + int(load.sum()) % max(current.num_ranks - 1, 1)
        rows = np.roll(current.physical_to_logical_map, by * current.num_local_physical_experts, axis=1)
        return Placement(rows, current.num_logical_experts, current.num_ranks)


class Shuffle:
    """Any experts in the redundant slots and any order of slots, depending on the live placement only."""

    name = "shuffle"
    deterministic = True

    def plan(self, load: np.ndarray, current: Placement, topology: Topology) -> Placement:
        rng = np.random.default_rng(current.digest % (1 << 32))
        rows = []
        for _ in range(current.num_moe_layers):
            extra = rng.integers(current.num_logical_experts, size=current.num_redundant_experts)
            rows.append(rng.permutation([*range(current.num_logical_experts), *extra]))
        return Placement(rows, current.num_logical_experts, current.num_ranks)


for _policy in (Rotate(), Shuffle()):
    if _policy.name not in policy_names():
        register_policy(_policy)


class Recorder:
    """An observer that keeps all events."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def on_event(self, event: Event) -> None:
        self.events.append(event)


def config(**changes: Any) -> RebalanceConfig:
    """Small numbers, and a policy that moves in every epoch."""
    options: dict[str, Any] = {
        "policy": "rotate",
        "step_interval": 30,
        "idle_round_interval": 5,
        "window_size": 20,
        "commit_bytes": 2 * ROW_BYTES,
        "min_gain": 0.0,
        "horizon_steps": 0,
        "backoff_steps": 10,
        "max_backoff_steps": 80,
        "max_slowdown": 0.0,
        "collecting_deadline_steps": 300,
        "computing_deadline_steps": 300,
        "awaiting_consensus_deadline_steps": 300,
        "transfer_slack_steps": 400,
        "drain_deadline_steps": 100,
        "num_redundant_experts": 0,
    }
    return RebalanceConfig(**{**options, **changes})


def shape(num_ranks: int, **changes: int) -> Shape:
    """Two layers, two slots on each rank, no redundant experts."""
    sizes = {"num_logical_experts": 2 * num_ranks, "num_physical_experts": 2 * num_ranks}
    return Shape(**{**sizes, **changes})


class Recorded:
    """A cluster whose events are kept."""

    def __init__(
        self, num_ranks: int = 3, *, seed: int = 0, options: RebalanceConfig | None = None, **how: Any
    ) -> None:
        self._made_by = f"Recorded({num_ranks}, seed={seed}, options={options}, **{how})"
        self.recorder = Recorder()
        self._own_passes = count(1)
        self.config = options or config()
        how.setdefault("shape", shape(num_ranks))
        self.cluster = SimulatedCluster(
            num_ranks, self.config, seed=seed, observers=lambda rank: [self.recorder], **how
        )

    def __repr__(self) -> str:
        return self._made_by

    @property
    def ranks(self) -> list[SimulatedRank]:
        return self.cluster.ranks

    @property
    def events(self) -> list[Event]:
        return self.recorder.events

    def bound(self, transferring_deadline_steps: int) -> int:
        """The longest epoch, for the largest lag that was used."""
        lag = max(rank.fsm.health().lag for rank in self.ranks)
        return epoch_bound_steps(self.config, lag, transferring_deadline_steps)

    def run_until_event(self, fits: Callable[[Event], bool], *, max_actions: int = 100_000, goal: int = 1) -> Event:
        """Run until an event that fits has happened ``goal`` times; return the last one."""
        seen: list[Event] = []
        position = 0

        def is_done() -> bool:
            nonlocal position
            while position < len(self.events):
                event = self.events[position]
                position += 1
                if fits(event):
                    seen.append(event)
            return len(seen) >= goal

        self.cluster.run_until(is_done, max_actions)
        assert len(seen) >= goal, "no rank runs any more"
        return seen[goal - 1]

    def check(self, *, same_outcomes: bool = True) -> None:
        """All invariants, on events, forward passes and the slots of the ranks that still run."""
        self.cluster.settle()
        assert find_violations(self.events, self.bound) == []
        assert self.cluster.torn == []
        for rank in self.cluster.living:
            for layer in rank.maps.physical_to_logical_map.tolist():
                assert every_expert_reachable(layer, self.cluster.shape.num_logical_experts) == []
            rank.engine.forward(-next(self._own_passes), rank.maps)
            assert rank.parts.runner.live_digest == rank.fsm._core.live_digest
        for rank in self.cluster.living if same_outcomes else ():
            for outcome in rank.fsm.outcomes:
                assert summary(outcome) == summary(self._first_of(outcome.epoch))

    def _first_of(self, epoch: int) -> Outcome:
        return next(o for rank in self.cluster.living for o in rank.fsm.outcomes if o.epoch == epoch)

    def check_recovers(self, *kinds: str, max_steps: int = 2000) -> None:
        """From here on the ranks finish another epoch, with COMMITTED if not told otherwise."""

        def num_finished() -> int:
            counts = self.ranks[0].fsm.health().num_outcomes
            return sum(counts[kind] for kind in kinds or ("COMMITTED",))

        before, until = num_finished(), self.ranks[0].fsm.step_idx + max_steps
        self.cluster.run_until(lambda: num_finished() > before or self.ranks[0].fsm.step_idx > until, 400_000)
        self.cluster.run_steps(10)
        assert num_finished() > before
        self.check()

    def outcomes(self) -> list[tuple[str, str]]:
        """Kind and reason of the outcomes that all living ranks have reached."""
        return min(([short(outcome) for outcome in rank.fsm.outcomes] for rank in self.cluster.living), key=len)


def short(outcome: Outcome) -> tuple[str, str]:
    """Kind and reason by name."""
    return outcome.kind.name, outcome.reason.name if outcome.reason else ""


def summary(outcome: Outcome) -> tuple[object, ...]:
    """All of an outcome that must be equal on all ranks."""
    return (*short(outcome), outcome.epoch, outcome.start_step, outcome.end_step, outcome.num_commits)


def is_read(decision: str, rank: int | None = None) -> Callable[[Event], bool]:
    """Whether an event reads this decision, on one rank or any."""
    return lambda event: (
        event.action == "ReadRound" and event.detail["decision"] == decision and (rank is None or event.rank == rank)
    )


def has_voted_staged(rank: int) -> Callable[[Event], bool]:
    """Whether an event is a promise to commit by this rank."""
    return lambda event: event.action == "PostVote" and event.rank == rank and event.detail["progress"] == 5


def reached(states: Sequence[str], rank: int) -> Callable[[Event], bool]:
    """Whether an event brings a rank into one of the states."""
    return lambda event: event.rank == rank and event.state in states
