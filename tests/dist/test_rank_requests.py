"""Requests that reach the ranks at different steps, and peers that are slow."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from eplb_fsm.core.states import State
from eplb_fsm.core.votes import NUM_VOTE_WORDS
from eplb_fsm.errors import UsageError
from eplb_fsm.runtime.channel import PiggybackVoteChannel, join_int32, split_int32
from eplb_fsm.runtime.domain import Domain
from eplb_fsm.runtime.transport import GlooTransport
from tests.dist.decode import DecodeLoop
from tests.dist.harness import RankLink, run_ranks


def _freeze(link: RankLink) -> dict[str, Any]:
    loop = DecodeLoop(link)
    fsm = loop.fsm
    seen: dict[str, Any] = {}
    with fsm:
        fsm.arm()
        if link.rank == 0:
            fsm.request_freeze()  # here one rank asks, and the other a few steps later for itself
        loop.run_steps(3)
        if link.rank == 1:
            fsm.request_freeze()
        fsm.request_rebalance()
        loop.run(lambda: fsm.health().is_frozen)
        seen["frozen at"] = fsm.step_idx
        loop.run_steps(30)
        seen["epochs while frozen"] = fsm.health().epoch
        if link.rank == 0:
            fsm.request_unfreeze()
        loop.run_steps(30)
        seen["frozen while one asks"] = fsm.health().is_frozen
        fsm.request_unfreeze()
        loop.run(lambda: len(fsm.outcomes) == 1)
        seen["after"] = (loop.outcome_names, fsm.step_idx, fsm.health().is_frozen)
    return seen


def test_a_freeze_is_agreed_and_holds_until_the_last_rank_takes_it_back() -> None:
    """Both ranks are frozen from one step on; the rebalance that was asked for starts when both have unfrozen."""
    first, second = run_ranks(2, _freeze)
    assert first == second
    assert first["epochs while frozen"] == 0
    assert first["frozen while one asks"]
    assert first["after"][0] == ["COMMITTED"]
    assert not first["after"][2]


def _one_rank_asks(link: RankLink) -> list[Any]:
    loop = DecodeLoop(link)
    fsm = loop.fsm
    with fsm:
        fsm.arm()
        if link.rank == 1:
            fsm.request_rebalance()
        loop.run(lambda: fsm.state is not State.IDLE)
        started = fsm.step_idx
        if link.rank == 0:
            fsm.request_abort()
        loop.run(lambda: len(fsm.outcomes) == 1)
        aborted = loop.outcome_names, fsm.step_idx
        loop.run(lambda: len(fsm.outcomes) == 2)  # what was aborted is tried again after the back-off
        retried = loop.outcome_names[1], fsm.step_idx
        loop.run(lambda: fsm.state is State.IDLE)
        fsm.request_rebalance()
        loop.run(lambda: fsm.state is State.TRANSFERRING)
        if link.rank == 1:
            fsm.request_freeze()
        loop.run(lambda: fsm.health().is_frozen)
        frozen = loop.outcome_names[2:], fsm.step_idx, fsm.health().is_drained
        if link.rank == 0:
            fsm.request_stop()
        loop.run(lambda: fsm.state is State.STOPPED)
        stopped = fsm.step_idx, fsm.health().why_stopped
        loop.run_steps(50)
        return [started, aborted, retried, frozen, stopped, loop.digests]


def test_one_rank_asks_and_all_follow_at_the_same_step() -> None:
    """Rebalance, abort, freeze in TRANSFERRING and stop, each asked for by one rank, come true on both at one step."""
    first, second = run_ranks(2, _one_rank_asks)
    assert first == second
    _, (aborted, _), (retried, _), (frozen, _, is_drained), (_, why), _ = first
    assert aborted == ["ABORTED(REQUESTED)"]
    assert retried == "COMMITTED"
    assert frozen in (["ABORTED(FROZEN)"], ["COMMITTED"])  # the transfer may have been quicker
    assert is_drained
    assert "CLOSED" in why


class _SlowTransport(GlooTransport):
    """Takes its time before it exchanges rows, until the test says so."""

    is_held = True

    def begin(self, sends: Any, receives: Any, tag: int) -> Any:
        while self.is_held:
            time.sleep(0.005)
        return super().begin(sends, receives, tag)


def _slow_staging(link: RankLink) -> tuple[int, int, int, list[str]]:
    store = link.store()
    transport = _SlowTransport(Domain(link.rank, link.world_size), store, 20.0)
    transport.is_held = link.rank == 1
    loop = DecodeLoop(link, store=store, connect={"transport": transport})
    fsm = loop.fsm
    with fsm:
        fsm.arm()
        fsm.request_rebalance()
        loop.run(lambda: fsm.state is State.TRANSFERRING)
        begun = fsm.step_idx
        loop.run_steps(200)  # the decode loops of both go on while rank 1's worker sleeps
        still = fsm.state is State.TRANSFERRING and fsm.moved_bytes == 0
        transport.is_held = False
        loop.run(lambda: len(fsm.outcomes) == 1)
        return begun, int(still), fsm.late_rounds, loop.outcome_names


def test_a_slow_worker_of_one_rank_holds_no_decode_loop_up() -> None:
    """While one rank's staging sleeps, all ranks make 200 more steps in TRANSFERRING and commit nothing."""
    for _, still, _, outcomes in run_ranks(2, _slow_staging):
        assert still
        assert outcomes == ["COMMITTED"]


