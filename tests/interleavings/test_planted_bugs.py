"""Each rule of the protocol is needed: without it, a run like those of the other tests goes wrong and is caught."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
from clusters import ROW_BYTES, Recorded, config, has_voted_staged, reached, shape

from eplb_fsm.core import rank as core_rank
from eplb_fsm.core.rank import RankCore
from eplb_fsm.core.reasons import AbortReason
from eplb_fsm.core.votes import Decision, DecisionKind, Tally, Vote, decide
from eplb_fsm.runtime import epoch as runtime_epoch
from eplb_fsm.runtime.driver import Driver
from eplb_fsm.runtime.jobs import Jobs
from eplb_fsm.runtime.pending import Done
from eplb_fsm.runtime.rounds import Rounds, Wait
from eplb_fsm.runtime.routes import find_routes
from eplb_fsm.runtime.staging import StagingArea, _Place

SEEDS = range(12)
Patch = pytest.MonkeyPatch


# -- the bugs ---------------------------------------------------------------------------------------------------


def no_wait_for_a_late_round(patch: Patch) -> None:
    """A round that is late is read at some later step, while the rank goes on."""
    read = Driver._read

    def read_or_go_on(self: Driver, round_idx: int, now: float) -> Wait | None:
        wait = read(self, round_idx, now)
        if wait is None or wait.is_resolving:
            return wait
        self.core.read_due = self.core.step_idx + 1
        return None

    patch.setattr(Driver, "_read", read_or_go_on)


def no_digest_in_the_decision(patch: Patch) -> None:
    """BEGIN is decided although the plans differ."""

    def decide_without(tally: Tally) -> Decision:
        same = {"plan_digest": 0, "num_chunks": 1}
        return decide(Tally(tally.largest._replace(**same), tally.smallest._replace(**same)))

    patch.setattr(core_rank, "decide", decide_without)


def commit_when_locally_ready(patch: Patch) -> None:
    """A rank that voted staged commits, whatever the others voted."""
    read_round = RankCore.read_round

    def read_own(self: RankCore, tally: Tally) -> Decision:
        own = self.posted
        return read_round(self, Tally(own, own) if own is not None and own.promises_commit else tally)

    patch.setattr(RankCore, "read_round", read_own)


def start_without_drained(patch: Patch) -> None:
    """Every rank says that it is drained."""
    make_vote = RankCore._make_vote

    def make_drained(self: RankCore, pass_id: int) -> Vote:
        return make_vote(self, pass_id)._replace(drained=1)

    patch.setattr(RankCore, "_make_vote", make_drained)


def one_buffer_for_all_chunks(patch: Patch) -> None:
    """A chunk is received into the buffer of one that is not committed yet."""
    init = StagingArea.__init__

    def init_with_one(self: StagingArea, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        self._receive = [self._receive[0]] * len(self._receive)

    patch.setattr(StagingArea, "__init__", init_with_one)


def buffer_reused_before_the_commit_event(patch: Patch) -> None:
    """Staging goes on as soon as a commit was enqueued, on every rank: rows and buffers are not consumed yet."""
    enqueue = runtime_epoch.enqueue_commit

    def enqueue_without_event(*args: Any) -> Done:
        enqueue(*args)
        return Done()

    patch.setattr(runtime_epoch, "enqueue_commit", enqueue_without_event)


def sends_ignore_the_commit_event(patch: Patch) -> None:
    """A rank packs rows that a commit enqueued before has not written yet; its own buffers wait as they should."""
    stage = StagingArea.stage

    def stage_early(self: StagingArea, chunk: Any, after: Any, *rest: Any) -> Any:
        bank = self._banks[chunk.bank]
        place = _Place(chunk.bank, chunk.idx % len(self._send), bank.layout.stride)
        for route in find_routes(chunk, self._rank, bank.num_local_physical_experts).sends:
            self._pack(place, route)
        packed = self._send[place.buffer_idx].clone()
        pack = self._pack

        def pack_early(at: Any, route: Any) -> None:
            pack(at, route)
            self._send[at.buffer_idx].copy_(packed)

        self._pack = pack_early  # type: ignore[method-assign]
        try:
            return (yield from stage(self, chunk, after, *rest))
        finally:
            del self._pack

    patch.setattr(StagingArea, "stage", stage_early)


def a_deadline_that_acts(patch: Patch) -> None:
    """A rank past its deadline aborts by itself instead of voting."""
    vote_on_deadlines = RankCore._vote_on_deadlines

    def act_on_deadlines(self: RankCore) -> None:
        vote_on_deadlines(self)
        if self.is_active and self._abort_word:
            self._abort(Decision(DecisionKind.ABORT, AbortReason.DEADLINE_TRANSFERRING))

    patch.setattr(RankCore, "_vote_on_deadlines", act_on_deadlines)


def sources_in_the_first_placement(patch: Patch) -> None:
    """A chunk reads the rows where the experts were before the plan, not where the chunks before it left them."""
    stage = Jobs._stage

    def stage_from_base(self: Jobs, epoch: int, plan: Any, chunk: Any, after: Any, tag: int) -> Any:
        base = plan.base[chunk.bank].physical_to_logical_map
        before = plan.placements_after(chunk.idx - 1)[chunk.bank].physical_to_logical_map
        moves = np.array(chunk.moves)
        for move in moves:
            layer, _, _, expert = move
            gone = np.flatnonzero((base[layer] == expert) & (before[layer] != expert))
            if len(gone):
                move[2] = gone[0]
        return stage(self, epoch, plan, replace(chunk, moves=moves), after, tag)

    patch.setattr(Jobs, "_stage", stage_from_base)


def going_on_inside_the_window(patch: Patch) -> None:
    """A rank that loses the decision it promised to follow stops, and serves on with the map it has."""
    patch.setattr(RankCore, "in_window", property(lambda self: False))


def giving_up_is_not_binding(patch: Patch) -> None:
    """A rank that said it gave up reads the round after all when it comes."""
    read = Rounds.read

    def read_again(self: Rounds, round_idx: int, now: float, **how: bool) -> Any:
        tally = self._channel.poll(round_idx) if self.journal.gave_up_round == round_idx else None
        return read(self, round_idx, now, **how) if tally is None else tally

    patch.setattr(Rounds, "read", read_again)


def abort_after_commit(patch: Patch) -> None:
    """All staged wins over a rank that asks to abort."""

    def decide_commit_first(tally: Tally) -> Decision:
        if tally.smallest.progress < 5:
            return decide(tally)
        return decide(Tally(tally.largest._replace(abort=0), tally.smallest))

    patch.setattr(core_rank, "decide", decide_commit_first)


# -- the runs that find them ------------------------------------------------------------------------------------


def late_rounds(seed: int) -> None:
    """Free-running ranks."""
    run = Recorded(3, seed=seed, is_lockstep=False)
    run.cluster.run_steps(120)
    run.check()


def different_plans(seed: int) -> None:
    """One rank computes another plan."""
    run = Recorded(3, seed=seed, options=config(plan_source="every_rank"))
    run.ranks[2].faults.load_change = 1
    run.cluster.run_steps(80)
    run.check()


def uneven_workers(seed: int) -> None:
    """Ranks whose workers are scheduled rarely, so that they are ready at different steps."""
    run = Recorded(3, seed=seed, lag=1)
    run.cluster.worker_share = 0.2
    run.cluster.run_steps(120)
    run.check()


def abort_under_way(seed: int) -> None:
    """An abort while one rank's worker stands still in a transfer."""
    run = Recorded(3, seed=seed, options=config(drain_deadline_steps=1000))
    run.run_until_event(reached(["TRANSFERRING"], rank=1))
    run.ranks[1].faults.is_worker_stuck = True
    run.ranks[0].fsm.request_abort()
    run.cluster.run_steps(60)
    run.check()


