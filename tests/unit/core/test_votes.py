"""Votes, tallies and decide(): a total function, the same for every order of ranks, with fixed precedence."""

from __future__ import annotations

import random
from typing import Any

import pytest
from cores import vote
from hypothesis import given
from hypothesis import strategies as st

from eplb_fsm.core.reasons import AbortReason, OutcomeKind, StopReason, decode_reason, encode_reason
from eplb_fsm.core.votes import (
    NUM_VOTE_WORDS,
    DecisionKind,
    Progress,
    Vote,
    decide,
    decode_tally,
    encode_vote,
    tally_votes,
)

INT64 = st.one_of(st.integers(-(2**63), 2**63 - 1), st.integers(-3, 7), st.sampled_from([-(2**63), 2**63 - 1]))
ANY_VOTE = st.lists(INT64, min_size=NUM_VOTE_WORDS, max_size=NUM_VOTE_WORDS).map(lambda words: Vote(*words))
REASONS = st.one_of(st.just(0), st.builds(encode_reason, st.sampled_from(list(AbortReason)), st.integers(0, 9)))
STOPS = st.one_of(
    st.just(0), st.just(0), st.builds(encode_reason, st.sampled_from(list(StopReason)), st.integers(0, 9))
)


@st.composite
def plausible_votes(draw: st.DrawFn) -> list[Vote]:
    """Votes of 1 to 5 ranks that agree in most words."""
    phase = draw(st.sampled_from([[0], [1, 2, 3], [4, 5], [0, 1, 2, 3, 4, 5]]))
    common = vote(chunk_idx=draw(st.integers(0, 2)), num_chunks=3, plan_digest=draw(INT64), live_digest=draw(INT64))
    votes = []
    for _ in range(draw(st.integers(1, 5))):
        changes = {
            "progress": draw(st.sampled_from(phase)),
            "abort": draw(REASONS),
            "stop": draw(STOPS),
            "request": draw(st.integers(0, 1)),
            "drained": draw(st.integers(0, 1)),
            "freeze": draw(st.sampled_from([0, 0, 1])),
        }
        for word in draw(st.sampled_from([(), (), ("epoch",), ("plan_digest",), ("live_digest",), ("chunk_idx",)])):
            changes[word] = draw(st.integers(0, 1))
        votes.append(common._replace(**changes))
    return votes


@given(votes=st.one_of(st.lists(ANY_VOTE, min_size=1, max_size=5), plausible_votes()), seed=st.integers())
def test_decide_is_total_and_symmetric(votes: list[Vote], seed: int) -> None:
    """decide() never raises, whatever the words, and does not care which rank said what."""
    shuffled = random.Random(seed).sample(votes, len(votes))
    assert decide(tally_votes(votes)) == decide(tally_votes(shuffled))


@given(votes=plausible_votes())
def test_precedence(votes: list[Vote]) -> None:
    """STOP comes first, then words that must be equal, then ABORT, then the ladder."""
    decision = decide(tally_votes(votes))
    live = {v.live_digest for v in votes}
    phases = {(v.progress > 0) + (v.progress > 3) for v in votes}
    words = [(v.epoch, *((v.chunk_idx, v.num_chunks, v.plan_digest) if 2 in phases else ())) for v in votes]
    if any(v.stop for v in votes):
        assert (decision.kind, decision.reason) == (DecisionKind.STOP, decode_reason(max(v.stop for v in votes))[0])
    elif len(set(words)) > 1 or len(phases) > 1:
        assert (decision.kind, decision.reason) == (DecisionKind.STOP, StopReason.DESYNC)
    elif len(live) > 1:
        assert (decision.kind, decision.reason) == (DecisionKind.STOP, StopReason.DIVERGED)
    elif phases != {0} and any(v.abort or v.freeze for v in votes):
        assert decision.kind is DecisionKind.ABORT
    elif decision.kind is DecisionKind.ABORT:
        assert decision.reason is AbortReason.PLAN_MISMATCH
        assert all(v.progress in (Progress.SKIP, Progress.READY) for v in votes)


