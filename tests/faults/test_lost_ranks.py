"""Ranks that die or stand still, for real: what the others do, and whom they name."""

from __future__ import annotations

import contextlib
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from eplb_fsm.cli import main
from eplb_fsm.core.states import State
from eplb_fsm.errors import ConsensusTimeout
from eplb_fsm.observe.trace import NdjsonTrace
from eplb_fsm.runtime.channel import GlooVoteChannel
from eplb_fsm.runtime.domain import Domain
from tests.dist.decode import DecodeLoop
from tests.dist.harness import RankLink, Ranks
from tests.dist.policies import MARKER
from tests.faults.parts import KILL_WHEN_STAGED, FaultyChannel, FaultyTransport, signal_self_when_staged

SHORT = {"vote_timeout_s": 2.0, "resolve_timeout_s": 3.0, "transfer_timeout_s": 5.0}


@dataclass
class Fate:
    """How a survivor ended up."""

    state: str
    why: str
    digests: list[int]
    lost: list[tuple[int, ...]] = field(default_factory=list)
    raised: str = ""
    named: tuple[int, ...] = ()
    served_on: int = 0


def _serve(link: RankLink, loop: DecodeLoop, lost: list[tuple[int, ...]]) -> Fate:
    """Decode until rebalancing ends here and the watchdog has named somebody, then a little more."""
    fsm = loop.fsm
    try:
        loop.run(lambda: fsm.state is State.STOPPED)
        stopped_at = loop.num_passes
        loop.run(lambda: bool(lost) and loop.num_passes > stopped_at + 50)
        return Fate(
            fsm.state.value, fsm.health().why_stopped, loop.digests, lost, served_on=loop.num_passes - stopped_at
        )
    except ConsensusTimeout as error:
        again = _raises_again(loop)
        return Fate(fsm.state.value, fsm.health().why_stopped, loop.digests, lost, f"{again}{error}", error.ranks)


def _raises_again(loop: DecodeLoop) -> str:
    """An engine that swallows the exception does not get past the next step()."""
    try:
        loop.fsm.step()
    except ConsensusTimeout:
        return ""
    return "step() returned after a fail-stop: "


def _connected(link: RankLink, lost: list[tuple[int, ...]], **further: Any) -> DecodeLoop:
    connect = {"on_peer_lost": lambda ranks: lost.append(tuple(ranks)), **further.pop("connect", {})}
    return DecodeLoop(link, lockstep=False, connect=connect, **{**SHORT, **further})


def _in_state(link: RankLink, state: str, folder: str, mode: str) -> Fate:
    os.environ[MARKER] = f"{folder}/marker"
    lost: list[tuple[int, ...]] = []
    store = link.store()
    transport = FaultyTransport(link, store, 5.0)
    transport.is_held = state == "TRANSFERRING" and link.rank == 1
    trace = NdjsonTrace(Path(folder, "traces"), link.rank)
    loop = _connected(
        link,
        lost,
        store=store,
        connect={"transport": transport, "observers": (trace,)},
        policy="tests.dist.policies:Marked",
        planner="process",
        mode=mode,
        plan_timeout_s=30.0,
    )
    with contextlib.closing(trace), loop.fsm as fsm:
        fsm.arm()
        if state != "IDLE":
            fsm.request_rebalance()
            loop.run(lambda: fsm.state is State(state))
        loop.run_steps(20)
        link.tell(state)
        return _serve(link, loop, lost)


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize(
    ("state", "mode"), [("IDLE", "async"), ("COMPUTING", "async"), ("TRANSFERRING", "async"), ("IDLE", "sync")]
)
def test_survivors_of_a_killed_rank_name_it_and_serve_on(state: str, mode: str, victim: int, tmp_path: Any) -> None:
    """SIGKILL: survivors stop and serve on, or fail-stop in the window; all name the rank; no child stays.

    What all of them have recorded until then is a run of the spec.
    """
    if state == "COMPUTING":
        (tmp_path / "marker").write_text("hang")
    with Ranks(3, _in_state, (state, str(tmp_path), mode)) as ranks:
        for rank in range(3):
            ranks.expect(rank, state)
        ranks.kill(victim)
        survivors = [fate for fate in ranks.join() if fate is not None]
    for fate in survivors:
        if fate.raised:
            assert state == "TRANSFERRING", fate.raised
            assert fate.named == (victim,)
        else:
            assert fate.state == "STOPPED"
            assert "TRANSPORT" in fate.why or "TIMEOUT" in fate.why
            assert state != "IDLE" or f"the vote connection to rank {victim} is lost" in fate.why
            assert fate.lost[0] == (victim,)
            assert fate.served_on > 50
    assert survivors[0].digests == survivors[1].digests
    assert main(["trace", "check", str(tmp_path / "traces")]) == 0


def _killed_over_gloo(link: RankLink) -> Fate:
    lost: list[tuple[int, ...]] = []
    store = link.store()
    channel = GlooVoteChannel(Domain(link.rank, link.world_size), store, 200.0, start_timeout_s=20.0)
    loop = _connected(link, lost, store=store, connect={"channel": channel})
    with loop.fsm as fsm:
        fsm.arm()
        loop.run_epochs(1)
        loop.run_steps(20)
        link.tell("ready")
        return _serve(link, loop, lost)


