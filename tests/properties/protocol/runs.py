"""Runs of the explorer, drawn by Hypothesis: a configuration, faults and a schedule as data, and all that must hold."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st
from watch import Watch

from eplb_fsm.config import RebalanceConfig
from eplb_fsm.core.states import ACTIVE_STATES, State
from eplb_fsm.core.votes import Vote
from eplb_fsm.placement import Placement, Topology, register_policy
from eplb_fsm.placement.policies import policy_names
from eplb_fsm.simulate.cluster import SimulatedCluster
from eplb_fsm.simulate.engine import Shape
from eplb_fsm.simulate.run import Run
from eplb_fsm.simulate.scenario import NEEDS_PASS_IDS, TAKEN_BACK_BY, Fault, FaultKind, Scenario
from eplb_fsm.simulate.strikes import strike


class ShuffleByLoad:
    """Any experts in the redundant slots and any order of slots; changes with the load and the live placement."""

    name = "shuffle_by_load"
    deterministic = True

    def plan(self, load: np.ndarray, current: Placement, topology: Topology) -> Placement:
        """Draw a placement."""
        rng = np.random.default_rng([current.digest % (1 << 32), int(load.sum())])
        rows = []
        for _ in range(current.num_moe_layers):
            extra = rng.integers(current.num_logical_experts, size=current.num_redundant_experts)
            rows.append(rng.permutation([*range(current.num_logical_experts), *extra]))
        return Placement(rows, current.num_logical_experts, current.num_ranks)


if ShuffleByLoad.name not in policy_names():
    register_policy(ShuffleByLoad())


@dataclass(frozen=True)
class Drawn(Scenario):
    """A scenario in which a rank may hold several slots, so that the chunks of a plan touch the same rows.

    Attributes:
        slots_per_rank: With more than one a layer is cut into several chunks.
        at_promises: What strikes a rank right after it has cast its n-th promise to commit: rank, n, fault.
        healed_rank: Rounds that were held reach it once another rank has said STOP, -1 for none.
        stale_rank: A rank that votes for another membership, -1 for none.
    """

    slots_per_rank: int = 1
    at_promises: tuple[tuple[int, int, FaultKind], ...] = ()
    healed_rank: int = -1
    stale_rank: int = -1

    @property
    def config(self) -> RebalanceConfig:
        """The options of all ranks."""
        return super().config if self.slots_per_rank == 1 else _with_replicas(super().config, self.num_redundant)

    @property
    def shape(self) -> Shape:
        """As many experts as ranks."""
        return Shape(self.num_chunks, self.num_ranks, self.num_ranks + self.num_redundant, num_words=1)

    @property
    def num_redundant(self) -> int:
        """Slots beyond one for each expert."""
        return (self.slots_per_rank - 1) * self.num_ranks


@cache
def _with_replicas(config: RebalanceConfig, num_redundant: int) -> RebalanceConfig:
    return replace(config, policy=ShuffleByLoad.name, num_redundant_experts=num_redundant)


def broken_in(scenario: Drawn, *, is_strict: bool = False) -> list[str]:
    """Run a scenario; return a sentence for each invariant that broke, with its name before it.

    Args:
        scenario: The run.
        is_strict: A pass that was torn because the engine left out a step() counts, too.
    """
    run = Run(scenario)
    watch = Watch(run.cluster, run.journal.events)
    _react(watch, scenario, run.cluster)
    if scenario.stale_rank >= 0:
        run.cluster.ranks[scenario.stale_rank].fsm._core.generation = 1
    found = run.result().violations
    found += watch.stops()
    if not any(text.startswith(("raised", "live_equals_map")) for text in found):
        found += watch.beliefs()
    if is_strict:
        found += watch.torn()
    if scenario.stale_rank >= 0:
        found += [
            f"same_membership: round {event.round_idx} decides {event.detail['decision']} on rank {event.rank}"
            for event in run.journal.events
            if event.action == "ReadRound" and event.detail["decision"] != "STOP"
        ]
    return found


def _react(watch: Watch, scenario: Drawn, cluster: SimulatedCluster) -> None:
    """Let happen what follows a vote."""
    num_promises = [0] * scenario.num_ranks

    def on_vote(rank: int, vote: Vote) -> None:
        num_promises[rank] += vote.promises_commit
        for its_rank, nth, kind in scenario.at_promises:
            if vote.promises_commit and (its_rank, nth) == (rank, num_promises[rank]):
                strike(kind, cluster, cluster.ranks[rank])
        if vote.stop and scenario.healed_rank >= 0:
            strike(FaultKind.ROUNDS_DELIVERED, cluster, cluster.ranks[scenario.healed_rank])

    watch.on_vote = on_vote


# -- drawing ----------------------------------------------------------------------------------------------------

SOUND_ENGINE = tuple(kind for kind in FaultKind if kind not in (*NEEDS_PASS_IDS, *TAKEN_BACK_BY.values()))
"""What an engine that calls step() after every pass can meet; what takes a fault back is drawn with it."""


class Aim(NamedTuple):
    """Which faults are drawn.

    Attributes:
        kinds: Their kinds.
        states: The states in which they strike.
        is_at_promise: They strike ranks that have just promised to commit instead.
        moves_nothing: The policy sees no gain.
    """

    kinds: tuple[FaultKind, ...] = SOUND_ENGINE
    states: tuple[State, ...] = (*ACTIVE_STATES, State.TRANSFERRING, State.IDLE)
    is_at_promise: bool = False
    moves_nothing: bool = False


ANY = Aim()
NO_FAULTS = Aim(())


def some_ranks(num_ranks: int) -> st.SearchStrategy[list[int]]:
    """One rank, or all of them."""
    return st.one_of(st.integers(0, num_ranks - 1).map(lambda rank: [rank]), st.just([*range(num_ranks)]))


@st.composite
def faults(draw: st.DrawFn, num_ranks: int, aim: Aim) -> list[Fault]:
    """One fault on one rank or on all of them, and what takes it back, if anything does."""
    kind, state, epoch = draw(st.sampled_from(aim.kinds)), draw(st.sampled_from(aim.states)), draw(st.integers(1, 2))
    nth = draw(st.integers(1, 40))
    drawn = []
    for rank in draw(some_ranks(num_ranks)):
        first = Fault(kind, rank, 0 if state is State.IDLE else epoch, state, nth + draw(st.integers(0, 3)))
        drawn.append(first)
        if kind in TAKEN_BACK_BY and draw(st.booleans()):
            ends_in = state if draw(st.booleans()) else State.IDLE
            end = first._replace(kind=TAKEN_BACK_BY[kind], state=ends_in, nth=first.nth + draw(st.integers(1, 40)))
            drawn.append(end)
    return drawn


@st.composite
def faults_at_promises(draw: st.DrawFn, num_ranks: int, aim: Aim) -> tuple[tuple[int, int, FaultKind], ...]:
    """One fault on one rank or on all of them, each after its n-th promise."""
    kind, nth = draw(st.sampled_from(aim.kinds)), draw(st.integers(1, 4))
    return tuple((rank, nth, kind) for rank in draw(some_ranks(num_ranks)))


@st.composite
def scenarios(draw: st.DrawFn, aim: Aim = ANY) -> Drawn:
    """A configuration, some faults, and the seed of a schedule."""
    num_ranks = draw(st.integers(2, 3))
    slots_per_rank = 1 if aim.moves_nothing else draw(st.integers(1, 2))
    num_faults = draw(st.sampled_from((2, 1, 3, 1, 2, 0))) if aim.kinds and not aim.is_at_promise else 0
    drawn = [fault for _ in range(num_faults) for fault in draw(faults(num_ranks, aim))]
    at_promises = draw(faults_at_promises(num_ranks, aim)) if aim.is_at_promise else ()
    kinds = {*(fault.kind for fault in drawn), *(kind for _, _, kind in at_promises)}
    return Drawn(
        seed=draw(st.integers(0, 2**32 - 1)),
        num_ranks=num_ranks,
        is_lockstep=draw(st.booleans()),
        lag=draw(st.integers(1, 3)),
        num_chunks=draw(st.sampled_from((3, 2, 4, 1) if slots_per_rank == 1 else (1, 2))),
        staging_buffers=draw(st.sampled_from((2, 1, 3))),
        max_passes_ahead=draw(st.integers(0, 2)),
        is_one_sided=draw(st.booleans()),
        has_pass_ids=draw(st.booleans()) or bool(kinds.intersection(NEEDS_PASS_IDS)),
        plans_everywhere=draw(st.booleans()) or FaultKind.OTHER_PLAN in kinds,
        moves_nothing=aim.moves_nothing,
        step_interval=draw(st.sampled_from((1, 2, 4))),
        worker_share=draw(st.sampled_from((0.85, 0.6, 0.3))),
        num_epochs=draw(st.sampled_from((2, 1))),
        faults=tuple(drawn),
        ends_when_committed=False,
        slots_per_rank=slots_per_rank,
        at_promises=at_promises,
        healed_rank=draw(st.integers(-1, num_ranks - 1)),
    )