def many_buffers(seed: int) -> None:
    """Several chunks staged at a time, each of one expert."""
    run = Recorded(
        3, seed=seed, options=config(staging_buffers=3, commit_bytes=ROW_BYTES), shape=shape(3, num_moe_layers=4)
    )
    run.cluster.run_steps(150)
    run.check()


def lagging_devices(seed: int) -> None:
    """Devices far behind their hosts, one buffer, chunks of one expert."""
    run = Recorded(
        3,
        seed=seed,
        lag=1,
        max_passes_ahead=8,
        options=config(
            policy="shuffle", num_redundant_experts=9, staging_buffers=1, commit_bytes=ROW_BYTES, step_interval=5
        ),
        shape=shape(3, num_moe_layers=1, num_logical_experts=6, num_physical_experts=15),
    )
    run.cluster.device_share = 0.0
    run.cluster.worker_share = 0.7
    run.cluster.run_steps(200)
    run.check()


def deadline(seed: int) -> None:
    """A worker that stands still until the deadline."""
    run = Recorded(3, seed=seed, options=config(drain_deadline_steps=10_000))
    run.run_until_event(reached(["TRANSFERRING"], rank=1))
    run.ranks[1].faults.is_worker_stuck = True
    run.run_until_event(lambda event: bool(event.detail.get("outcome")), goal=3, max_actions=100_000)
    run.check()
    assert run.outcomes() == [("ABORTED", "DEADLINE_TRANSFERRING")]


