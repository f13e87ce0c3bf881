"""Cores and votes for the tests of the protocol."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from eplb_fsm.config import RebalanceConfig
from eplb_fsm.core.rank import PlanTerms, RankCore
from eplb_fsm.core.votes import PROTOCOL_VERSION, Decision, DecisionKind, Progress, Vote, tally_votes

PLAN = PlanTerms(digest=77, num_chunks=2, deadline_steps=40)


def config(**changes: Any) -> RebalanceConfig:
    """Deadlines of tens of steps, a round every 4 steps while idle, no epoch unless asked for."""
    options = {
        "step_interval": 0,
        "idle_round_interval": 4,
        "collecting_deadline_steps": 10,
        "computing_deadline_steps": 20,
        "awaiting_consensus_deadline_steps": 30,
        "drain_deadline_steps": 25,
        "backoff_steps": 5,
        "max_backoff_steps": 40,
    }
    return RebalanceConfig(**{**options, **changes})


def vote(**changes: int) -> Vote:
    """The vote of a rank that is idle and drained."""
    words = dict.fromkeys(Vote._fields, 0)
    return Vote(**{**words, "protocol_version": PROTOCOL_VERSION, "drained": 1, "lag": 2, **changes})


def core(*, lag: int = 2, rank: int = 0, live_digest: int = 5, **changes: Any) -> RankCore:
    """A core at step 0."""
    return RankCore(rank, config(**changes), live_digest, lag=lag)


def run_to(it: RankCore, step_idx: int, *others: dict[str, int]) -> list[Decision]:
    """Step up to ``step_idx``, in a group of this core and peers that vote the same but for some words."""
    decisions = []
    while it.step_idx < step_idx:
        it.step_idx += 1
        if it.is_commit_due:
            it.commit_chunk(it.live_digest + 1)
        if it.posted is not None and it.step_idx >= it.read_due:
            votes = [it.posted, *(it.posted._replace(**other) for other in others)]
            decisions.append(it.read_round(tally_votes(votes)))
        if it.posted is None and it.step_idx >= it.post_due:
            it.post_vote(0)
    return decisions


def run_until(it: RankCore, kind: DecisionKind, *others: dict[str, int], within: int = 200) -> Decision:
    """Step until a round decides this; what a COMMIT decides becomes live at the steps after it."""
    for _ in range(within):
        for decision in run_to(it, it.step_idx + 1, *others):
            if decision.kind is kind:
                return decision
    raise AssertionError(f"no {kind} within {within} steps")


def transferring(it: RankCore, *, num_chunks: int = PLAN.num_chunks) -> RankCore:
    """Bring a core into TRANSFERRING."""
    it.request_rebalance()
    run_until(it, DecisionKind.START)
    assert it.load_collected(it.epoch)
    assert it.plan_ready(it.epoch, replace(PLAN, num_chunks=num_chunks))
    run_until(it, DecisionKind.BEGIN)
    return it


def skip_epoch(it: RankCore, *, within: int = 200) -> None:
    """Let an epoch start when it does, and end without a gain."""
    run_until(it, DecisionKind.START, within=within)
    assert it.load_collected(it.epoch)
    assert it.plan_ready(it.epoch, PlanTerms(digest=1, num_chunks=0, deadline_steps=0, skip=True))
    run_until(it, DecisionKind.SKIP)


def commit(it: RankCore, num_chunks: int) -> None:
    """Stage so many chunks, each once the one before is live, and commit them."""
    for _ in range(num_chunks):
        decide_commits(it, 1)
        run_to(it, it.commit_due)


def decide_commits(it: RankCore, num_chunks: int) -> None:
    """Stage so many chunks and have one round decide to commit them all."""
    for chunk_idx in range(it.chunk_idx, it.chunk_idx + num_chunks):
        assert it.chunk_staged(it.epoch, chunk_idx)
    assert run_until(it, DecisionKind.COMMIT).num_chunks == num_chunks


PROGRESS = list(Progress)
