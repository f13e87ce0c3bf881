"""Which tokens are counted where prompts and decoding are told apart."""

from __future__ import annotations

import pytest
import torch
from clusters import Recorded, config

IDS = torch.tensor([[0], [1], [2], [3]])
IS_PROMPT = torch.tensor([True, False, True, False])
VALID = torch.tensor([True, True, False, False])


@pytest.mark.parametrize(
    ("phases", "of_mixed", "of_padded", "of_prompts", "of_decoding"),
    [
        ("together", [1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]),
        ("decode", [0, 1, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]),
        ("prefill", [1, 0, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]),
    ],
)
def test_tokens_of_one_phase_are_counted(
    phases: str, of_mixed: list[int], of_padded: list[int], of_prompts: list[int], of_decoding: list[int]
) -> None:
    """Token by token or for a whole pass; padding counts in none. Where nothing is said, tokens are of decoding."""
    fsm = Recorded(3, options=config(load_phases=phases)).ranks[0].fsm
    source = fsm._parts.load_source

    def counts() -> list[int]:
        source.snapshot()
        return source.snapshots[0][1, :4].tolist()

    counts()
    fsm.record(1, IDS, prefill=IS_PROMPT)
    assert counts() == of_mixed
    fsm.record(1, IDS, VALID, prefill=IS_PROMPT)
    assert counts() == of_padded
    fsm.record(1, IDS, prefill=True)
    assert counts() == of_prompts
    fsm.record(1, IDS)
    assert counts() == of_decoding