@given(votes=st.one_of(plausible_votes(), st.lists(ANY_VOTE, min_size=1, max_size=4)))
def test_commit_needs_the_promise_of_all(votes: list[Vote]) -> None:
    """COMMIT is decided exactly when all promise the same chunk of the same plan from the same placement."""
    is_commit = decide(tally_votes(votes)).kind is DecisionKind.COMMIT
    if is_commit:
        assert all(v.promises_commit for v in votes)
        assert len({(v.epoch, v.chunk_idx, v.num_chunks, v.plan_digest, v.live_digest) for v in votes}) == 1
    staged = [v._replace(progress=5, abort=0, stop=0, freeze=0) for v in votes[:1]] * 3
    assert decide(tally_votes(staged)).kind is DecisionKind.COMMIT


@given(votes=plausible_votes())
def test_starts_need_drained_and_a_request(votes: list[Vote]) -> None:
    """START needs a request, every rank drained, nobody frozen, and the back-off of every rank over."""
    idle = [v._replace(progress=0, step_idx=40, stop=0) for v in votes]
    kind = decide(tally_votes(idle)).kind
    if kind is DecisionKind.START:
        assert all(v.drained for v in idle)
        assert any(v.request for v in idle)
        assert not any(v.freeze for v in idle)
    waiting = [v._replace(earliest_next_step=41 if i == 0 else 0) for i, v in enumerate(idle)]
    assert decide(tally_votes(waiting)).kind is not DecisionKind.START


@pytest.mark.parametrize("progress", [Progress.READY, Progress.SKIP])
def test_a_plan_is_begun_or_skipped_when_all_have_it(progress: Progress) -> None:
    """All ready with one digest: BEGIN; all with no gain: SKIP; one still busy: nothing yet."""
    ready = vote(progress=progress, plan_digest=9, num_chunks=2)
    wanted = DecisionKind.BEGIN if progress is Progress.READY else DecisionKind.SKIP
    assert decide(tally_votes([ready, ready])).kind is wanted
    assert decide(tally_votes([ready, vote(progress=Progress.BUSY)])).kind is DecisionKind.NONE


@pytest.mark.parametrize(("word", "value"), [("plan_digest", -4), ("num_chunks", 3), ("progress", Progress.SKIP)])
def test_plans_that_differ_name_both(word: str, value: int) -> None:
    """Ranks with different plans abort, and the detail names the word and both values."""
    ready = vote(progress=Progress.READY, plan_digest=9, num_chunks=2)
    decision = decide(tally_votes([ready, ready._replace(**{word: value})]))
    assert (decision.kind, decision.reason) == (DecisionKind.ABORT, AbortReason.PLAN_MISMATCH)
    assert word in decision.detail
    assert str(int(value)) in decision.detail


PHASES = [[Progress.IDLE], [Progress.BUSY, Progress.SKIP, Progress.READY], [Progress.STAGING, Progress.STAGED]]


@pytest.mark.parametrize("low", Progress)
@pytest.mark.parametrize("high", Progress)
def test_ranks_in_different_phases_stop(low: Progress, high: Progress) -> None:
    """Ranks may differ in progress while they plan, or while they transfer; any other difference is a DESYNC."""
    decision = decide(tally_votes([vote(progress=low), vote(progress=high)]))
    if any(low in phase and high in phase for phase in PHASES):
        assert decision.kind is not DecisionKind.STOP
    else:
        assert (decision.kind, decision.reason) == (DecisionKind.STOP, StopReason.DESYNC)
        assert decision.detail == f"progress is {min(low, high)} on one rank and {max(low, high)} on another"


@pytest.mark.parametrize("word", ["chunk_idx", "num_chunks", "plan_digest"])
@pytest.mark.parametrize("progress", Progress)
def test_words_of_a_transfer_must_be_equal_in_it(word: str, progress: Progress) -> None:
    """Chunk and plan must be the same on all ranks as soon as one of them transfers, whatever it has staged."""
    decision = decide(tally_votes([vote(progress=progress, **{word: 3}), vote(progress=progress, **{word: 8})]))
    if progress >= Progress.STAGING:
        assert (decision.kind, decision.reason) == (DecisionKind.STOP, StopReason.DESYNC)
        assert decision.detail == f"{word} is 3 on one rank and 8 on another"
    else:
        assert decision.kind is not DecisionKind.STOP