def test_survivors_over_gloo_name_a_killed_rank_and_serve_on() -> None:
    """A gloo group that a killed rank broke ends rebalancing on the others, with one map, and not serving."""
    with Ranks(3, _killed_over_gloo) as ranks:
        for rank in range(3):
            ranks.expect(rank, "ready")
        ranks.kill(1)
        first, _, last = ranks.join()
    for fate in (first, last):
        assert fate.state == "STOPPED"
        assert "TRANSPORT" in fate.why or "TIMEOUT" in fate.why
        assert fate.lost[0] == (1,)
        assert fate.served_on > 50
    assert first.digests == last.digests


def _killed_in_the_window(link: RankLink) -> Fate:
    lost: list[tuple[int, ...]] = []
    store = link.store()
    channel, transport = FaultyChannel(link, store), FaultyTransport(link, store)
    loop = _connected(link, lost, store=store, connect={"channel": channel, "transport": transport})
    if link.rank == 1:
        transport.late_s = 3.0  # the others have promised long before this rank does, also where cores are few
        channel.before_post = KILL_WHEN_STAGED
    with loop.fsm as fsm:
        fsm.arm()
        fsm.request_rebalance()
        return _serve(link, loop, lost)


def test_a_rank_killed_while_it_promised_ends_the_others_by_name() -> None:
    """SIGKILL before a promise went out: who promised too cannot know the decision, and fail-stops naming the rank."""
    with Ranks(3, _killed_in_the_window) as ranks:
        ranks.will_die(1)
        survivors = [fate for fate in ranks.join() if fate is not None]
    for fate in survivors:
        assert fate.named == (1,), survivors
        assert "did not say" in fate.raised
        assert not fate.raised.startswith("step() returned")
    assert survivors[0].digests == survivors[1].digests


def _stopped_outside(link: RankLink) -> Fate:
    lost: list[tuple[int, ...]] = []
    loop = _connected(link, lost)
    with loop.fsm as fsm:
        fsm.arm()
        loop.run_steps(20)
        link.tell("ready")
        if link.rank == 1:
            loop.run(lambda: fsm.state is State.STOPPED)
            loop.run_steps(50)
            return Fate(fsm.state.value, fsm.health().why_stopped, loop.digests, lost)
        fate = _serve(link, loop, lost)
        link.tell("stopped")
        link.listen()  # alive until the other one has gone on
        return fate


def test_survivors_of_a_stopped_rank_serve_on_and_so_does_it() -> None:
    """SIGSTOP outside the window: the others name it after the vote timeout and serve on; gone on, it stops too."""
    with Ranks(3, _stopped_outside) as ranks:
        for rank in range(3):
            ranks.expect(rank, "ready")
        ranks.stop(1)
        for rank in (0, 2):
            ranks.expect(rank, "stopped")
        ranks.go_on(1)
        ranks.join(ranks=[1])
        for rank in (0, 2):
            ranks.say(rank)
        fates = ranks.join()
    assert len({str(fate.digests) for fate in fates}) == 1
    for fate in (fates[0], fates[2]):
        assert "TIMEOUT" in fate.why
        assert "missing ranks: [1]" in fate.why
        assert (1,) in fate.lost
    assert fates[1].state == "STOPPED"
    assert fates[1].lost == []


def _stopped_inside(link: RankLink) -> Fate:
    lost: list[tuple[int, ...]] = []
    store = link.store()
    channel, transport = FaultyChannel(link, store), FaultyTransport(link, store)
    loop = _connected(link, lost, store=store, connect={"channel": channel, "transport": transport})
    if link.rank == 1:
        transport.late_s = 3.0  # the others have promised long before this rank does, also where cores are few
        channel.before_post = signal_self_when_staged(signal.SIGSTOP)
    with loop.fsm as fsm:
        fsm.arm()
        fsm.request_rebalance()
        if link.rank == 1:
            loop.run(lambda: fsm.state is State.STOPPED)
            return Fate(fsm.state.value, fsm.health().why_stopped, loop.digests)
        fate = _serve(link, loop, lost)
        link.tell("stopped")
        return fate


def test_a_rank_stopped_while_it_promised_ends_the_others_by_name() -> None:
    """SIGSTOP inside the window: the other one fail-stops naming it, and never serves on; gone on, it stops too."""
    with Ranks(2, _stopped_inside) as ranks:
        ranks.expect(0, "stopped")
        ranks.go_on(1)
        fates = ranks.join()
    assert fates[0].named == (1,)
    assert not fates[0].raised.startswith("step() returned")
    assert fates[1].state == "STOPPED"


def _engine_collective_fails(link: RankLink) -> tuple[str, tuple[int, ...]]:
    loop = DecodeLoop(link, vote_timeout_s=2.0, collective_s=3.0)
    with loop.fsm as fsm:
        fsm.arm()
        loop.run_steps(30)
        link.tell("ready")
        try:
            loop.run(lambda: False)
        except RuntimeError as error:
            lost = fsm.lost_peers(2.0)
            link.tell("asked")
            link.listen()
            return str(error), lost
    return "", ()


def test_after_the_engines_own_collective_failed_the_lost_rank_is_named() -> None:
    """lost_peers() within the vote timeout names the killed rank, and nobody else, on every survivor."""
    with Ranks(4, _engine_collective_fails) as ranks:
        for rank in range(4):
            ranks.expect(rank, "ready")
        ranks.kill(2)
        for rank in (0, 1, 3):
            ranks.expect(rank, "asked")
        for rank in (0, 1, 3):
            ranks.say(rank)
        survivors = [result for result in ranks.join() if result is not None]
    assert all(lost == (2,) for _, lost in survivors), survivors
