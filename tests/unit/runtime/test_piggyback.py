"""Votes on somebody else's collective: rounds are put together by their number, not by the pass that carried them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eplb_fsm.config import RebalanceConfig
from eplb_fsm.core.rank import PlanTerms, RankCore
from eplb_fsm.core.reasons import StopReason
from eplb_fsm.core.votes import NUM_VOTE_WORDS, DecisionKind, Vote, tally_votes
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
    with pytest.raises(ChannelError, match="use the mesh or gloo channel where it does not"):
        channel.deliver(torch.zeros(3, NUM_VOTE_WORDS, dtype=torch.int64))


def test_a_last_vote_leaves_after_close() -> None:
    """close() forgets what came in, and the STOP vote still goes out with the next collective."""
    channel = PiggybackVoteChannel(Domain(1, 2))
    channel.post(_vote(4, stop=1))
    channel.close()
    assert tuple(channel.outgoing().tolist()) == _vote(4, stop=1)


@pytest.mark.parametrize("num_chunks", range(1, 5))
@pytest.mark.parametrize("lag", [1, 2, 3])
def test_the_last_vote_of_a_rank_that_resolved_a_round_is_there_when_the_others_read(lag: int, num_chunks: int) -> None:
    """However many chunks it still makes live, the others read its STOP in the next round, which no pass waits for."""
    config = RebalanceConfig(step_interval=0, idle_round_interval=1, staging_buffers=4)
    cores = [RankCore(rank, config, 0, lag=lag) for rank in range(2)]
    channels = [PiggybackVoteChannel(Domain(rank, 2)) for rank in range(2)]
    cores[0].request_rebalance()
    ended = False
    while not ended:
        gathered = torch.stack([channel.outgoing() for channel in channels])  # the forward pass
        for core, channel in zip(cores, channels, strict=True):
            channel.deliver(gathered)
            core.step_idx += 1
            if core.is_commit_due:
                core.commit_chunk(core.live_digest + 1)
            if core.posted is not None and core.step_idx >= core.read_due:
                tally = channel.poll(core.round_idx)
                assert tally is not None
                if core.rank == 1 and core.in_window:  # it loses what the other one reads
                    _, last_vote = core.resolve_round(num_chunks, StopReason.TIMEOUT)
                    channel.post(last_vote)
                    continue
                ended = core.read_round(tally).kind is DecisionKind.STOP
            if core.load_collected(core.epoch):
                core.plan_ready(core.epoch, PlanTerms(digest=1, num_chunks=9, deadline_steps=50))
            core.chunk_staged(core.epoch, num_chunks - 1)
            if core.posted is None and core.step_idx >= core.post_due:
                channel.post(core.post_vote(0))
            if ended:
                break
    assert cores[0].stop_reason is StopReason.TIMEOUT
    assert cores[0].live_digest == num_chunks
    assert cores[0].last_outcome is not None
    assert cores[0].last_outcome.num_commits == num_chunks