def test_placements_that_differ_are_named() -> None:
    """Ranks that serve with different placements stop as DIVERGED, and the detail has both digests."""
    decision = decide(tally_votes([vote(live_digest=3), vote(live_digest=8)]))
    assert (decision.kind, decision.reason) == (DecisionKind.STOP, StopReason.DIVERGED)
    assert decision.detail == "live_digest is 3 on one rank and 8 on another"
    assert decision.rank == -1, "no rank gave the reason, the tally is"


@pytest.mark.parametrize(
    ("word", "reason", "kind"),
    [("abort", AbortReason.INTEGRITY, DecisionKind.ABORT), ("stop", StopReason.TRANSPORT, DecisionKind.STOP)],
)
def test_a_decision_names_the_rank_that_gave_the_reason(
    word: str, reason: AbortReason | StopReason, kind: DecisionKind
) -> None:
    """Who asked to abort or to stop is part of what is decided."""
    decision = decide(tally_votes([vote(progress=1), vote(progress=1, **{word: encode_reason(reason, 6)})]))
    assert (decision.kind, decision.reason, decision.rank) == (kind, reason, 6)


@pytest.mark.parametrize(("step_idx", "kind"), [(39, DecisionKind.NONE), (40, DecisionKind.START)])
def test_a_back_off_ends_at_its_step(step_idx: int, kind: DecisionKind) -> None:
    """The first round that may start an epoch is the one posted at the step to which the ranks back off."""
    votes = [vote(request=1, step_idx=step_idx, earliest_next_step=step) for step in (0, 40)]
    assert decide(tally_votes(votes)).kind is kind


def test_a_vote_with_more_words_is_an_error() -> None:
    """Votes of different lengths are refused, not cut to the shortest."""
    longer: Any = (*vote(), 0)
    with pytest.raises(ValueError, match="zip"):
        tally_votes([vote(), longer])


@pytest.mark.parametrize(
    "word", ["protocol_version", "generation", "config_fingerprint", "round_idx", "step_idx", "pass_id", "epoch"]
)
def test_words_that_must_be_equal_are_named(word: str) -> None:
    """A word that must be equal and is not ends in DESYNC with its name and both values."""
    decision = decide(tally_votes([vote(**{word: 3}), vote(**{word: 8})]))
    assert (decision.kind, decision.reason) == (DecisionKind.STOP, StopReason.DESYNC)
    assert decision.detail == f"{word} is 3 on one rank and 8 on another"


@pytest.mark.parametrize("word", ["abort", "stop"])
@pytest.mark.parametrize("value", [1 << 40, 5, 2**62])
def test_a_reason_of_a_later_version(word: str, value: int) -> None:
    """A reason that this version does not know stops rebalancing instead of raising in the decode loop."""
    decision = decide(tally_votes([vote(progress=1), vote(progress=1, **{word: value})]))
    assert (decision.kind, decision.reason) == (DecisionKind.STOP, StopReason.DESYNC)
    assert decision.detail == f"{word} is {value:#x} on some rank, a reason that this version does not know"


@given(votes=st.lists(ANY_VOTE, min_size=1, max_size=5))
def test_a_reduction_gives_largest_and_smallest(votes: list[Vote]) -> None:
    """MAX over words and complements, as a channel makes it, equals the tally of votes at hand, also at INT64_MIN."""
    encoded = [encode_vote(v) for v in votes]
    assert all(-(2**63) <= word < 2**63 for words in encoded for word in words)
    assert decode_tally([max(column) for column in zip(*encoded, strict=True)]) == tally_votes(votes)


@given(code=st.integers(1, 2**30), rank=st.integers(0, 2**32 - 1))
def test_reasons_travel_in_one_word(code: int, rank: int) -> None:
    """A reason and its rank come out of the word as they went in, and the word is never 0 and never negative."""
    word = encode_reason(code, rank)
    assert decode_reason(word) == (code, rank)
    assert 0 < word < 2**63


def test_reason_codes_are_stable() -> None:
    """Codes travel between versions and in traces: added at the end, never renumbered, never 0."""
    assert [int(reason) for reason in AbortReason] == list(range(1, len(AbortReason) + 1))
    assert [int(reason) for reason in StopReason] == list(range(1, len(StopReason) + 1))
    assert AbortReason.PLAN_MISMATCH == 1
    assert AbortReason.UNRESOLVED_VOTE == 15
    assert (StopReason.CLOSED, StopReason.DESYNC) == (1, 5)
    assert [int(kind) for kind in OutcomeKind] == [1, 2, 3, 4]