def many_replicas(seed: int) -> None:
    """Two copies of each expert change places at random, in chunks of one expert."""
    run = Recorded(
        4,
        seed=seed,
        shape=shape(4, num_logical_experts=4, num_moe_layers=1),
        options=config(policy="shuffle", num_redundant_experts=4, commit_bytes=ROW_BYTES, staging_buffers=1),
    )
    run.cluster.run_steps(300)
    run.check()


def lost_in_the_window(seed: int) -> None:
    """One rank loses its channel right after it promised."""
    run = Recorded(3, seed=seed, is_lockstep=False)
    run.run_until_event(has_voted_staged(1))
    run.ranks[1].channel.is_lost = True
    run.cluster.run_until(lambda: all(rank.fsm.state.value == "STOPPED" for rank in run.cluster.living), 200_000)
    run.cluster.run_steps(10)
    run.check(same_outcomes=False)


def found_again(seed: int) -> None:
    """All lose the decision; once the first has resolved it, it reaches the others after all."""
    run = Recorded(3, seed=seed, lag=3)
    run.cluster.worker_share = 0.95
    event = run.run_until_event(has_voted_staged(0))
    for rank in run.ranks:
        rank.channel.held_from = event.round_idx
    run.run_until_event(lambda event: event.action == "ResolveRound", max_actions=200_000)
    for rank in run.ranks:
        rank.channel.held_from = 1 << 62
    run.cluster.run_until(lambda: all(rank.fsm.state.value == "STOPPED" for rank in run.cluster.living), 200_000)
    run.cluster.run_steps(10)
    run.check(same_outcomes=False)


def abort_when_staged(seed: int) -> None:
    """A rank asks to abort while others have promised."""
    run = Recorded(3, seed=seed, lag=1)
    run.run_until_event(has_voted_staged(seed % 3))
    for rank in run.ranks:
        rank.fsm.request_abort()
    run.cluster.run_steps(20)
    run.check()


class Planted(NamedTuple):
    """A bug, and a run that must find it with one of the seeds, and that holds without it with all."""

    bug: Callable[[Patch], None]
    run: Callable[[int], None]


PLANTED = [
    Planted(no_wait_for_a_late_round, late_rounds),
    Planted(no_digest_in_the_decision, different_plans),
    Planted(commit_when_locally_ready, uneven_workers),
    Planted(start_without_drained, abort_under_way),
    Planted(one_buffer_for_all_chunks, many_buffers),
    Planted(buffer_reused_before_the_commit_event, lagging_devices),
    Planted(sends_ignore_the_commit_event, lagging_devices),
    Planted(a_deadline_that_acts, deadline),
    Planted(sources_in_the_first_placement, many_replicas),
    Planted(going_on_inside_the_window, lost_in_the_window),
    Planted(giving_up_is_not_binding, found_again),
    Planted(abort_after_commit, abort_when_staged),
]


@pytest.mark.parametrize("planted", PLANTED, ids=lambda planted: planted.bug.__name__)
def test_a_planted_bug_is_caught(planted: Planted, monkeypatch: Patch) -> None:
    """With the bug, some seed breaks an invariant, tears a pass or shows a wrong slot."""
    planted.bug(monkeypatch)
    for seed in SEEDS:
        try:
            planted.run(seed)
        except AssertionError:
            return
    pytest.fail(f"{len(SEEDS)} seeds did not find it")


@pytest.mark.parametrize(
    "run", sorted({p.run for p in PLANTED}, key=lambda run: run.__name__), ids=lambda r: r.__name__
)
def test_without_the_bug_the_same_runs_hold(run: Callable[[int], None]) -> None:
    """The runs that find the bugs find nothing in the library as it is."""
    for seed in SEEDS[:4]:
        run(seed)
