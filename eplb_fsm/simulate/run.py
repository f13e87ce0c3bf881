"""One run: a scenario under a seeded schedule, recorded, checked, and put into its equivalence class."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from eplb_fsm.core.deadlines import epoch_bound_steps
from eplb_fsm.core.invariants import every_expert_reachable, find_violations
from eplb_fsm.core.states import State
from eplb_fsm.observe.events import Event
from eplb_fsm.simulate.cluster import Action, Choice, SimulatedCluster, SimulatedRank
from eplb_fsm.simulate.engine import WrongForwardError
from eplb_fsm.simulate.journal import Journal
from eplb_fsm.simulate.scenario import NEEDS_PASS_IDS, NO_DECISION, Fault, Scenario, Target, redraw_faults
from eplb_fsm.simulate.strikes import repair, strike

_MAX_STEPS = 80
"""Steps after which a run is over, whatever it has shown: a freeze that nobody takes back lasts for ever."""
_MAX_QUIET_ACTIONS = 500
"""Actions without any event after which a run stands still."""
_TAIL_STEPS = 3
"""Steps after the last outcome: forward passes with the last maps."""
_FIRST_BRANCH = 60
"""Actions before the first moment at which a run may branch."""
_BRANCH_ACTIONS = 20
"""Actions from one moment at which a run may branch to the next, at least."""
_OWN_PASS = -1
"""Number of the forward pass that only looks at the slots at the end."""

_BROKEN_BY_A_WRONG_STEP = ("same_decision", "same_step_commit", "commit_cannot_fail", "outcome_recorded")

Schedule = Sequence[Choice | None]
"""The choices of a run in order; None, like the end of the list, stands for :func:`default_choice`."""


def default_choice(position: int, num_ranks: int) -> Choice:
    """Return the choice of a schedule without chance: round robin, all workers and then all steps."""
    turn, rank = divmod(position, num_ranks)
    return Choice(rank, Action.STEP if turn % 2 else Action.WORK)


@dataclass(slots=True)
class RunResult:
    """What one run has shown.

    Attributes:
        violations: A sentence for each invariant that broke; empty if all held.
        schedule: Every choice of the scheduler.
        interleaving: Hash of its equivalence class: the order of what happens on each rank and on each channel.
            Equal on all machines with one version of Python, whatever its hash seed.
        states: Hashes of the cluster states that it went through: the projected states of all ranks.
        hits: For each fault that struck, the state that it met and the decision of the round that was out.
        num_epochs: Epochs that ended on every rank that still runs; 0 if none runs.
        has_second_epoch: Whether an aborted epoch was followed by another one to its end.
    """

    scenario: Scenario
    violations: list[str]
    schedule: list[Choice]
    events: list[Event]
    interleaving: int
    states: set[int]
    hits: list[Target]
    num_epochs: int
    has_second_epoch: bool

    @property
    def digest(self) -> str:
        """A hash of every event and every choice: equal if and only if two runs are the same bit for bit."""
        words = [[*map(str, event_words(event))] for event in self.events]
        return hashlib.blake2b(repr((words, self.schedule)).encode(), digest_size=16).hexdigest()


def event_words(event: Event) -> tuple[Any, ...]:
    """Return all that an event says, in the order of its fields."""
    return (
        *(event.seq, event.rank, event.step_idx, event.action, event.state, event.epoch, event.round_idx),
        *(event.chunk_idx, event.num_staged, event.is_drained, event.is_frozen, event.live_digest),
        *(f"{name}={value}" for name, value in event.detail.items()),
    )


class Run:
    """A scenario being run.

    Args:
        scenario: The run but for its schedule.
        schedule: The choices; None: drawn from the scenario's seed.
    """

    def __init__(self, scenario: Scenario, schedule: Schedule | None = None) -> None:
        self.scenario = scenario
        self.journal = Journal(scenario.num_ranks)
        self._given = schedule
        self._schedule: list[Choice] = []
        self._hits: list[tuple[Fault, State, int]] = []
        self._pending = [[fault for fault in scenario.faults if fault.rank == rank] for rank in self._rank_range]
        self._waited: dict[Fault, int] = {}
        self._changes_from: dict[Fault, int] = {}
        """The first round in which the rank votes after a fault."""
        self._num_repaired = [0] * scenario.num_ranks
        self._num_seen = self._num_quiet = 0
        self._last_step = _MAX_STEPS
        self._branch_at = _FIRST_BRANCH
        self._is_over = self._stands_still = False
        self._broken: list[str] = []
        self.cluster = SimulatedCluster(
            scenario.num_ranks,
            scenario.config,
            seed=scenario.seed,
            shape=scenario.shape,
            lag=scenario.lag,
            is_lockstep=scenario.is_lockstep,
            is_one_sided=scenario.is_one_sided,
            max_passes_ahead=scenario.max_passes_ahead,
            has_pass_ids=scenario.has_pass_ids,
            observers=lambda rank: (self.journal,),
        )
        self.cluster.worker_share = scenario.worker_share
        self.cluster.device_share = 0.1 if scenario.max_passes_ahead else 0.0
        self.cluster.max_vain_polls = 4

    @property
    def _rank_range(self) -> range:
        return range(self.scenario.num_ranks)

    def result(self, seed: int | None = None) -> RunResult:
        """Run to the end, check everything, and say what was seen.

        Args:
            seed: What to call the run; None: the scenario's own seed.
        """
        self.go_on()
        violations = list(self._broken or self._check_all())
        if self._stands_still and len(self.cluster.living) == self.scenario.num_ranks:
            violations.append(
                f"stands still: {[(rank.fsm.state.value, rank.is_waiting) for rank in self.cluster.ranks]}"
            )
        return RunResult(
            scenario=self.scenario if seed is None else replace(self.scenario, seed=seed),
            violations=violations,
            schedule=list(self._schedule),
            events=list(self.journal.events),
            interleaving=self.journal.interleaving(),
            states=set(self.journal.states),
            hits=self._targets(),
            num_epochs=min((len(self.journal.outcomes[rank.rank]) for rank in self.cluster.living), default=0),
            has_second_epoch=any(map(_has_second_epoch, self.journal.outcomes)),
        )

    # -- running ------------------------------------------------------------------------------------------------

    def go_on(self, *, to_branch: bool = False) -> bool:
        """Act until the run is over, or comes to the next moment at which it may branch; True if it came to one.

        That is a moment in which no job is under way, some actions after the last one: it can be saved, and
        :meth:`reseed` makes another run of what follows.
        """
        try:
            while not self._is_over:
                if to_branch and len(self._schedule) >= self._branch_at and self._has_no_jobs():
                    self._branch_at = len(self._schedule) + _BRANCH_ACTIONS
                    return True
                self._is_over = not self.cluster.living or self._turn()
        except Exception as error:
            self._note_broken(error)
        return False

    def reseed(self, seed: int, targets: Sequence[Target]) -> None:
        """Let another seed decide what is still to come: every choice, and the faults that have not struck."""
        self.cluster.random.seed(seed)
        struck = tuple(fault for fault, _, _ in self._hits)
        coming = redraw_faults(self.scenario, seed, max(self.journal.epochs), len(self._schedule), targets)
        self.scenario = replace(self.scenario, faults=struck + coming)
        self._pending = [[fault for fault in coming if fault.rank == rank] for rank in self._rank_range]

    def _has_no_jobs(self) -> bool:
        return all(rank.worker.is_idle for rank in self.cluster.living)

    def _note_broken(self, error: Exception) -> None:
        self._is_over = True
        if isinstance(error, WrongForwardError):
            self._broken.append(f"live_equals_map: {error}")
        else:  # out of step() nothing may come but a fail-stop
            self._broken.append(f"raised: {type(error).__name__}: {error}")

    def _turn(self) -> bool:
        """Act once; True if the run is over."""
        rank = self._act()
        self._num_quiet += 1
        if len(self.journal.events) == self._num_seen:
            if self._num_quiet > _MAX_QUIET_ACTIONS:
                self._stands_still = not all(rank.fsm.state is State.STOPPED for rank in self.cluster.living)
                return True
            if not self._num_quiet % 32:  # stopped ranks make steps and no events
                self._last_step = min(self._last_step, self._end_if_over())
                is_alone = len(self.cluster.living) < self.scenario.num_ranks
                if is_alone and self._last_step < _MAX_STEPS:  # in lockstep with a dead rank no pass is made any more
                    return True
        else:
            self._num_seen, self._num_quiet = len(self.journal.events), 0
            if self.journal.has_ended:
                self._repair()
                self._last_step = min(self._last_step, self._end_if_over())
        return not self._goes_on(rank) and not any(map(self._goes_on, self.cluster.living))

    def _goes_on(self, rank: SimulatedRank) -> bool:
        return rank.is_alive and rank.fsm.step_idx < self._last_step

    def _end_if_over(self) -> int:
        """Return the step after which nothing more is to be seen; the limit as long as there is."""
        for rank in self.cluster.living:
            outcomes = self.journal.outcomes[rank.rank]
            is_clean = self.scenario.ends_when_committed and bool(outcomes) and outcomes[-1][1] != "ABORTED"
            is_stopped = rank.fsm.state is State.STOPPED and rank.parts.runner.is_drained
            if len(outcomes) < self.scenario.num_epochs and not is_clean and not is_stopped:
                return _MAX_STEPS
        return max((rank.fsm.step_idx for rank in self.cluster.living), default=0) + _TAIL_STEPS

    def _act(self) -> SimulatedRank:
        """Let the scheduler's choice happen, and return the rank that it fell on."""
        choice = self._choose()
        rank = self.cluster.ranks[choice.rank]
        if self._pending[choice.rank]:
            self._strike(rank)
        self._schedule.append(choice)
        if rank.is_alive:
            done = self.cluster.take(choice)
            if done is not None:
                self.journal.orders[choice.rank].append(done)
        return rank

    def _choose(self) -> Choice:
        if self._given is None:
            return self.cluster.choose()
        position = len(self._schedule)
        given = self._given[position] if position < len(self._given) else None
        choice = given or default_choice(position, self.scenario.num_ranks)
        if not self.cluster.ranks[choice.rank].is_alive:
            return Choice(self.cluster.living[position % len(self.cluster.living)].rank, choice.action)
        return choice

    def _strike(self, rank: SimulatedRank) -> None:
        """Let every fault of this rank happen whose time has come."""
        state, epoch = rank.fsm.state, self.journal.epochs[rank.rank]
        due = [fault for fault in self._pending[rank.rank] if fault.state is state and fault.epoch <= epoch]
        for fault in due:
            if len(self._schedule) < fault.since or not self._may_strike(fault):
                continue
            waited = self._waited[fault] = self._waited.get(fault, 0) + 1
            if waited >= fault.nth:
                self._pending[rank.rank].remove(fault)
                out, read = self.journal.out[rank.rank], rank.parts.rounds.journal.read_round
                self._hits.append((fault, state, out or read + (not self.journal.decided[rank.rank])))
                self._changes_from[fault] = max(out, read) + 1
                self.journal.orders[rank.rank].append(-1 - self.scenario.faults.index(fault))
                strike(fault.kind, self.cluster, rank)

    def _may_strike(self, fault: Fault) -> bool:
        """For a fault that follows another one: whether a round that this one could change is out."""
        if not fault.follows:
            return True
        position = self.scenario.faults.index(fault)
        if not position:
            return True
        first_round = self._changes_from.get(self.scenario.faults[position - 1])
        return first_round is not None and (fault.state is State.STOPPED or self.journal.out[fault.rank] >= first_round)

    def _repair(self) -> None:
        """Take faults of one epoch back on the ranks on which it has ended."""
        for rank in self.cluster.living:
            num_ended = len(self.journal.outcomes[rank.rank])
            if num_ended > self._num_repaired[rank.rank]:
                self._num_repaired[rank.rank] = num_ended
                repair(rank)

    # -- what was seen ------------------------------------------------------------------------------------------

    def _targets(self) -> list[Target]:
        if not self._hits:
            return []
        votes = [event for event in self.journal.events if event.action == "PostVote"]
        voted_in = {(vote.rank, vote.round_idx): State(vote.state) for vote in votes}
        targets = []
        for fault, state, idx in self._hits:
            decision = NO_DECISION if state is State.STOPPED else self.journal.decisions.get(idx, NO_DECISION)
            met_in = state if state is State.STOPPED else voted_in.get((fault.rank, idx), state)
            targets.append(Target(met_in, decision, fault.kind))
        return targets

    def _bound(self, transferring_deadline_steps: int) -> int:
        return epoch_bound_steps(self.cluster.config, self.scenario.lag, transferring_deadline_steps)

    def _check_all(self) -> list[str]:
        """Let the devices catch up and check everything."""
        try:
            self.cluster.settle()
            return self._check()
        except Exception as error:
            self._note_broken(error)
            return self._broken

    def _check(self) -> list[str]:
        found = find_violations(self.journal.events, self._bound)
        if any(fault.kind in NEEDS_PASS_IDS for fault, _, _ in self._hits):
            # The promise is then only that nothing is served torn: the rank may read a round at another step, and
            # where it left out the step of a commit it is ended.
            found = [text for text in found if not text.startswith(_BROKEN_BY_A_WRONG_STEP)]
        torn = self.cluster.torn_passes()
        if any("left out the step()" in str(rank.failure) for rank in self.cluster.ranks):
            torn = torn[1:]  # the pass that was made before the library was called, and for which the rank is ended
        found += [f"no_torn_forward: pass {pass_idx}" for pass_idx in torn]
        for rank in self.cluster.living:
            for layer in rank.maps.physical_to_logical_map.tolist():
                missing = every_expert_reachable(layer, self.scenario.num_ranks)
                found += [f"every_expert_reachable: rank {rank.rank}: {text}" for text in missing]
            rank.engine.forward(_OWN_PASS, rank.maps)
        return found


def _has_second_epoch(outcomes: list[tuple[int, str]]) -> bool:
    """Whether an aborted epoch is followed by one that ended, too."""
    return any(outcome == "ABORTED" for _, outcome in outcomes[:-1])
