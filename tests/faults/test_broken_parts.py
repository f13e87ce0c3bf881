"""Channels, transports, planners, writers and stores that fail: what is promised in each case, with real processes."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from eplb_fsm.core.states import State
from eplb_fsm.errors import ChannelError, ConsensusTimeout, FailStop
from eplb_fsm.simulate.engine import WrongForwardError
from tests.dist.decode import DecodeLoop, own_children
from tests.dist.harness import RankLink, Ranks, run_ranks, store_in_a_process
from tests.dist.policies import MARKER
from tests.faults.parts import FaultyChannel, FaultyMapWriter, FaultyTransport, fail, is_staged

SHORT: dict[str, Any] = {"vote_timeout_s": 1.5, "resolve_timeout_s": 3.0}


def _broken_channel(link: RankLink, where: str) -> tuple[str, str, list[int], list[str], int]:
    """Rank 1's vote channel breaks: while idle, or as it promises, or after its promise went out."""
    store = link.store()
    channel = FaultyChannel(link, store)
    transport = FaultyTransport(link, store)
    loop = DecodeLoop(link, store=store, lockstep=False, connect={"channel": channel, "transport": transport}, **SHORT)
    fsm = loop.fsm
    if link.rank == 1:
        transport.late_s = 1.0  # the others have promised long before this rank does
        if where == "poll":
            channel.loses = lambda tally: is_staged(tally.smallest)
        else:
            channel.is_broken = {"idle": lambda vote: vote.round_idx == 4, "post": is_staged}[where]
    with fsm:
        fsm.arm()
        if where != "idle":
            fsm.request_rebalance()
        loop.run(lambda: fsm.state is State.STOPPED)
        loop.run_steps(100)
        num_commits = sum(outcome.num_commits for outcome in fsm.outcomes)
        return fsm.state.value, fsm.health().why_stopped, loop.digests, loop.outcome_names, num_commits


@pytest.mark.parametrize("where", ["idle", "post", "poll"])
def test_a_vote_channel_broken_on_one_rank_ends_rebalancing_and_not_serving(where: str) -> None:
    """Outside the window all ranks stop; inside it the store resolves the chunk: one map everywhere, served on."""
    results = run_ranks(3, _broken_channel, where)
    assert {state for state, *_ in results} == {"STOPPED"}
    assert len({str(digests) for _, _, digests, _, _ in results}) == 1
    assert "this test broke" in results[1][1]
    outcomes = [outcomes for *_, outcomes, _ in results]
    commits = [num_commits for *_, num_commits in results]
    if where == "post":  # nobody can have committed
        assert outcomes == [["ABORTED(UNRESOLVED_VOTE)"]] * 3
        assert commits == [0] * 3
    if where == "poll":  # the others have read the commit, and the broken rank adopted it
        assert commits == [1] * 3


def _store_lost(link: RankLink) -> list[Any]:
    loop = DecodeLoop(link, **SHORT)
    fsm = loop.fsm
    with fsm:
        fsm.arm()
        loop.run_steps(20)
        link.tell("ready")
        loop.run(link.heard) if link.rank == 0 else None
        if link.rank == 0:
            fsm.request_rebalance()
        loop.run(lambda: len(fsm.outcomes) == 1)
        loop.run_steps(50)
        return [loop.outcome_names, fsm.health().why_stopped, fsm.lost_peers(0.5)]


def _lost_in_the_window(link: RankLink) -> list[Any]:
    """The store does not answer, and the vote channel breaks on the rank that has promised."""
    store = link.store()
    channel = FaultyChannel(link, store)
    loop = DecodeLoop(link, store=store, lockstep=False, connect={"channel": channel}, **SHORT)
    fsm = loop.fsm
    fsm.arm()
    loop.run_steps(20)
    link.tell("ready")
    link.listen()
    channel.is_broken = is_staged
    fsm.request_rebalance()
    try:
        loop.run(lambda: fsm.state is State.STOPPED, max_s=40)
    except ConsensusTimeout as error:
        return [str(error), error.ranks]
    loop.run_steps(50)
    return ["", ()]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_without_channel_and_store_a_promise_is_a_fail_stop(number: int) -> None:
    """A promise whose decision can be had neither from the votes nor from the store is a fail-stop, in bounded time."""
    with store_in_a_process() as (port, pid), Ranks(2, _lost_in_the_window, port=port) as ranks:
        for rank in range(2):
            ranks.expect(rank, "ready")
        os.kill(pid, number)
        for rank in range(2):
            ranks.say(rank)
        raised = [(said, named) for said, named in ranks.join() if said]
        assert raised  # a rank whose chunk was not staged yet has promised nothing: it stops, and serves on
        for said, named in raised:
            assert "voted to commit a chunk and the decision was lost" in said
            assert "the store did not say" in said or named


def test_epochs_commit_without_the_store() -> None:
    """The store's server is killed while idle: the next epoch commits all the same, and no rank is called lost."""
    with store_in_a_process() as (port, pid), Ranks(2, _store_lost, port=port) as ranks:
        for rank in range(2):
            ranks.expect(rank, "ready")
        os.kill(pid, signal.SIGKILL)
        ranks.say(0)
        for outcomes, why, lost in ranks.join():
            assert outcomes == ["COMMITTED"]
            assert why == ""
            assert lost == ()


