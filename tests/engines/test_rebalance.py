"""The decode loop with a real FSM on real ranks."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from eplb_fsm.engines.reference.launch import launch
from eplb_fsm.engines.reference.requests import Workload
from eplb_fsm.engines.reference.timeline import Timeline, first_difference, logits_sha256, tokens_sha256
from eplb_fsm.placement.placement import Placement
from tests.engines.rebalanced import decode_plain_and_rebalanced
from tests.engines.workers import EXPERTS, LAYERS

PLACEMENT = Placement.initial(LAYERS, EXPERTS, 40, 2)
WORKLOAD = Workload(prompt_tokens=24, generate_tokens=24, change_step=120)
OPTIONS = {"step_interval": 40, "window_size": 40, "idle_round_interval": 4, "lag": 2, "commit_bytes": 500_000}


@cache
def runs() -> dict[str, list[tuple[Timeline, Any, Any]]]:
    """The three runs of both ranks, made once, by mode."""
    arguments = (PLACEMENT, WORKLOAD, 4, 300, OPTIONS)
    results = launch(decode_plain_and_rebalanced, 2, arguments, timeout_s=110)
    return {mode: [rank[i] for rank in results] for i, mode in enumerate(("none", "async", "sync"))}


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_rebalancing_changes_the_placement_and_no_bit_of_the_result(mode: str) -> None:
    """Epochs commit in several chunks while tokens and raw logits stay those of a run without rebalancing."""
    plain = [timeline for timeline, _, _ in runs()["none"]]
    timelines = [timeline for timeline, _, _ in runs()[mode]]
    assert first_difference(plain, timelines) is None
    assert logits_sha256(plain) == logits_sha256(timelines)
    assert tokens_sha256(plain) == tokens_sha256(timelines)
    for _, health, placements in runs()[mode]:
        assert health.num_outcomes.get("COMMITTED", 0) >= 2
        assert placements == runs()[mode][0][2]
        assert placements[0] != PLACEMENT
    assert (timelines[0].rank_rows[-20:] != plain[0].rank_rows[-20:]).any()
