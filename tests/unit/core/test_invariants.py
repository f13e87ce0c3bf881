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
        live_digest=9 if action == "CommitChunk" else 8,
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
        event(rank, 3, "ReadRound", decision="COMMIT", num_chunks=1),
        event(rank, 3, "CommitChunk", "IDLE", chunk=0, outcome="COMMITTED"),
    ]


GOOD = [*epoch(0), *epoch(1)]
LAST = len(GOOD) - 1
START, _, PLAN, POST_READY, BEGIN, STAGED, POST, READ, COMMIT = range(LAST - 8, LAST + 1)


def changed(at: int, **words: Any) -> list[Event]:
    """A good run with other words in one event of rank 1; its details are words too."""
    own = {name: value for name, value in words.items() if name in Event.__dataclass_fields__}
    detail = {**GOOD[at].detail, **{name: value for name, value in words.items() if name not in own}}
    return [*GOOD[:at], replace(GOOD[at], detail=detail, **own), *GOOD[at + 1 :]]


def without(*positions: int) -> list[Event]:
    """A good run without some events."""
    return [e for at, e in enumerate(GOOD) if at not in positions]


def later(events: Sequence[Event], **details: Any) -> list[Event]:
    """The same in epoch 2, ten rounds and steps later, with other details in PlanReady."""
    return [
        replace(
            e,
            epoch=2,
            round_idx=e.round_idx + 10,
            step_idx=e.step_idx + 10,
            detail={**e.detail, **(details if e.action == "PlanReady" else {})},
        )
        for e in events
    ]


def aborts(rank: int, round_idx: int, **words: Any) -> Event:
    """A rank reads that its epoch was aborted."""
    return event(rank, round_idx, "ReadRound", "IDLE", **{"decision": "ABORT", "outcome": "ABORTED", **words})


def up_to_begin(rank: int) -> list[Event]:
    """An epoch of which only the end is left out."""
    return epoch(rank)[:-4]


def bound(deadline: int) -> int:
    """A bound as loose as the tests need it."""
    return 20 + deadline


