"""What one seed stands for: a small configuration, and the faults of the run, drawn before it begins."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from eplb_fsm.config import RebalanceConfig
from eplb_fsm.core.states import ACTIVE_STATES, State
from eplb_fsm.placement.placement import Placement
from eplb_fsm.placement.policies import policy_names, register_policy
from eplb_fsm.placement.topology import Topology
from eplb_fsm.placement.validate import Float64Array
from eplb_fsm.simulate.engine import Shape

ROW_BYTES = 24
"""Staged bytes of one simulated expert of one word: the word, a padded float, and the hash."""


class FaultKind(Enum):
    """What can happen to a rank; the value is the word in reports."""

    CRASH = "crash"
    CLOSE = "close"
    CHANNEL_LOST = "channel lost"
    ROUNDS_HELD = "rounds held"
    ROUNDS_DELIVERED = "rounds delivered"
    POLICY_ERROR = "policy error"
    OTHER_PLAN = "other plan"
    PLANNER_STUCK = "planner stuck"
    PLANNER_RETURNS = "planner returns"
    WORKER_STUCK = "worker stuck"
    WORKER_GOES_ON = "worker goes on"
    WORKER_DEAD = "worker dead"
    ROW_DAMAGED = "row damaged"
    TRANSFER_ERROR = "transfer error"
    LOAD_ERROR = "load error"
    TRANSPORT_LOST = "transport lost"
    PREPARE_ERROR = "map cannot be prepared"
    WRITE_ERROR = "map cannot be written"
    FREEZE = "freeze"
    UNFREEZE = "unfreeze"
    ABORT = "abort requested"
    STOP = "stop requested"
    STEP_SKIPPED = "step skipped"
    STEP_DOUBLED = "step doubled"


TAKEN_BACK_BY = {
    FaultKind.ROUNDS_HELD: FaultKind.ROUNDS_DELIVERED,
    FaultKind.PLANNER_STUCK: FaultKind.PLANNER_RETURNS,
    FaultKind.WORKER_STUCK: FaultKind.WORKER_GOES_ON,
    FaultKind.FREEZE: FaultKind.UNFREEZE,
}
"""Faults that another one ends."""
NEEDS_PASS_IDS = (FaultKind.STEP_SKIPPED, FaultKind.STEP_DOUBLED)
"""Without the number of the pass no tally can show them (``docs/explanation/assumptions.md``)."""


class Fault(NamedTuple):
    """One fault, drawn before the action that it hits.

    Attributes:
        epoch: It waits for this epoch of its rank, or a later one,
        state: and for this state,
        nth: and strikes before that action there, counted from 1,
        follows: not before a round is out that the fault before it in the scenario can have changed.
        since: Actions of the run before it was drawn; it waits from then on.
    """

    kind: FaultKind
    rank: int
    epoch: int
    state: State
    nth: int
    follows: bool = False
    since: int = 0

    def __str__(self) -> str:
        when = f"epoch {self.epoch}, {self.state.value}, action {self.nth}"
        return f"{self.kind.value}: rank {self.rank}, {when}{', after the one before' * self.follows}"


class Target(NamedTuple):
    """What a run is to show: a fault in a state, and the decision of the round that the fault meets."""

    state: State
    decision: str
    fault: FaultKind


@dataclass(frozen=True, slots=True)
class Scenario:
    """One run but for the order of its actions, which :attr:`seed` decides."""

    seed: int
    num_ranks: int
    is_lockstep: bool
    lag: int
    num_chunks: int
    staging_buffers: int
    max_passes_ahead: int
    is_one_sided: bool
    has_pass_ids: bool
    plans_everywhere: bool
    moves_nothing: bool
    step_interval: int
    worker_share: float
    num_epochs: int
    """Epochs after which the run is over."""
    faults: tuple[Fault, ...]
    ends_when_committed: bool = True
    """An epoch that went well ends the run, too: what follows shows little that is new."""

    @property
    def config(self) -> RebalanceConfig:
        """The options of all ranks."""
        return _make_config(
            policy=_Stay.name if self.moves_nothing else _Rotate.name,
            plan_source="every_rank" if self.plans_everywhere else "lowest_rank",
            lag=self.lag,
            staging_buffers=self.staging_buffers,
            step_interval=self.step_interval,
        )

    @property
    def shape(self) -> Shape:
        """One slot on each rank; a rotation of a layer is one chunk."""
        return Shape(self.num_chunks, self.num_ranks, self.num_ranks, num_words=1)


@cache
def _make_config(**options: Any) -> RebalanceConfig:
    """Small deadlines, so that a stuck worker costs few steps."""
    return RebalanceConfig(
        planner="thread",
        idle_round_interval=1,
        window_size=1000,
        commit_bytes=ROW_BYTES,
        min_gain=0.0,
        horizon_steps=0,
        load_decay=0.0,
        backoff_steps=1,
        max_backoff_steps=4,
        max_slowdown=0.0,
        collecting_deadline_steps=12,
        computing_deadline_steps=12,
        awaiting_consensus_deadline_steps=12,
        transfer_slack_steps=8,
        drain_deadline_steps=12,
        vote_timeout_s=1.0,
        resolve_timeout_s=1.0,
        **options,
    )


class _Rotate:
    """Hands every rank the expert of another one; a change of load changes of which."""

    name = "simulated_rotate"
    deterministic = True

    def plan(self, load: Float64Array, current: Placement, topology: Topology) -> Placement:
        """Rotate every layer."""
        by = 1 + int(load.sum()) % max(current.num_ranks - 1, 1)
        rows = np.roll(current.physical_to_logical_map, by, axis=1)
        return Placement(rows, current.num_logical_experts, current.num_ranks)


class _Stay:
    """Finds everything well as it is."""

    name = "simulated_stay"
    deterministic = True

    def plan(self, load: Float64Array, current: Placement, topology: Topology) -> Placement:
        """Return what is."""
        return current


for _policy in (_Rotate(), _Stay()):
    if _policy.name not in policy_names():
        register_policy(_policy)


def draw_scenario(seed: int, num_ranks: int, is_lockstep: bool | None, targets: Sequence[Target] = ()) -> Scenario:
    """Draw a configuration and faults; the same for the same arguments, in any process.

    Args:
        seed: The seed.
        num_ranks: Ranks.
        is_lockstep: None: drawn too.
        targets: Every second seed aims at one of them, in turn; the others leave all to chance.
    """
    rng = random.Random(seed)
    target = targets[seed // 2 % len(targets)] if targets and seed % 2 else None
    faults = _aimed(rng, num_ranks, target) if target else _any_faults(rng, num_ranks)
    wants_commit = target is not None and target.decision == "COMMIT"
    drawn_lockstep = rng.random() < 0.5
    kinds = {fault.kind for fault in faults}
    plans_everywhere = rng.random() < 0.6 or FaultKind.OTHER_PLAN in kinds
    plans_everywhere |= target is not None and target.state in _PLANNING
    return Scenario(
        seed=seed,
        num_ranks=num_ranks,
        is_lockstep=drawn_lockstep if is_lockstep is None else is_lockstep,
        # A round that is out for longer is easier to hit.
        lag=rng.choice((1, 1, 1, 2, 3) if target is None else (1, 3, 3)),
        num_chunks=rng.choice((3, 4) if wants_commit else (1, 1, 1, 2, 3, 4)),
        staging_buffers=rng.choice((2, 1, 3)),
        max_passes_ahead=rng.choice((0, 1, 2)),
        is_one_sided=rng.random() < 0.5,
        has_pass_ids=rng.random() < 0.5 or bool(kinds.intersection(NEEDS_PASS_IDS)),
        plans_everywhere=plans_everywhere,
        moves_nothing=rng.random() < 0.1 if target is None else target.decision == "SKIP",
        step_interval=rng.choice((1, 2, 4)),
        worker_share=0.85 if wants_commit else rng.choice((0.3, 0.6, 0.7, 0.8)),
        num_epochs=2 if len(faults) and rng.random() < 0.9 else 1,
        faults=tuple(faults),
    )


def redraw_faults(
    scenario: Scenario, seed: int, epoch: int, since: int, targets: Sequence[Target] = ()
) -> tuple[Fault, ...]:
    """Draw the faults that are still to come in a run that is under way.

    Args:
        scenario: The run; its configuration stays.
        seed: Decides them, with ``since``.
        epoch: The epoch that is under way, or the last one.
        since: Actions that it has made.
        targets: Most draws aim at one of them.
    """
    rng = random.Random(seed << 16 | since)
    drawn = rng.choices(targets, k=_NUM_AIMS) if targets and rng.random() < _AIMED_SHARE else []
    target = next((target for target in drawn if _suits(scenario, target)), None)
    faults = _aimed(rng, scenario.num_ranks, target) if target else _any_faults(rng, scenario.num_ranks)
    return tuple(
        fault._replace(epoch=fault.epoch + max(epoch - 1, 0), since=since)
        for fault in faults
        if scenario.has_pass_ids or fault.kind not in NEEDS_PASS_IDS
    )


_AIMED_SHARE = 0.75
_NUM_AIMS = 8
"""Targets that are drawn until one suits."""


def _suits(scenario: Scenario, target: Target) -> bool:
    """Whether a run of this configuration can show a target."""
    if target.state in _PLANNING and not scenario.plans_everywhere:
        return False
    if target.decision == "SKIP" or target.decision in _MOVING or target.state is State.TRANSFERRING:
        return scenario.moves_nothing == (target.decision == "SKIP")
    return scenario.has_pass_ids or target.fault not in NEEDS_PASS_IDS


_ABORTING = (
    FaultKind.ABORT,
    FaultKind.ABORT,
    FaultKind.POLICY_ERROR,
    FaultKind.ROW_DAMAGED,
    FaultKind.OTHER_PLAN,
    FaultKind.PREPARE_ERROR,
)
_COMPANION = {"FREEZE": FaultKind.FREEZE, "ABORT": FaultKind.ABORT, "STOP": FaultKind.STOP}
_LOSING = (FaultKind.CRASH, FaultKind.CHANNEL_LOST, FaultKind.CLOSE)


def _any_faults(rng: random.Random, num_ranks: int) -> list[Fault]:
    """Mostly one fault that ends the epoch and lets the next one run; sometimes others, sometimes none."""
    choice = rng.random()
    if choice < 0.1:
        return []
    kinds = [rng.choice(_ABORTING)] if choice < 0.7 else rng.choices(tuple(FaultKind), k=rng.choice((1, 2, 3)))
    faults = []
    for kind in kinds:
        state = rng.choice(ACTIVE_STATES if choice < 0.7 or rng.random() < 0.9 else (State.IDLE,))
        faults.append(Fault(kind, rng.randrange(num_ranks), 1, state, rng.choice((1, 1, 2, 3, 5))))
    return _with_ends(rng, faults)


class _Hold(NamedTuple):
    """How a rank is kept in a state until something else happens."""

    kind: FaultKind
    is_own: bool
    """Whether it is the rank itself that is held back, or another one that the rank then waits for."""
    state: State
    """The state in which the fault holds it back."""
    others_state: State
    """The state in which the other rank is meanwhile."""


_HOLDS = {
    State.COLLECTING: _Hold(FaultKind.WORKER_STUCK, True, State.COLLECTING, State.COLLECTING),
    State.COMPUTING: _Hold(FaultKind.PLANNER_STUCK, True, State.COLLECTING, State.AWAITING_CONSENSUS),
    State.AWAITING_CONSENSUS: _Hold(FaultKind.PLANNER_STUCK, False, State.COLLECTING, State.COMPUTING),
    State.TRANSFERRING: _Hold(FaultKind.WORKER_STUCK, False, State.TRANSFERRING, State.TRANSFERRING),
}
_PLANNING = (State.COMPUTING, State.AWAITING_CONSENSUS)
"""To hold one rank there, every rank must plan for itself."""
_MOVING = ("BEGIN", "COMMIT")
_AGREED_IN_TIME = ("START", "SKIP", "BEGIN", "COMMIT")
"""Decisions that come by themselves if nobody is held back."""


def _aimed(rng: random.Random, num_ranks: int, target: Target) -> list[Fault]:
    """The fault of the target, and what may bring its decision about; often in the epoch after an aborted one."""
    rank, state = rng.randrange(num_ranks), target.state
    other = (rank + rng.randrange(1, num_ranks)) % num_ranks
    epoch = 0 if state is State.IDLE else 1
    faults = []
    if rng.random() < 0.5:
        faults.append(Fault(FaultKind.ABORT, rng.randrange(num_ranks), 1, rng.choice(ACTIVE_STATES), 1))
        epoch += 1
    meets = state
    hold = _HOLDS.get(state)
    if hold is not None and target.decision not in _AGREED_IN_TIME:
        faults.append(Fault(hold.kind, rank if hold.is_own else other, epoch, hold.state, 1))
        meets = hold.others_state
    kind = FaultKind.STOP if state is State.STOPPED else _COMPANION.get(target.decision)
    if target.decision == NO_DECISION and state is not State.STOPPED:
        kind = rng.choice(_LOSING)
    if kind is not None:
        meets = rng.choice(ACTIVE_STATES) if state is State.STOPPED else meets
        faults.append(Fault(kind, other, epoch, meets, rng.choice((1, 2, 3, 5))))
    nth = rng.randrange(10, 40) if target.decision == "COMMIT" else rng.randrange(1, 4 if kind else 8)
    faults.append(Fault(target.fault, rank, epoch, state, nth, follows=kind is not None))
    return _with_ends(rng, faults)


def _with_ends(rng: random.Random, faults: list[Fault]) -> list[Fault]:
    """Most faults that last are taken back once the epoch is over, some earlier, some never."""
    ends = []
    for fault in faults:
        kind = TAKEN_BACK_BY.get(fault.kind)
        if kind is not None and rng.random() < 0.8:
            state = State.IDLE if rng.random() < 0.7 else fault.state
            ends.append(Fault(kind, fault.rank, fault.epoch, state, fault.nth + rng.choice((2, 4, 8))))
    return [*faults, *ends]


NO_DECISION = "none read"
"""The round that a fault met was never read by any rank, or there was none."""
