"""Good histories, and ways to make each of them break one invariant."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from group import TRANSFER_DEADLINE, Setup, play
from hypothesis import strategies as st

from eplb_fsm.core.deadlines import epoch_bound_steps
from eplb_fsm.observe.events import Event

History = list[Event]
Where = Callable[[History], list[int]]
"""The positions at which something can be done to a history."""
How = Callable[[Event], Sequence[Event]]
"""What stands in the place of an event."""
MAX_LAG = 2


class Damage(NamedTuple):
    """One thing that is wrong in a history.

    Attributes:
        breaks: The name of the invariant that has to see it.
        where: Where it may be.
        how: What it is.
    """

    breaks: str
    where: Where
    how: How

    def done_to(self, history: History, nth: int) -> History:
        """The history with this in the n-th place where it may be, counted round and round."""
        places = self.where(history)
        at = places[nth % len(places)]
        return [*history[:at], *self.how(history[at]), *history[at + 1 :]]


@st.composite
def good_histories(draw: st.DrawFn) -> tuple[Setup, History]:
    """Two epochs that commit, then a freeze."""
    ranks, lag, chunks, at_once = (draw(st.integers(*of)) for of in ((2, 3), (1, MAX_LAG), (1, 3), (1, 3)))
    setup = Setup(ranks, lag, chunks, step_interval=40, staged_at_once=at_once)
    freezing = draw(st.integers(0, setup.num_ranks - 1))
    return setup, play(setup, [("request_unfreeze", (0,), 70), ("request_freeze", (freezing,), 0)]).events


def changed(event: Event, **words: Any) -> Event:
    """An event with other words; its details are words too."""
    own = {name: value for name, value in words.items() if name in Event.__dataclass_fields__}
    detail = {name: value for name, value in words.items() if name not in own}
    return replace(event, detail={**event.detail, **detail}, **own)


# -- where ------------------------------------------------------------------------------------------------------


def does(action: str, **words: Any) -> Where:
    """Events of an action with these details."""
    return lambda history: [
        at
        for at, event in enumerate(history)
        if event.action == action and all(event.detail.get(word) == value for word, value in words.items())
    ]


def reads(decision: str) -> Where:
    """Readings of rounds that decide this."""
    return does("ReadRound", decision=decision)


COMMITS = does("CommitChunk")


def votes(decision: str) -> Where:
    """Votes of rounds that decide this."""

    def find(history: History) -> list[int]:
        rounds = {history[at].round_idx for at in reads(decision)(history)}
        return [at for at in does("PostVote")(history) if history[at].round_idx in rounds]

    return find


# -- how --------------------------------------------------------------------------------------------------------


def with_(**words: Any) -> How:
    """The event has other words."""
    return lambda event: [changed(event, **words)]


def moved(word: str, by: int) -> How:
    """A number in it is another one."""
    return lambda event: [changed(event, **{word: getattr(event, word) + by})]


def then(**words: Any) -> How:
    """Another event follows that is the same but for these words."""
    return lambda event: [event, changed(event, **words)]


def missing(event: Event) -> Sequence[Event]:
    """It is not there."""
    return []


def gives_up(event: Event) -> Sequence[Event]:
    """The rank gives up instead of reading a round."""
    return [replace(event, action="GiveUp", state="STOPPED", round_idx=event.round_idx + 1, detail={})]


TOO_LONG = epoch_bound_steps(Setup().config, MAX_LAG, TRANSFER_DEADLINE)
ENDS = does("CommitChunk", outcome="COMMITTED")
ABORTS = {"decision": "ABORT", "outcome": "ABORTED", "state": "IDLE"}

DAMAGES: dict[str, Damage] = {
    "a commit at another step": Damage("same_step_commit", COMMITS, moved("step_idx", 1)),
    "a commit to another map": Damage("same_step_commit", COMMITS, moved("live_digest", 1)),
    "a commit that one rank does not read": Damage("same_step_commit", reads("COMMIT"), with_(decision="NONE")),
    "a commit that one rank does not wait for": Damage("same_step_commit", reads("COMMIT"), gives_up),
    "a commit that is resolved as an abort": Damage(
        "same_step_commit", reads("COMMIT"), with_(action="ResolveRound", **ABORTS)
    ),
    "another decision": Damage("same_decision", does("ReadRound"), with_(decision="STOP")),
    "a reading at another step": Damage("same_decision", does("ReadRound"), moved("step_idx", -1)),
    "more commits": Damage("same_decision", reads("COMMIT"), with_(num_chunks=99)),
    "another reason": Damage("same_decision", does("ReadRound"), with_(reason="FROZEN")),
    "another plan": Damage("same_plan", does("PlanReady"), with_(plan_digest=-1)),
    "a BEGIN that is left out": Damage("no_transfer_without_consensus", reads("BEGIN"), missing),
    "a BEGIN without a plan": Damage("no_transfer_without_consensus", does("PlanReady"), missing),
    "a commit before BEGIN": Damage(
        "no_transfer_without_consensus", reads("START"), then(action="CommitChunk", chunk=-1)
    ),
    "a commit that no round has decided": Damage("commit_is_decided", COMMITS, then(chunk=-1)),
    "a commit that is left out": Damage("commit_is_decided", COMMITS, missing),
    "a rank that leaves before a commit": Damage("commit_is_decided", COMMITS, with_(action="GiveUp", state="STOPPED")),
    "a start on a rank that is not drained": Damage("no_stale_receive", votes("START"), with_(is_drained=False)),
    "a commit after a vote to abort": Damage("no_commit_after_abort", votes("COMMIT"), with_(abort=1)),
    "a commit after a vote to stop": Damage("no_commit_after_abort", votes("COMMIT"), with_(stop=1)),
    "a commit after the end": Damage("no_commit_after_abort", reads("BEGIN"), then(**ABORTS)),
    "a commit that fails": Damage("commit_cannot_fail", reads("COMMIT"), then(action="CommitFailed", text="no")),
    "an act after a stop": Damage("stopped_harmless", reads("START"), then(action="Close", state="STOPPED")),
    "another map after a stop": Damage("stopped_harmless", reads("BEGIN"), then(action="GiveUp", state="STOPPED")),
    "an end without an outcome": Damage("outcome_recorded", ENDS, with_(outcome="")),
    "an outcome without an epoch": Damage("outcome_recorded", reads("FREEZE"), with_(outcome="ABORTED")),
    "an epoch that is too long": Damage("epoch_bounded", ENDS, moved("step_idx", TOO_LONG)),
    "a collection that is too long": Damage("epoch_bounded", does("LoadCollected"), moved("step_idx", TOO_LONG)),
    "a transfer in a freeze": Damage("frozen_is_quiet", reads("FREEZE"), with_(is_drained=False)),
    "another map in a freeze": Damage("frozen_is_quiet", reads("FREEZE"), then(action="PostVote", live_digest=-1)),
}
"""By what is wrong."""