def _planner_fails(link: RankLink, folder: str) -> list[str]:
    marker = Path(folder) / "marker"
    os.environ[MARKER] = str(marker)
    loop = DecodeLoop(link, policy="tests.dist.policies:Marked", planner="process", plan_timeout_s=1.5)
    fsm = loop.fsm
    with fsm:
        fsm.arm()
        for how in ("raise", "nonsense", "other experts", "exit", "hang", "killed"):
            ended = len(fsm.outcomes)
            if link.rank == 0:
                marker.write_text(how)
                if how == "killed":
                    marker.unlink()
                    for line in own_children():
                        os.kill(int(line.split()[0]), signal.SIGKILL)
            fsm.request_rebalance()
            loop.run(lambda ended=ended: len(fsm.outcomes) > ended)  # type: ignore[misc]
            marker.unlink(missing_ok=True)
            loop.run(lambda ended=ended: len(fsm.outcomes) > ended + 1)  # type: ignore[misc]
        return loop.outcome_names


def test_whatever_the_policy_does_the_epoch_is_aborted_and_the_next_one_works(tmp_path: Path) -> None:
    """A policy that raises, talks nonsense, exits or hangs, and a killed planner: POLICY_ERROR, then a commit."""
    for outcomes in run_ranks(2, _planner_fails, str(tmp_path)):
        assert outcomes == ["ABORTED(POLICY_ERROR)", "COMMITTED"] * 6


def _transfer_fails(link: RankLink) -> list[str]:
    store = link.store()
    transport = FaultyTransport(link, store, 20.0)
    writer = FaultyMapWriter(link.world_size)
    loop = DecodeLoop(link, store=store, connect={"transport": transport, "map_writer": writer})
    fsm = loop.fsm
    fsm._parts.own_maps = writer  # type: ignore[assignment]
    with fsm:
        fsm.arm()
        transport.damages = link.rank == 1
        loop.run_epochs(1)
        transport.damages = False
        loop.run(lambda: len(fsm.outcomes) == 2)
        writer.before_prepare = (
            fail(ValueError("this test broke the writer")) if link.rank == 0 else writer.before_prepare
        )
        loop.run_epochs(1)
        writer.before_prepare = lambda: None
        loop.run(lambda: len(fsm.outcomes) == 4)
        return loop.outcome_names


def test_a_damaged_or_failed_chunk_is_aborted_and_the_next_epoch_commits() -> None:
    """A wrong byte on the wire is INTEGRITY, an error in the worker TRANSFER_ERROR, on all ranks; then all is well."""
    for outcomes in run_ranks(2, _transfer_fails):
        assert outcomes == ["ABORTED(INTEGRITY)", "COMMITTED", "ABORTED(TRANSFER_ERROR)", "COMMITTED"]


def _unchecked(link: RankLink) -> str:
    store = link.store()
    transport = FaultyTransport(link, store, 20.0)
    transport.damages = True
    loop = DecodeLoop(link, store=store, lockstep=False, connect={"transport": transport}, integrity="off")
    with loop.fsm as fsm:
        fsm.arm()
        fsm.request_rebalance()
        try:
            loop.run(lambda: len(fsm.outcomes) == 1)
            loop.run_steps(5)
        except WrongForwardError as error:
            return str(error)
    return "nothing was noticed"


def test_without_integrity_a_wrong_byte_reaches_the_forward_pass() -> None:
    """The negative control of the test above: with integrity="off" the damage is committed, and the passes see it."""
    assert any("hold the right expert" in said for said in run_ranks(2, _unchecked))


def _one_sided_error(link: RankLink) -> list[Any]:
    store = link.store()
    transport = FaultyTransport(link, store, 1.0)
    transport.fails = link.rank == 1
    loop = DecodeLoop(link, store=store, connect={"transport": transport}, transfer_timeout_s=1.0, plan_timeout_s=1.0)
    fsm = loop.fsm
    with fsm:
        fsm.arm()
        loop.run_epochs(1)
        transport.fails = False
        loop.run(lambda: fsm.state is State.STOPPED)
        loop.run_steps(50)
        return [loop.outcome_names, fsm.health().why_stopped, fsm.moved_bytes]


def test_a_transfer_that_fails_on_one_side_stops_rebalancing_once_the_other_side_has_given_it_up() -> None:
    """The failing rank aborts the epoch; a receive that nobody serves breaks its group, so no epoch may follow it."""
    for outcomes, why_stopped, moved in run_ranks(2, _one_sided_error):
        assert outcomes == ["ABORTED(TRANSFER_ERROR)"]
        assert "TRANSPORT" in why_stopped
        assert moved == 0


def _worker_dies(link: RankLink) -> list[Any]:
    writer = FaultyMapWriter(link.world_size)
    loop = DecodeLoop(link, connect={"map_writer": writer})
    fsm = loop.fsm
    fsm._parts.own_maps = writer  # type: ignore[assignment]
    if link.rank == 1:
        writer.before_prepare = fail(SystemExit("this test ended the worker"))
    with fsm:
        fsm.arm()
        loop.run_epochs(1)
        loop.run_steps(50)
        return [loop.outcome_names[0], fsm.health().is_worker_alive]