def _late_rank(link: RankLink) -> tuple[int, int, int, int]:
    """Free-running ranks, one of which is late to every second step of a round."""
    loop = DecodeLoop(link, lockstep=False, pass_s=0.0, lag="auto", idle_round_interval=4)
    fsm = loop.fsm
    with fsm:
        fsm.arm()
        start = fsm.health().lag
        while fsm.step_idx < 4 * 130:
            if link.rank == 1 and fsm.step_idx % 40 == 3:
                time.sleep(0.01)
            loop.step()
        return start, fsm.health().lag, fsm.late_rounds, fsm.health().num_rounds


@pytest.mark.parametrize("world_size", [2])
def test_late_rounds_are_counted_and_raise_the_lag(world_size: int) -> None:
    """A rank that keeps others waiting shows in their count of late rounds, and the agreed lag rises with "auto"."""
    on_time, late = run_ranks(world_size, _late_rank)
    assert on_time[2] >= 10
    assert on_time[0] == late[0] == 2
    assert on_time[1] == late[1] > 2


def _waits_for_nobody(link: RankLink) -> list[int]:
    """Rank 1 stands still before a round is due; rank 0 makes every step up to it meanwhile."""
    loop = DecodeLoop(link, lockstep=False, pass_s=0.0, idle_round_interval=1000)
    fsm = loop.fsm
    with fsm:
        fsm.arm()
        if link.rank == 1:
            link.store().wait(["go"])
        loop.run_steps(1000)  # posts at step 1000, reads at 1002
        reached = fsm.step_idx
        if link.rank == 0:
            link.store().set("go", "1")
        loop.run_steps(5)
        return [reached, fsm.late_rounds]


def test_a_rank_waits_for_a_peer_only_where_a_round_is_read() -> None:
    """A rank makes all steps up to the reading of a round alone, and only there waits for the others' votes."""
    first, second = run_ranks(2, _waits_for_nobody)
    assert first[0] == second[0] == 1000


def _carry(channel: Any, group: Any, kind: str, world_size: int) -> None:
    """The engine's own collective, which it runs in every forward pass anyway."""
    if kind == "sum":
        columns = channel.outgoing_columns()
        group.allreduce([columns], dist.AllreduceOptions()).wait()
        channel.deliver(columns)
    elif kind == "int32":
        halves = split_int32(channel.outgoing_columns())
        group.allreduce([halves], dist.AllreduceOptions()).wait()
        channel.deliver(join_int32(halves))
    else:
        rows = torch.zeros(world_size, NUM_VOTE_WORDS, dtype=torch.int64)
        group.allgather([list(rows.unbind(0))], [channel.outgoing()]).wait()
        channel.deliver(rows)