GIVES_UP = event(1, 4, "GiveUp", "STOPPED")
BAD: list[tuple[str, Sequence[Event], list[str]]] = [
    (
        "same_step_commit",
        changed(COMMIT, step_idx=4),
        ["epoch 1: commits chunk 0 with step_idx 3 on rank 0 and 4 on rank 1"],
    ),
    (
        "same_step_commit",
        changed(COMMIT, live_digest=7),
        ["epoch 1: commits chunk 0 with live_digest 9 on rank 0 and 7 on rank 1"],
    ),
    (
        "same_step_commit",
        [*GOOD[:READ], replace(aborts(1, 3), action="ResolveRound")],
        ["round 3: rank 0 committed, rank 1 did not"],
    ),
    (
        "same_step_commit",
        [*without(READ, COMMIT), replace(GIVES_UP, detail={"outcome": "FAILED"})],
        ["round 3: rank 0 committed, rank 1 did not"],
    ),
    (
        "same_decision",
        changed(BEGIN, decision="NONE"),
        ["round 2: rank 0 read BEGIN at step 2, rank 1 read NONE at step 2"],
    ),
    (
        "same_decision",
        changed(BEGIN, step_idx=3),
        ["round 2: rank 0 read BEGIN at step 2, rank 1 read BEGIN at step 3"],
    ),
    (
        "same_decision",
        [aborts(0, 2, reason="FROZEN"), aborts(1, 2, reason="REQUESTED")],
        ["round 2: rank 0 read ABORT at step 2, rank 1 read ABORT at step 2"],
    ),
    (
        "same_decision",
        [event(2, 1, "ResolveRound", decision="ABORT"), *changed(BEGIN, decision="NONE")],
        ["round 2: rank 0 read BEGIN at step 2, rank 1 read NONE at step 2"],
    ),
    (
        "same_decision",
        [*without(BEGIN), event(1, 2, "ReadRound")],
        ["round 2: rank 0 read BEGIN at step 2, rank 1 read  at step 2"],
    ),
    ("same_plan", changed(PLAN, plan_digest=4), ["epoch 1: ranks 0 and 1 begin with different plans"]),
    (
        "no_transfer_without_consensus",
        without(BEGIN),
        ["rank 1 moves weights in epoch 1 without a BEGIN"] * 2,
    ),
    ("no_transfer_without_consensus", without(PLAN), ["rank 1 begins epoch 1 without a plan"]),
    (
        "no_transfer_without_consensus",
        [event(1, 2, "ChunkStaged"), event(1, 2, "ReadRound", decision="BEGIN")],
        ["rank 1 moves weights in epoch 1 without a BEGIN", "rank 1 begins epoch 1 without a plan"],
    ),
    (
        "no_transfer_without_consensus",
        [*epoch(0), *(e for e in later(epoch(0)) if e.detail.get("decision") != "BEGIN")],
        ["rank 0 moves weights in epoch 2 without a BEGIN"] * 2,
    ),
    (
        "no_transfer_without_consensus",
        [event(1, 1, "WorkFailed", decision="BEGIN"), event(1, 2, "ChunkStaged")],
        ["rank 1 moves weights in epoch 1 without a BEGIN"],
    ),
    (
        "commit_is_decided",
        without(READ),
        ["rank 1 commits a chunk in epoch 1 that no round decided"],
    ),
    (
        "commit_is_decided",
        [*GOOD, replace(GOOD[COMMIT], detail={**GOOD[COMMIT].detail, "chunk": 1})],
        ["rank 1 commits a chunk in epoch 1 that no round decided"],
    ),
    (
        "commit_is_decided",
        [*changed(READ, num_chunks=3), event(1, 4, "ReadRound", decision="NONE")],
        ["rank 1 reads round 4 before 2 decided commits"],
    ),
    ("commit_is_decided", [*changed(READ, num_chunks=2), GIVES_UP], ["rank 1 stops before 1 decided commits"]),
    (
        "same_decision",
        changed(READ, num_chunks=2),
        ["round 3: rank 0 read COMMIT of 1 chunks at step 3, rank 1 read COMMIT of 2 chunks at step 3"],
    ),
    (
        "no_stale_receive",
        changed(START - 1, is_drained=False),
        ["round 1 starts an epoch, rank 1 was not drained"],
    ),
    ("no_commit_after_abort", changed(POST, abort=1), [f"round 3 commits on rank {it}, rank 1 refused" for it in "01"]),
    ("no_commit_after_abort", changed(POST, stop=1), [f"round 3 commits on rank {it}, rank 1 refused" for it in "01"]),
    *(
        (
            "no_commit_after_abort",
            [*GOOD, event(2, 2, "ReadRound", "IDLE", decision=decision, outcome=outcome), aborts(2, 9)],
            [f"epoch 1 ended on rank 2 and commits later on rank {rank}" for rank in (0, 1)],
        )
        for decision, outcome in (("ABORT", "ABORTED"), ("SKIP", "SKIPPED"))
    ),
    ("commit_cannot_fail", [*GOOD, event(1, 3, "CommitFailed", "IDLE", text="no")], ["rank 1 step 3: no"]),
    (
        "stopped_harmless",
        [*GOOD, GIVES_UP, event(1, 5, "PostVote", "STOPPED", abort=0, stop=0)],
        ["rank 1: PostVote at step 5 after it had stopped"],
    ),
    (
        "stopped_harmless",
        [*GOOD, GIVES_UP, replace(event(1, 5, "Close", "STOPPED"), live_digest=1), event(1, 6, "Close", "STOPPED")],
        ["rank 1: the map changed at step 5 after it had stopped"],
    ),
    ("outcome_recorded", changed(COMMIT, outcome=""), ["rank 1: epoch 1 ended at step 3 without an outcome"]),
    (
        "outcome_recorded",
        [*GOOD, event(1, 4, "ReadRound", "IDLE", decision="NONE", outcome="ABORTED")],
        ["rank 1: outcome ABORTED at step 4 with no epoch under way"],
    ),
    (
        "epoch_bounded",
        [*changed(COMMIT, step_idx=32, state="TRANSFERRING"), event(1, 33, "PostVote"), event(1, 34, "PostVote")],
        ["rank 1: epoch 1 takes more than 30 steps"],
    ),
    (
        "epoch_bounded",
        [*GOOD, *later(up_to_begin(1)[:3]), replace(aborts(1, 32), epoch=2)],
        ["rank 1: epoch 2 takes more than 20 steps"],
    ),
    (
        "epoch_bounded",
        [*epoch(0)[:3], event(0, 2, "PlanReady", "AWAITING_CONSENSUS", plan_digest=3), aborts(0, 22)],
        ["rank 0: epoch 1 takes more than 20 steps"],
    ),
    (
        "frozen_is_quiet",
        changed(COMMIT, is_frozen=True, is_drained=False),
        ["rank 1: frozen at step 3 with a transfer under way"],
    ),
    (
        "frozen_is_quiet",
        [*GOOD, *(replace(event(1, at, "PostVote", "IDLE"), is_frozen=True, live_digest=at) for at in (4, 5))],
        ["rank 1: the map changed at step 5 while frozen"],
    ),
]
HOLDS: dict[str, Sequence[Event]] = {
    "an epoch on two ranks": GOOD,
    "the same, interleaved": [e for pair in zip(epoch(0), epoch(1), strict=True) for e in pair],
    "two epochs with plans of their own": [*GOOD, *later(GOOD, plan_digest=4)],
    "a rank that gives up after the last commit": [*GOOD, GIVES_UP],
    "a rank that stopped and is closed": [*GOOD, GIVES_UP, event(1, 5, "Close", "STOPPED")],
    "a rank that died between its promise and the decision": without(READ, COMMIT),
    "a rank that died between the decision and the commit": without(COMMIT),
    "an aborted epoch, and one that commits and is then aborted": [
        *up_to_begin(0),
        aborts(0, 3),
        *later(epoch(0)[:-1]),
        *later([event(0, 3, "CommitChunk", chunk=0), aborts(0, 4)]),
    ],
    "an epoch as long as its bound": changed(COMMIT, step_idx=31)[10:],
    "an epoch without a plan as long as its bound": [*epoch(0)[:3], aborts(0, 21)],
    "a rank that is frozen from the first event on": [replace(event(0, 1, "PostVote", "IDLE"), is_frozen=True)],
    "ranks that are idle for long, before an epoch or after it": [
        *epoch(0),
        event(0, 500, "PostVote", "IDLE"),
        event(1, 500, "PostVote", "IDLE"),
    ],
}


