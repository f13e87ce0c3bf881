"""Within a step the worker waits: it is woken last of all, and pauses from the first to the last act of a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from clusters import config

from eplb_fsm.errors import FailStop
from eplb_fsm.simulate.cluster import SimulatedCluster, SimulatedRank


def _watch(rank: SimulatedRank) -> list[tuple[str, int, bool]]:
    """Keep what this rank does in its steps: the act, its step, and whether the worker pauses then."""
    acts: list[tuple[str, int, bool]] = []
    pace = rank.parts.runner._jobs.pace

    def watch(owner: Any, name: str) -> None:
        act: Callable[..., Any] = getattr(owner, name)

        def watched(*args: Any) -> Any:
            acts.append((name, rank.fsm.step_idx, pace.is_in_step))
            return act(*args)

        setattr(owner, name, watched)

    watch(rank.worker, "submit")
    watch(rank.parts.rounds, "post")
    watch(rank.parts.runner, "commit")
    return acts


def test_a_step_wakes_the_worker_when_all_else_is_done() -> None:
    """Jobs of a start, of a begin and of commits are submitted after the votes and the commits of their step."""
    cluster = SimulatedCluster(
        2, config(idle_round_interval=1, num_redundant_experts=4, staging_buffers=1), seed=4, lag=1
    )
    acts = [_watch(rank) for rank in cluster.ranks]
    cluster.run_steps(200)
    for of_rank in acts:
        submitted = {step for name, step, _ in of_rank if name == "submit"}
        voted = {step for name, step, _ in of_rank if name == "post"}
        committed = {step for name, step, _ in of_rank if name == "commit"}
        assert len(submitted & voted) > 1
        assert submitted & committed
        for step in submitted:
            names = [name for name, at, _ in of_rank if at == step]
            assert set(names[names.index("submit") :]) == {"submit"}
        assert all(pauses == (name != "submit") for name, _, pauses in of_rank)


def test_the_worker_goes_on_after_a_step_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank whose commit fails leaves no worker behind that pauses for good: other ranks are in its jobs."""
    cluster = SimulatedCluster(2, config(num_redundant_experts=4), seed=4, lag=1)
    rank = cluster.ranks[0]

    def fail() -> None:
        raise OSError("damaged")

    monkeypatch.setattr(rank.parts.runner, "commit", fail)
    cluster.run_until(lambda: rank.failure is not None)
    assert isinstance(rank.failure, FailStop)
    assert not rank.parts.runner._jobs.pace.is_in_step