def test_a_dead_worker_is_an_abort_and_shows_in_health() -> None:
    """A worker thread that ended itself aborts the epoch on all ranks; serving goes on and health() says it is gone."""
    first, second = run_ranks(2, _worker_dies)
    assert first == ["ABORTED(WORKER_DIED)", True]
    assert second == ["ABORTED(WORKER_DIED)", False]


def _promise_broken(link: RankLink, how: str) -> list[Any]:
    writer = FaultyMapWriter(link.world_size)
    # All rows are damaged, also those that another chunk would send if it were staged ahead of the check.
    slot: dict[str, Any] = {"integrity": "slot", "staging_buffers": 1}
    options = {"slot": slot, "shares": {"replica_split": "weighted"}}.get(how, {})
    loop = DecodeLoop(link, lockstep=False, connect={"map_writer": writer}, **SHORT, **options)
    fsm = loop.fsm
    fsm._parts.own_maps = writer  # type: ignore[assignment]
    if link.rank == 1:
        loop.engines[0].forward = lambda *args: None  # type: ignore[method-assign]  # it would see the damage first
        if how in ("commit", "shares"):
            writer.after_write = fail(ValueError("this test broke the tables"))
        else:
            writer.after_write = lambda: setattr(loop.engines[0].weights, "data", loop.engines[0].weights.zero_())
    raised: list[Any] = []
    with fsm:
        fsm.arm()
        fsm.request_rebalance()
        try:
            loop.run(lambda: fsm.state is State.STOPPED)
        except FailStop as error:
            raised.append((str(error), error.ranks))
            try:
                loop.run_steps(1)
            except FailStop as again:
                raised.append((str(again), again.ranks))
        state = fsm.state.value
        failure = fsm.health().why_stopped
        outcome = loop.outcome_names[-1] if loop.outcome_names else ""
    return [raised, state, failure, outcome]


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("commit", "a promised commit failed"),
        ("slot", "a committed row differs"),
        ("shares", "tables could not be written"),
    ],
)
def test_a_broken_promise_is_a_fail_stop(how: str, words: str) -> None:
    """What raises as it writes, or a damaged slot: that rank never gets past step() again, the others serve on."""
    (none, state, why, _), (raised, _, failure, outcome) = run_ranks(2, _promise_broken, how)
    assert none == []
    assert state == "STOPPED"
    assert why
    assert len(raised) == 2
    for said, named in raised:
        assert words in said
        assert named == (1,)
    assert words in failure
    assert outcome == "FAILED(COMMIT_FAILED)" or how != "commit"


def _one_closes(link: RankLink, state: str) -> list[Any]:
    store = link.store()
    transport = FaultyTransport(link, store, 20.0)
    transport.is_held = state == "TRANSFERRING"
    loop = DecodeLoop(link, store=store, lockstep=False, connect={"transport": transport}, **SHORT)
    fsm = loop.fsm
    with fsm:
        fsm.arm()
        if state != "IDLE":
            fsm.request_rebalance()
            loop.run(lambda: fsm.state is State(state))
        if link.rank == 1:
            transport.is_held = False
            fsm.close()
            link.tell("closed")
            link.listen()
            fsm.close()
            return []
        loop.run(lambda: fsm.state is State.STOPPED)
        transport.is_held = False
        loop.run_steps(100)
        link.tell("stopped")
        return [fsm.health().why_stopped, loop.outcome_names, fsm.lost_peers(1.0)]


@pytest.mark.parametrize("state", ["IDLE", "TRANSFERRING"])
def test_the_others_read_that_a_rank_has_closed(state: str) -> None:
    """close() on one rank is STOP(CLOSED) on the others, which serve on and do not call it lost."""
    with Ranks(2, _one_closes, (state,)) as ranks:
        ranks.expect(1, "closed")
        ranks.expect(0, "stopped")
        ranks.join(ranks=[0])
        ranks.say(1)
        (why, outcomes, lost), _ = ranks.join()
    assert why.startswith("CLOSED")
    assert outcomes == ([] if state == "IDLE" else ["FAILED(CLOSED)"])
    assert lost == ()


def _starts_without_store(link: RankLink) -> str:
    store = link.store()
    link.tell("ready")
    link.listen()
    try:
        DecodeLoop(link, store=store)
    except ChannelError as error:
        return str(error)
    return "nothing was raised"


def test_a_store_lost_while_the_ranks_start_is_one_clear_error() -> None:
    """connect() on a store whose server is gone is a ChannelError at once, not a wait for the other ranks."""
    with store_in_a_process() as (port, pid), Ranks(2, _starts_without_store, port=port) as ranks:
        for rank in range(2):
            ranks.expect(rank, "ready")
        os.kill(pid, signal.SIGKILL)
        for rank in range(2):
            ranks.say(rank)
        assert all(said.startswith("the store is lost while the ranks start") for said in ranks.join())