@pytest.mark.parametrize(("name", "events", "texts"), BAD)
def test_a_violation_is_seen(name: str, events: Sequence[Event], texts: list[str]) -> None:
    """A run that breaks a rule is reported under that rule's name, as often as it does, with who and when."""
    found = [text.split(": ", 1) for text in find_violations(events, bound)]
    assert [text for its_name, text in found if its_name == name] == texts


@pytest.mark.parametrize("name", HOLDS)
def test_what_is_allowed_is_no_violation(name: str) -> None:
    """Runs in which nothing is wrong break no rule."""
    assert find_violations(HOLDS[name], bound) == []


def test_a_history_is_sorted_once() -> None:
    """What was sorted for one invariant is taken as it is by the next."""
    history = invariants._History(GOOD)
    assert invariants._History.of(history) is history
    assert invariants._History.of(GOOD) == GOOD


def test_a_commit_in_the_round_of_an_abort_is_not_later() -> None:
    """Ranks that conclude differently from one round break the rule of equal commits, not that of late ones."""
    split = [*GOOD[:READ], replace(aborts(1, 3), action="ResolveRound")]
    assert invariants.no_commit_after_abort(split) == []


def test_every_invariant_has_a_violation_of_its_own() -> None:
    """No invariant over events is there that could not fail."""
    assert {*(invariant.__name__ for invariant in EVENT_INVARIANTS), "epoch_bounded"} == {name for name, _, _ in BAD}


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


def test_slots_without_a_counterpart_are_an_error() -> None:
    """A map that has more or fewer slots than what is held is refused, not compared as far as it goes."""
    with pytest.raises(ValueError, match="zip"):
        invariants.live_equals_map([1, 2], [1])
    with pytest.raises(ValueError, match="zip"):
        invariants.replicas_equal([0, 1], "xyz")
