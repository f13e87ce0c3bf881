"""Votes on somebody else's collective: rounds are put together by their number, not by the pass that carried them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eplb_fsm.core.votes import NUM_VOTE_WORDS, Vote, tally_votes
from eplb_fsm.errors import ChannelError
from eplb_fsm.runtime.channel import PiggybackVoteChannel, join_int32, split_int32
from eplb_fsm.runtime.domain import Domain

_INT64 = st.integers(-(2**63), 2**63 - 1)


def _vote(round_idx: int, stop: int = 0) -> Vote:
    words = dict.fromkeys(Vote._fields, 1) | {"round_idx": round_idx, "stop": stop}
    return Vote(**words)


@given(st.lists(st.lists(_INT64, min_size=3, max_size=3), min_size=1, max_size=4))
def test_split_words_come_back_and_survive_a_sum_of_one_hot_columns(rows: list[list[int]]) -> None:
    """Any int64 words are the same after the way through int32, also summed with the zeros of the other ranks."""
    words = torch.tensor(rows, dtype=torch.int64)
    assert split_int32(words).dtype == torch.int32
    assert torch.equal(join_int32(split_int32(words)), words)
    columns = [torch.zeros_like(words) for _ in rows]
    for column, row, word in zip(columns, range(len(rows)), words, strict=True):
        column[row] = word
    summed = torch.stack([split_int32(column) for column in columns]).sum(0)
    assert torch.equal(join_int32(summed), words)


def test_a_vote_of_another_pass_is_kept_for_its_round() -> None:
    """A last STOP vote that came passes before the others' votes of its round is part of their tally."""
    channel = PiggybackVoteChannel(Domain(0, 2))
    silence = [0] * NUM_VOTE_WORDS
    channel.deliver(torch.tensor([silence, list(_vote(5, stop=9))]))
    channel.deliver(torch.tensor([silence, silence]))
    assert channel.poll(5) is None
    channel.post(_vote(5))
    channel.deliver(torch.stack([channel.outgoing(), torch.zeros(NUM_VOTE_WORDS, dtype=torch.int64)]))
    assert channel.poll(5) == tally_votes([_vote(5), _vote(5, stop=9)])
    assert not channel.outgoing().any()
    assert channel._votes == {}


def test_what_was_not_delivered_when_due_is_an_error_and_no_wait() -> None:
    """A round that is waited for gives up at the next poll and says what the engine must do."""
    channel = PiggybackVoteChannel(Domain(0, 2))
    channel.post(_vote(1))
    assert channel.poll(1) is None
    channel.wait(1, 3600.0)
    with pytest.raises(ChannelError, match=r"outgoing\(\) to deliver\(\) in every forward pass"):
        channel.poll(1)


def test_a_collective_that_covers_other_ranks_is_refused() -> None:
    """Words of more or fewer ranks than the domain has are refused, with what to use instead."""
    channel = PiggybackVoteChannel(Domain(0, 2))
    with pytest.raises(ChannelError, match="use the gloo channel where it does not"):
        channel.deliver(torch.zeros(3, NUM_VOTE_WORDS, dtype=torch.int64))


def test_a_last_vote_leaves_after_close() -> None:
    """close() forgets what came in, and the STOP vote still goes out with the next collective."""
    channel = PiggybackVoteChannel(Domain(1, 2))
    channel.post(_vote(4, stop=1))
    channel.close()
    assert tuple(channel.outgoing().tolist()) == _vote(4, stop=1)
