"""The expert-parallel model on real ranks: equal to the plain model, and placement does not change a bit."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from eplb_fsm.engines.reference.launch import launch
from eplb_fsm.engines.reference.model import load_model
from eplb_fsm.engines.reference.requests import Workload
from eplb_fsm.engines.reference.routing import evaluation_batch
from eplb_fsm.engines.reference.timeline import Timeline, first_difference, logits_sha256, tokens_sha256
from eplb_fsm.placement.placement import Placement
from tests.engines.workers import EXPERTS, LAYERS, decode_cases, random_placement

WORKLOAD = Workload(prompt_tokens=12, generate_tokens=18, before=("code", "russian"), change_step=20)
LONG = Workload(prompt_tokens=12, generate_tokens=48)
ENDLESS = Workload(prompt_tokens=6, generate_tokens=12, before=("code",))
ONCE = Workload(prompt_tokens=6, generate_tokens=12, before=("code",), requests_per_slot=1)
IDLE = Workload(prompt_tokens=6, generate_tokens=6, idle_ranks=(1,), requests_per_slot=1)


@cache
def given_tokens() -> torch.Tensor:
    """Eight sequences of text from four domains, int64 (8, 40)."""
    return torch.cat([evaluation_batch(domain, 2, 40) for domain in ("code", "english", "russian", "logs")])


@cache
def on_two_ranks() -> dict[str, list[Any]]:
    """All that the tests run on two ranks, in one launch: results of both ranks by case."""
    initial, drawn = Placement.initial(LAYERS, EXPERTS, 40, 2), random_placement(1, 2, 40)
    cases: dict[str, tuple[str, tuple[Any, ...]]] = {
        "initial": ("decode", (initial, WORKLOAD, 4, 30)),
        "drawn": ("decode", (drawn, WORKLOAD, 4, 30, ("none", 0))),
        "drawn again": ("decode", (random_placement(2, 2, 40), WORKLOAD, 4, 30)),
        "given": ("decode_given_tokens", (drawn, given_tokens())),
        "endless": ("decode", (initial, ENDLESS, 4, 30)),
        "once": ("decode", (initial, ONCE, 4, 30)),
        "right": ("decode", (initial, LONG, 4, 61, ("none", 10))),
        "map": ("decode", (initial, LONG, 4, 61, ("map", 10))),
        "row": ("decode", (initial, LONG, 4, 61, ("row", 10))),
        "words": ("decode_with_words", (initial, WORKLOAD, 5)),
    }
    results = launch(decode_cases, 2, (list(cases.values()),), timeout_s=110)
    return {name: [rank[i] for rank in results] for i, name in enumerate(cases)}


@cache
def on_four_ranks() -> dict[str, list[Any]]:
    """All that the tests run on four ranks."""
    placements = [Placement.initial(LAYERS, EXPERTS, 48, 4), *(random_placement(seed, 4, 48) for seed in (1, 2))]
    names = ("initial", "drawn", "drawn again", "idle")
    cases = [("decode", (placement, WORKLOAD, 4, 30)) for placement in placements]
    cases.append(("decode", (placements[0], IDLE, 4, 30)))
    results = launch(decode_cases, 4, (cases,), timeout_s=110)
    return {name: [rank[i] for rank in results] for i, name in enumerate(names)}


def timelines(results: list[Any]) -> list[Timeline]:
    """The timelines of a case's ranks."""
    return [timeline for timeline, _ in results]


@pytest.mark.parametrize("launched", [on_two_ranks, on_four_ranks])
def test_logits_do_not_depend_on_the_placement(launched: Any) -> None:
    """With other replicas in other slots on other ranks, every bit of 30 steps' logits is the same."""
    runs = [timelines(launched()[name]) for name in ("initial", "drawn", "drawn again")]
    assert len({logits_sha256(run) for run in runs}) == 1
    assert len({tokens_sha256(run) for run in runs}) == 1
    rows = [run[0].rank_rows.sum(axis=(0, 1)).tolist() for run in runs]
    assert rows[0] != rows[1] != rows[2]


def test_logits_are_those_of_the_plain_model() -> None:
    """The same sequences through transformers alone give the same choice everywhere and close logits."""
    parallel = torch.cat(on_two_ranks()["given"])
    with torch.inference_mode():
        expected = load_model()(input_ids=given_tokens()).logits
    torch.testing.assert_close(parallel, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(parallel.argmax(-1), expected.argmax(-1))


def test_rank_loads_add_up() -> None:
    """In every layer of every step the ranks together compute tokens times top-k rows, and agree on them."""
    run = timelines(on_two_ranks()["initial"])
    rows = run[0].rank_rows
    assert (rows == run[1].rank_rows).all()
    live = sum(timeline.live_tokens for timeline in run)
    assert (rows.sum(2) == live[:, None] * 4).all()


def test_an_idle_rank_makes_dummy_passes() -> None:
    """A rank without a sequence, and ranks that run out of work, keep step with the others to the common end."""
    run = timelines(on_four_ranks()["idle"])
    assert {timeline.steps for timeline in run} == {run[0].steps}
    assert run[0].steps < 30
    assert run[1].live_tokens.sum() == 0
    assert run[1].rank_rows[:, :, 1].sum() > 0
    assert (run[1].tokens == -1).all()
    live = sum(timeline.live_tokens for timeline in run)[: run[0].steps]
    assert live.min() > 0
    assert len(set(live.tolist())) > 1


def test_an_empty_slot_does_not_change_its_neighbours() -> None:
    """The tokens of a request are the same whether the other slots of the rank are still live or not."""
    pairs = zip(timelines(on_two_ranks()["endless"]), timelines(on_two_ranks()["once"]), strict=True)
    for endless, once in pairs:
        made = once.tokens[: once.steps]
        assert (made >= 0).any()
        assert (made[made >= 0] == endless.tokens[: once.steps][made >= 0]).all()


@pytest.mark.parametrize("kind", ["map", "row"])
def test_one_mistake_changes_the_logits(kind: str) -> None:
    """Negative control: one wrong map entry, or one swapped weight row, is seen in the logits within 50 steps."""
    different = first_difference(timelines(on_two_ranks()["right"]), timelines(on_two_ranks()[kind]))
    assert different is not None
    assert 10 < different <= 60


def test_the_load_that_is_recorded_adds_up() -> None:
    """A rebalancer is told every token's choice once per layer: tokens times top-k, no padding."""
    for timeline, recorded in on_two_ranks()["drawn"]:
        assert recorded.sum(1).tolist() == [int(timeline.live_tokens.sum()) * 4] * LAYERS


def test_words_ride_on_the_collective_of_each_step() -> None:
    """Every rank's words reach every rank once per pass, in order, and not at the agreed end."""
    for arrived, steps in on_two_ranks()["words"]:
        assert steps == 5
        assert len(arrived) == 5
        for step, words in enumerate(arrived):
            assert [word[0] for word in words] == [0, 1]
            assert len({word[1] for word in words}) == 1
            assert words[0][1] == step + arrived[0][0][1]
