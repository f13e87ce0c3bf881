"""What a round decides, told from the votes themselves: the tally of largest and smallest words leaves nothing out."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st

from eplb_fsm.core.reasons import AbortReason, StopReason, encode_reason
from eplb_fsm.core.votes import DecisionKind, Progress, Vote, decide, decode_tally, encode_vote, tally_votes

WORDS = st.sampled_from([word for word in Vote._fields if word != "progress"])
PLANNING = (Progress.BUSY, Progress.SKIP, Progress.READY)
TRANSFERRING = (Progress.STAGING, Progress.STAGED)
PLACE = ("protocol_version", "generation", "config_fingerprint", "round_idx", "step_idx", "pass_id", "epoch")
PLAN = ("num_chunks", "plan_digest")
UNKNOWN = 99
"""The code of a reason that this version does not know."""


MANY = settings(max_examples=max(settings().max_examples, 1000))
"""A round takes no time, and has many words."""


@st.composite
def rounds(draw: st.DrawFn) -> list[Vote]:
    """Votes that mostly agree: each word is 1 on all ranks, but for some on some."""
    phase = draw(st.sampled_from([(Progress.IDLE,), PLANNING, TRANSFERRING, (Progress.STAGED,), tuple(Progress)]))
    own = dict.fromkeys(Vote._fields, 1) | dict.fromkeys(("abort", "stop", "freeze"), 0)
    votes = [
        Vote(**own)._replace(
            progress=draw(st.sampled_from(phase)), drained=draw(st.sampled_from((1, 1, 0))), request=draw(st.booleans())
        )
        for _ in range(draw(st.integers(1, 4)))
    ]
    for _ in range(draw(st.sampled_from((1, 1, 0, 2)))):
        at, word = draw(st.integers(0, len(votes) - 1)), draw(WORDS)
        votes[at] = votes[at]._replace(**{word: draw(other_values(word))})
    return votes


def other_values(word: str) -> st.SearchStrategy[int]:
    """What a word may be that is not what all have."""
    reasons = {"abort": AbortReason, "stop": StopReason}
    if word in reasons:
        codes = st.sampled_from([*map(int, reasons[word]), UNKNOWN])
        return st.builds(encode_reason, codes, st.integers(0, 3))
    return st.sampled_from((2, 0, 1))


def decided(votes: list[Vote]) -> DecisionKind:
    """What a round decides, from all that was voted."""

    def said(word: str) -> set[int]:
        return {getattr(vote, word) for vote in votes}

    def differ(*words: str) -> bool:
        return any(len(said(word)) > 1 for word in words)

    progress = said("progress")
    phase = next((own for own in ((Progress.IDLE,), PLANNING, TRANSFERRING) if progress <= {*own}), ())
    if any(said("stop")) or not phase or differ(*PLACE, "live_digest"):
        return DecisionKind.STOP
    if phase == TRANSFERRING and differ("chunk_idx", *PLAN):
        return DecisionKind.STOP
    if phase == (Progress.IDLE,):
        return decided_idle(votes, said)
    if max(said("abort")) >= UNKNOWN << 32:
        return DecisionKind.STOP
    if any(said("abort") | said("freeze")):
        return DecisionKind.ABORT
    return decided_active(progress, phase, differs=differ("progress", *PLAN))


def decided_active(progress: set[int], phase: tuple[Progress, ...], *, differs: bool) -> DecisionKind:
    """The same in an epoch that nobody wants to end."""
    if progress == {Progress.STAGED}:
        return DecisionKind.COMMIT
    if phase == TRANSFERRING or Progress.BUSY in progress:
        return DecisionKind.NONE
    if differs:
        return DecisionKind.ABORT
    return DecisionKind.SKIP if progress == {Progress.SKIP} else DecisionKind.BEGIN


def decided_idle(votes: list[Vote], said: Callable[[str], set[int]]) -> DecisionKind:
    """The same where no epoch is under way."""
    all_drained = 0 not in said("drained")
    if any(said("freeze")):
        return DecisionKind.FREEZE if all_drained else DecisionKind.NONE
    is_time = all(vote.step_idx >= max(said("earliest_next_step")) for vote in votes)
    return DecisionKind.START if any(said("request")) and all_drained and is_time else DecisionKind.NONE


@MANY
@given(votes=rounds())
def test_a_tally_decides_what_the_votes_say(votes: list[Vote]) -> None:
    """A decision made from the largest and smallest words is the one that a look at every vote gives."""
    decision = decide(tally_votes(votes))
    assert decision.kind is decided(votes)
    assert (decision.reason is None) == (decision.kind not in (DecisionKind.ABORT, DecisionKind.STOP))


@MANY
@given(votes=rounds(), cut=st.integers(0, 4))
def test_a_reduction_in_parts_is_the_tally(votes: list[Vote], cut: int) -> None:
    """However a MAX reduction is put together from those of some ranks, it is the tally of all votes."""

    def reduced(parts: list[list[int]]) -> list[int]:
        return [max(words) for words in zip(*parts, strict=True)]

    words = [encode_vote(vote) for vote in votes]
    parts = [reduced(part) for part in (words[:cut], words[cut:]) if part]
    assert decode_tally(reduced(parts)) == tally_votes(votes)


@MANY
@given(votes=rounds())
def test_who_gives_a_reason_is_named(votes: list[Vote]) -> None:
    """A decision that some rank asked for names a rank that did, and its reason, or says that it does not know it."""
    decision = decide(tally_votes(votes))
    if decision.rank >= 0:
        word = "stop" if decision.kind is DecisionKind.STOP else "abort"
        assert decision.reason is not None
        assert encode_reason(decision.reason, decision.rank) in {getattr(vote, word) for vote in votes}
    elif decision.kind is DecisionKind.STOP:
        assert decision.detail
