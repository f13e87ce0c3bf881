"""A state machine of Hypothesis over a whole cluster: what happens next, and to which rank, is data that it shrinks."""

from __future__ import annotations

import random
from collections.abc import Callable

from hypothesis import strategies as st
from hypothesis import target
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from runs import NO_FAULTS, Drawn, scenarios
from watch import Watch

from eplb_fsm.core.deadlines import epoch_bound_steps
from eplb_fsm.core.invariants import find_violations
from eplb_fsm.observe.events import Event
from eplb_fsm.simulate.cluster import Action, Choice, SimulatedCluster, SimulatedRank
from eplb_fsm.simulate.scenario import TAKEN_BACK_BY, FaultKind
from eplb_fsm.simulate.strikes import repair, strike

RANKS = st.integers(0, 2)
ALL_OR_ONE = st.sampled_from((None, 0, 1, 2))
"""All ranks, or one."""
ABORTING = (
    FaultKind.POLICY_ERROR,
    FaultKind.OTHER_PLAN,
    FaultKind.PLANNER_STUCK,
    FaultKind.WORKER_STUCK,
    FaultKind.ROW_DAMAGED,
    FaultKind.TRANSFER_ERROR,
    FaultKind.LOAD_ERROR,
    FaultKind.PREPARE_ERROR,
)
ENDING = (
    FaultKind.CRASH,
    FaultKind.CLOSE,
    FaultKind.STOP,
    FaultKind.CHANNEL_LOST,
    FaultKind.TRANSPORT_LOST,
    FaultKind.WORKER_DEAD,
    FaultKind.WRITE_ERROR,
)
"""After these some rank rebalances no more, so they come late in an example."""
_NUM_RULES_BEFORE_THE_END = 15
_ENOUGH = 2
"""More of what is rare is not worth examples that differ in nothing else."""
RARE = (
    "aborts followed by commits",
    "commits while another rank is late",
    "resolved rounds",
    "ranks inside the window",
)
"""What Hypothesis is to look for."""


