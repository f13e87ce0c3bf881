"""Resolving a lost decision: what a rank inside the uncertainty window may conclude from the others.

A rank that voted "staged" and does not get the decision cannot know alone which chunks were committed. Each
rank publishes what it knows of the rounds; the conclusion is a pure function of that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from eplb_fsm.core.rank import NEVER


class Journal(NamedTuple):
    """What one rank tells the others about its rounds."""

    posted_round: int = 0
    """Last round this rank posted a vote in."""
    posted_staged: bool = False
    """Whether that vote was a promise to commit."""
    read_round: int = 0
    """Last round whose decision this rank read."""
    read_commits: int = 0
    """How many chunks that decision committed, 0 if it was not COMMIT."""
    gave_up_round: int = 0
    """Round whose decision this rank gave up reading. Binding: it will never read it."""
    stopped_from_round: int = NEVER
    """From this round on this rank votes nothing but STOP."""


def resolve(journals: Sequence[Journal | None], round_idx: int) -> int | None:
    """Return how many chunks the round committed, 0 for ABORT, None while it is open.

    A decision that some rank read is adopted. A rank that did not vote staged shows that COMMIT is impossible,
    and so do all ranks giving up: then nobody will ever read it. Only a rank that says nothing keeps it open.
    No rank can be past ``round_idx``: a later round needs the vote of the rank that asks.

    Args:
        journals: What each rank published last, None for one that never did.
        round_idx: The round whose decision is missing.
    """
    known = [journal for journal in journals if journal is not None]
    if any(journal.read_round == round_idx for journal in known):
        return max(journal.read_commits for journal in known if journal.read_round == round_idx)
    if any(_did_not_vote_staged(journal, round_idx) for journal in known):
        return 0
    if len(known) == len(journals) and all(journal.gave_up_round == round_idx for journal in known):
        return 0
    return None


def _did_not_vote_staged(journal: Journal, round_idx: int) -> bool:
    if journal.stopped_from_round <= round_idx:
        return True
    return journal.posted_round == round_idx and not journal.posted_staged
