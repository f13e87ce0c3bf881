"""Each invariant sees the violation that it is named after, and nothing in a run that holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from eplb_fsm.core import invariants
from eplb_fsm.core.invariants import EVENT_INVARIANTS, Forward, find_violations
from eplb_fsm.observe.events import Event


def event(rank: int, round_idx: int, action: str, state: str = "TRANSFERRING", **detail: Any) -> Event:
    """An event of epoch 1 at the step with the round's number."""
    return Event(
        seq=0,
        rank=rank,
        step_idx=round_idx,
        action=action,
        state=state,
        epoch=1,
        round_idx=round_idx,
        chunk_idx=0,
        num_staged=0,
        is_drained=True,
        is_frozen=False,
        live_digest=9 if action == "ReadRound" and detail.get("decision") == "COMMIT" else 8,
        detail=detail,
    )


def epoch(rank: int) -> list[Event]:
    """The events of a rank in an epoch of one chunk."""
    return [
        event(rank, 1, "PostVote", "IDLE", abort=0, stop=0),
        event(rank, 1, "ReadRound", "COLLECTING", decision="START"),
        event(rank, 1, "LoadCollected", "COMPUTING"),
        event(rank, 1, "PlanReady", "AWAITING_CONSENSUS", plan_digest=3, deadline_steps=10),
        event(rank, 2, "PostVote", "AWAITING_CONSENSUS", abort=0, stop=0),
        event(rank, 2, "ReadRound", decision="BEGIN"),
        event(rank, 2, "ChunkStaged"),
        event(rank, 3, "PostVote", abort=0, stop=0),
        event(rank, 3, "ReadRound", "IDLE", decision="COMMIT", outcome="COMMITTED"),
    ]


GOOD = [*epoch(0), *epoch(1)]
LAST = len(GOOD) - 1
STAGED, POST, COMMIT = LAST - 2, LAST - 1, LAST


def changed(at: int, **words: Any) -> list[Event]:
    """A good run with other words in one event of rank 1; its details are words too."""
    own = {name: value for name, value in words.items() if name in Event.__dataclass_fields__}
    detail = {**GOOD[at].detail, **{name: value for name, value in words.items() if name not in own}}
    return [*GOOD[:at], replace(GOOD[at], detail=detail, **own), *GOOD[at + 1 :]]


def without(*positions: int) -> list[Event]:
    """A good run without some events."""
    return [e for at, e in enumerate(GOOD) if at not in positions]


START, PLAN, BEGIN = LAST - 7, LAST - 5, LAST - 3
BAD: list[tuple[str, Sequence[Event]]] = [
    ("same_step_commit", changed(COMMIT, step_idx=4)),
    ("same_step_commit", changed(COMMIT, live_digest=7)),
    ("same_step_commit", changed(COMMIT, action="ResolveRound", decision="ABORT", outcome="ABORTED")),
    (
        "same_step_commit",
        [*without(COMMIT), event(1, 4, "GiveUp", "STOPPED", outcome="FAILED")],
    ),
    ("same_decision", changed(BEGIN, decision="NONE")),
    ("same_plan", changed(PLAN, plan_digest=4)),
    ("no_transfer_without_consensus", without(BEGIN)),
    ("no_transfer_without_consensus", without(PLAN)),
    ("no_stale_receive", changed(START - 1, is_drained=False)),
    ("no_commit_after_abort", changed(POST, abort=1)),
    (
        "no_commit_after_abort",
        [*GOOD, replace(event(2, 2, "ReadRound", "IDLE", decision="ABORT"), detail={"outcome": "ABORTED"})],
    ),
    ("commit_cannot_fail", [*GOOD, event(1, 3, "CommitFailed", "IDLE", text="no")]),
    (
        "stopped_harmless",
        [*GOOD, event(1, 4, "GiveUp", "STOPPED"), event(1, 5, "PostVote", "STOPPED", abort=0, stop=0)],
    ),
    (
        "stopped_harmless",
        [*GOOD, event(1, 4, "GiveUp", "STOPPED"), replace(event(1, 5, "Close", "STOPPED"), live_digest=1)],
    ),
    ("outcome_recorded", changed(COMMIT, outcome="")),
    ("outcome_recorded", [*GOOD, event(1, 4, "ReadRound", "IDLE", decision="NONE", outcome="ABORTED")]),
    ("frozen_is_quiet", changed(COMMIT, is_frozen=True, is_drained=False)),
    (
        "frozen_is_quiet",
        [*GOOD, *(replace(event(1, at, "PostVote", "IDLE"), is_frozen=True, live_digest=at) for at in (4, 5))],
    ),
    ("epoch_bounded", changed(COMMIT, step_idx=80)),
]


@pytest.mark.parametrize(("name", "events"), BAD)
def test_a_violation_is_seen(name: str, events: Sequence[Event]) -> None:
    """A run that breaks one rule is reported under that rule's name."""
    found = find_violations(events, lambda deadline: 20 + deadline)
    assert name in {text.split(":")[0] for text in found}


def test_a_good_run_has_no_violation() -> None:
    """A plain epoch on two ranks breaks nothing."""
    assert find_violations(GOOD, lambda deadline: 20 + deadline) == []


def test_every_invariant_has_a_violation_of_its_own() -> None:
    """No invariant over events is there that could not fail."""
    assert {*(invariant.__name__ for invariant in EVENT_INVARIANTS), "epoch_bounded"} == {name for name, _ in BAD}


def test_forwards_and_slots() -> None:
    """Passes with different maps, slots with another content, replicas that differ and lost experts are all named."""
    same = [Forward(0, 1, "a"), Forward(1, 1, "a"), Forward(0, 2, "b"), Forward(1, 2, "b")]
    assert invariants.no_torn_forward(same) == []
    assert invariants.no_torn_forward([*same, Forward(2, 2, "a")]) == ["pass 2: ranks 0 and 2 used different maps"]
    assert invariants.live_equals_map([1, 2], [1, 2]) == []
    assert invariants.live_equals_map([1, 2], [1, 3]) == ["slot 1 holds 2, the map says 3"]
    assert invariants.replicas_equal([0, 1, 0, -1, -1], "xyxab") == []
    assert invariants.replicas_equal([0, 1, 0], "xyz") == ["slots 0 and 2 of expert 0 differ"]
    assert invariants.every_expert_reachable([1, 0, -1], 2) == []
    assert invariants.every_expert_reachable([1, 1], 2) == ["expert 0 has no slot"]