def _piggyback(link: RankLink, kind: str) -> tuple[list[str], list[int], int, str]:
    channel = PiggybackVoteChannel(Domain(link.rank, link.world_size))
    loop = DecodeLoop(link, lockstep=False, connect={"channel": channel}, lag=1 if kind == "gather" else 2)
    store = dist.PrefixStore("engine", link.store())
    group: Any = dist.ProcessGroupGloo(store, link.rank, link.world_size, timedelta(seconds=30))
    fsm = loop.fsm
    fsm.arm()
    for count in (1, 2):
        fsm.request_rebalance()
        while len(fsm.outcomes) < count:
            _carry(channel, group, kind, link.world_size)
            loop.step()
    for number in range(33):
        if link.rank == 1 and number == 3:
            fsm.close()  # between two rounds; its process goes on for a while
        _carry(channel, group, kind, link.world_size)
        if link.rank == 0 or number < 3:
            loop.step()
    result = loop.outcome_names, loop.digests, fsm.late_rounds, fsm.health().why_stopped
    fsm.close()
    return result


@pytest.mark.parametrize("kind", ["gather", "sum", "int32"])
def test_votes_ride_on_the_engines_collective(kind: str) -> None:
    """Over all-gather, SUM of one-hot columns and split int32 no round is late, and a rank that closes is heard."""
    results = run_ranks(2, _piggyback, kind)
    for outcomes, digests, late, _ in results:
        assert outcomes == ["COMMITTED"] * 2
        assert digests == results[0][1]
        assert late == 0
    assert "CLOSED" in results[0][3]


def _undelivered(link: RankLink) -> tuple[str, int]:
    channel = PiggybackVoteChannel(Domain(link.rank, link.world_size))
    loop = DecodeLoop(link, connect={"channel": channel})
    with loop.fsm as fsm:
        fsm.arm()
        loop.run_steps(20)
        return fsm.health().why_stopped, fsm.step_idx


def test_an_engine_that_does_not_deliver_is_told_so_at_once() -> None:
    """A piggybacked vote that was not delivered when due stops rebalancing with what to change, without a wait."""
    for why, step_idx in run_ranks(2, _undelivered):
        assert "outgoing() to deliver() in every forward pass" in why
        assert step_idx == 20


def _quiesce(link: RankLink) -> dict[str, Any]:
    loop = DecodeLoop(link)
    fsm = loop.fsm
    seen: dict[str, Any] = {}
    with fsm:
        fsm.arm()
        fsm.request_rebalance()
        loop.run(lambda: fsm.state is State.TRANSFERRING)
        fsm.quiesce_now()
        health = fsm.health()
        seen["quiet"] = (health.is_frozen, health.is_drained, fsm.step_idx, loop.outcome_names)
        passes = loop.num_passes
        fsm.request_unfreeze()
        fsm.request_rebalance()
        loop.run(lambda: len(fsm.outcomes) == 2)
        seen["after"] = (loop.outcome_names[1], fsm.step_idx, loop.num_passes > passes)
        if link.rank == 1:
            loop.fsm.step()  # a pass that rank 0 has not made
        with pytest.raises(UsageError) as raised:
            fsm.quiesce_now()
        seen["unequal"] = (str(raised.value), fsm.health().is_frozen)
    return seen


def test_quiesce_now_ends_an_epoch_between_two_passes() -> None:
    """All ranks freeze at one step without a forward pass, serve on later, and are told if their steps differ."""
    first, second = run_ranks(2, _quiesce)
    assert first == second
    is_frozen, is_drained, _, outcomes = first["quiet"]
    assert (is_frozen, is_drained, outcomes) == (True, True, ["ABORTED(FROZEN)"])
    assert first["after"][0] == "COMMITTED"
    message, is_frozen = first["unequal"]
    assert "the ranks stand at steps" in message
    assert not is_frozen