class Rarities:
    """Counts what seldom happens, so that Hypothesis can look for more of it; an observer of all ranks."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.late: Callable[[], set[int]] = set
        self.num = dict.fromkeys(RARE, 0)
        self._has_aborted = False

    def on_event(self, event: Event) -> None:
        """Count one event."""
        self.events.append(event)
        self._has_aborted |= event.detail.get("outcome") == "ABORTED"
        if event.detail.get("decision") == "COMMIT":
            self.num["aborts followed by commits"] += self._has_aborted
            self.num["commits while another rank is late"] += bool(self.late() - {event.rank})
        self.num["resolved rounds"] += event.action == "ResolveRound"


class ProtocolMachine(RuleBasedStateMachine):
    """Real :class:`RebalanceFSM` objects; each rule lets one thing happen, and after each everything must hold."""

    seen: dict[str, int] | None = None
    """Where a test wants to know what all examples together have shown."""

    def __init__(self) -> None:
        super().__init__()
        self.rarities = Rarities()
        self.num_checked = 0
        self.num_rules = 0

    @initialize(setup=scenarios(NO_FAULTS))
    def start(self, setup: Drawn) -> None:
        """Make the cluster."""
        self.setup = setup
        self.cluster = SimulatedCluster(
            setup.num_ranks,
            setup.config,
            shape=setup.shape,
            lag=setup.lag,
            is_lockstep=setup.is_lockstep,
            is_one_sided=setup.is_one_sided,
            max_passes_ahead=setup.max_passes_ahead,
            has_pass_ids=setup.has_pass_ids,
            observers=lambda rank: (self.rarities,),
        )
        self.cluster.worker_share = setup.worker_share
        self.cluster.max_vain_polls = 1 << 62  # time passes by a rule of its own
        self.rarities.late = lambda: {rank.rank for rank in self.cluster.living if rank.is_waiting}
        self.watch = Watch(self.cluster, self.rarities.events)

    def _has_ranks(self) -> bool:
        return bool(self.cluster.living)

    def _may_end(self) -> bool:
        is_whole = len(self.cluster.living) == len(self.cluster.ranks)
        return is_whole and self.num_rules > _NUM_RULES_BEFORE_THE_END

    def _may_time_pass(self) -> bool:
        """Where a rank is in the window; elsewhere a rank that waits too long ends rebalancing for all."""
        return self.num_rules > _NUM_RULES_BEFORE_THE_END or any(its.fsm._core.in_window for its in self.cluster.living)

    def _rank(self, rank: int) -> SimulatedRank:
        return self.cluster.living[rank % len(self.cluster.living)]

    def _ranks(self, rank: int | None) -> list[SimulatedRank]:
        return [*self.cluster.living] if rank is None else [self._rank(rank)]

    # -- what goes well -------------------------------------------------------------------------------------------

    @rule(order=st.integers(0, 2**32 - 1), num=st.sampled_from((40, 10, 80, 3)))
    def turns(self, order: int, num: int) -> None:
        """All ranks go on for a while, in any order."""
        self._act(order, num, lambda: False)

    @precondition(_has_ranks)
    @rule(order=st.integers(0, 2**32 - 1), rank=RANKS, delayed=st.sampled_from(((), (0,), (0, 1, 2))))
    def promise(self, order: int, rank: int, delayed: tuple[int, ...]) -> None:
        """All ranks go on until one has promised to commit, or for a while; the decision may not reach it, or any."""
        its = self._rank(rank)
        self._act(order, 300, lambda: its.fsm._core.in_window)
        for other in {self._rank(rank + ahead).rank for ahead in delayed if self.cluster.living}:
            strike(FaultKind.ROUNDS_HELD, self.cluster, self.cluster.ranks[other])

    @precondition(_has_ranks)
    @rule(order=st.integers(0, 2**32 - 1), rank=RANKS)
    def end(self, order: int, rank: int) -> None:
        """Everything goes well again, and all ranks go on until an epoch has ended on one, or for a while."""
        for its in self.cluster.living:
            repair(its)
            for kind in TAKEN_BACK_BY.values():
                strike(kind, self.cluster, its)
        its, num = self._rank(rank), len(self._rank(rank).fsm.outcomes)
        self._act(order, 300, lambda: len(its.fsm.outcomes) > num)

    def _act(self, order: int, num: int, is_done: Callable[[], bool]) -> None:
        self.cluster.random = random.Random(order)
        for _ in range(num):
            if not self.cluster.living or is_done():
                break
            self.cluster.act()

    @precondition(_has_ranks)
    @rule(rank=ALL_OR_ONE, num=st.integers(1, 3))
    def step(self, rank: int | None, num: int) -> None:
        """Ranks make forward passes and steps, as far as they get."""
        for its in self._ranks(rank):
            for _ in range(num):
                if its.is_alive:
                    self.cluster.step(its)

    @precondition(_has_ranks)
    @rule(rank=ALL_OR_ONE)
    def finish(self, rank: int | None) -> None:
        """Workers go on to the end of what they can do."""
        for its in self._ranks(rank):
            its.faults.is_worker_stuck = not its.worker.is_alive
            its.faults.is_planner_stuck = False
            for _ in range(20):
                if its.faults.is_worker_stuck or not its.worker.advance():
                    break

    @precondition(_has_ranks)
    @rule(rank=ALL_OR_ONE)
    def catch_up(self, rank: int | None) -> None:
        """Devices execute all that was enqueued."""
        for its in self._ranks(rank):
            for _ in range(its.device.num_pending):
                if its.is_alive:
                    self.cluster.take(Choice(its.rank, Action.DEVICE))

    @precondition(_has_ranks)
    @rule(rank=RANKS)
    def mark(self, rank: int) -> None:
        """A watchdog shows a mark."""
        self.cluster.show_mark(self._rank(rank))

    @precondition(_has_ranks)
    @rule(rank=RANKS)
    def request(self, rank: int) -> None:
        """The engine asks for an epoch, and takes back what it asked for before."""
        for its in self.cluster.living:
            its.fsm.request_unfreeze()
        self._rank(rank).fsm.request_rebalance()

    # -- what goes wrong ------------------------------------------------------------------------------------------

    @precondition(_may_time_pass)
    @rule(seconds=st.sampled_from((1.1, 0.4)))
    def time(self, seconds: float) -> None:
        """Time passes, and who waits looks; the limits of all waits are one second."""
        self.cluster.clock.advance(seconds)
        for its in [*self.cluster.living]:
            if its.is_waiting:
                self.cluster.step(its)

    @precondition(_has_ranks)
    @rule(rank=ALL_OR_ONE)
    def delay(self, rank: int | None) -> None:
        """Rounds do not reach some ranks any more."""
        for its in self._ranks(rank):
            strike(FaultKind.ROUNDS_HELD, self.cluster, its)

    @precondition(_has_ranks)
    @rule(rank=ALL_OR_ONE)
    def deliver(self, rank: int | None) -> None:
        """They do again."""
        for its in self._ranks(rank):
            strike(FaultKind.ROUNDS_DELIVERED, self.cluster, its)

    @precondition(_has_ranks)
    @rule(rank=RANKS, kind=st.sampled_from(ABORTING))
    def fail(self, rank: int, kind: FaultKind) -> None:
        """A job, the transport or the policy of a rank fails, or its plan differs."""
        strike(kind, self.cluster, self._rank(rank))

    @precondition(_has_ranks)
    @rule(rank=RANKS, wish=st.sampled_from((FaultKind.ABORT, FaultKind.FREEZE)))
    def ask(self, rank: int, wish: FaultKind) -> None:
        """The engine asks for an abort or a freeze."""
        strike(wish, self.cluster, self._rank(rank))

    @precondition(_may_end)
    @rule(rank=RANKS, kind=st.sampled_from(ENDING))
    def lose(self, rank: int, kind: FaultKind) -> None:
        """A rank crashes, is closed or stops, or loses what it cannot do without."""
        strike(kind, self.cluster, self._rank(rank))

    @precondition(_may_end)
    @rule(order=st.integers(0, 2**32 - 1), rank=RANKS, num_steps=st.integers(0, 4), num_lost=RANKS)
    def lose_decision(self, order: int, rank: int, num_steps: int, num_lost: int) -> None:
        """Everything goes well until a rank promises; then the decision is lost on it, and perhaps on others."""
        self.end(order, rank)
        if not self.cluster.living:
            return
        its = self._rank(rank)
        self._act(order, 300, lambda: its.fsm._core.in_window)
        self._act(order, 20 * num_steps, lambda: its.is_waiting or not its.fsm._core.in_window)
        for other in [*self.cluster.living][rank % len(self.cluster.living) :][: num_lost + 1]:
            strike(FaultKind.ROUNDS_HELD, self.cluster, other)
        for _ in range(3):
            self.step(None, 3)
            self.time(1.1)

    # -- what must hold -------------------------------------------------------------------------------------------

    @invariant()
    def slots_and_maps(self) -> None:
        """On the devices, now."""
        self.num_rules += 1
        assert self.watch.torn() + self.watch.slots() == []

    @invariant()
    def events(self) -> None:
        """Over all events, whenever there are new ones."""
        if len(self.rarities.events) == self.num_checked:
            return
        self.num_checked = len(self.rarities.events)
        found = find_violations(self.rarities.events, self._bound)
        assert [*found, *self.watch.stops()] == []
        in_window = sum(rank.parts.rounds.journal.gave_up_round > 0 for rank in self.cluster.ranks)
        self.rarities.num["ranks inside the window"] = in_window

    def _bound(self, transferring_deadline_steps: int) -> int:
        return epoch_bound_steps(self.setup.config, self.setup.lag, transferring_deadline_steps)

    def teardown(self) -> None:
        """Let the devices catch up, look once more, and say how rare this was."""
        if not hasattr(self, "watch"):
            return
        self.cluster.settle()
        assert self.watch.torn() + self.watch.slots() + self.watch.beliefs() == []
        for name, number in self.rarities.num.items():
            target(min(number, _ENOUGH), label=name)
            if self.seen is not None:
                self.seen[name] = self.seen.get(name, 0) + (number > 0)
