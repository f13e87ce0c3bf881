"""What of the code the spec speaks of: a core, a vote and a decision as the records of `spec/Core.tla`."""

from __future__ import annotations

from eplb_fsm.core.rank import NEVER, Outcome, RankCore
from eplb_fsm.core.reasons import decode_reason
from eplb_fsm.core.votes import Decision, Vote
from eplb_fsm.modelcheck.values import Record

VOTE_WORDS = {
    "generation": "generation",
    "round": "round_idx",
    "step": "step_idx",
    "pass": "pass_id",
    "epoch": "epoch",
    "live": "live_digest",
    "progress": "progress",
    "chunk": "chunk_idx",
    "staged": "num_staged",
    "num_chunks": "num_chunks",
    "plan": "plan_digest",
    "abort": "abort",
    "stop": "stop",
    "request": "request",
    "drained": "drained",
    "freeze": "freeze",
    "earliest": "earliest_next_step",
}
"""The fields of the spec's vote, and the words of the code's that they stand for."""

SPEC_NEVER = 1_000_000
NO_VOTE = Record(round=0)
PLAN_DIGESTS = {"none": 0, "a": 1, "b": 2, "skip": 3}
"""The spec's plans, and the digests of the plans that stand for them in the code."""
_PLAN_NAMES = {digest: name for name, digest in PLAN_DIGESTS.items()}


def project_core(core: RankCore) -> Record:
    """Return the record that the spec keeps of a core."""
    return Record(
        state=core.state.value,
        step=core.step_idx,
        epoch=core.epoch,
        round=core.round_idx,
        posted=project_vote(core.posted),
        read_due=SPEC_NEVER if core.posted is None else core.read_due,
        post_due=SPEC_NEVER if core.post_due == NEVER else core.post_due,
        lag=core.lag,
        plan=_PLAN_NAMES[core.plan.digest if core.plan else 0],
        chunk=core.chunk_idx,
        staged=core.num_staged,
        decided=core.num_decided,
        commit_due=core.commit_due if core.num_decided else SPEC_NEVER,
        leaving=core.is_leaving,
        abort=decode_reason(core._abort_word)[0],
        stop=decode_reason(core._stop_word)[0],
        request=core._wants_rebalance,
        freeze=core._wants_freeze,
        frozen=core.is_frozen,
        drained=core.drained,
        earliest=core.earliest_next_step,
        entered=core.state_entered_step,
        epoch_start=core.epoch_start_step,
        progressed=core.progressed_step,
        live=core.live_digest,
        outcome=_project_outcome(core.last_outcome),
    )


def project_vote(vote: Vote | None) -> Record:
    """Return the record that the spec keeps of a vote."""
    if vote is None:
        return NO_VOTE
    record = Record({field: getattr(vote, word) for field, word in VOTE_WORDS.items()})
    record["plan"] = _PLAN_NAMES[vote.plan_digest]
    record["abort"], _ = decode_reason(vote.abort)
    record["stop"], _ = decode_reason(vote.stop)
    for field in ("request", "drained", "freeze"):
        record[field] = record[field] == 1
    return record


def _project_outcome(outcome: Outcome | None) -> Record:
    if outcome is None:
        return Record(epoch=0, kind="none", reason="none", commits=0)
    reason = outcome.reason.name if outcome.reason else "none"
    return Record(epoch=outcome.epoch, kind=outcome.kind.name, reason=reason, commits=outcome.num_commits)


def project_decision(decision: Decision) -> Record:
    """Return the record that the spec keeps of a decision."""
    reason = decision.reason.name if decision.reason else "none"
    return Record(kind=decision.kind.value, reason=reason, chunks=decision.num_chunks)
