"""The requests of a rank: seeded, continuous, changing their domain at one step."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from eplb_fsm.engines.reference.corpus import BOS_TOKEN, evaluation_text
from eplb_fsm.engines.reference.requests import SlotRequests, Workload
from eplb_fsm.errors import ConfigError

SHORT = Workload(prompt_tokens=6, generate_tokens=4, before=("code",), after=("russian",))


def drive(workload: Workload, steps: int, rank: int = 0, slots: int = 3, answer: int = 65) -> list[tuple]:
    """Inputs of `steps` passes in which the model always says `answer`."""
    requests = SlotRequests(workload, rank, slots)
    taken = []
    for step in range(steps):
        tokens, positions, rows = requests.take(step)
        made = requests.give(np.full(len(tokens), answer))
        taken.append((tokens.tolist(), positions.tolist(), None if rows is None else rows.tolist(), made.tolist()))
    return taken


def test_the_same_seed_gives_the_same_requests() -> None:
    """Two drives are equal; another seed or another rank is not."""
    assert drive(SHORT, 40) == drive(SHORT, 40)
    other = Workload(seed=1, prompt_tokens=6, generate_tokens=4, before=("code",), after=("russian",))
    assert drive(SHORT, 40) != drive(other, 40)
    assert drive(SHORT, 40) != drive(SHORT, 40, rank=1)


def test_a_prompt_is_text_of_its_domain_and_then_the_answers_are_fed() -> None:
    """A sequence starts with the start token, goes on with consecutive text, then with what was generated."""
    steps = drive(SHORT, 40, slots=1)
    first = [tokens[0] for tokens, positions, _, _ in steps[: [s[1][0] for s in steps].index(0, 1)]]
    prompt = [t for t in first if t != 65 or t == BOS_TOKEN]
    assert first[0] == BOS_TOKEN
    assert bytes(prompt[1:4]) in evaluation_text("code")
    assert first[6:] == [65] * len(first[6:])


def test_positions_restart_with_each_request() -> None:
    """Positions count from 0 without a gap and stay below the length of the cache."""
    positions = [p[0] for _, p, _, _ in drive(SHORT, 200, slots=1)]
    assert max(positions) < SHORT.max_length
    assert all(b in (a + 1, 0) for a, b in itertools.pairwise(positions))


def test_all_slots_restart_at_the_change() -> None:
    """At the change step every slot is at position 0 and the texts come from the other domain."""
    workload = Workload(change_step=25, prompt_tokens=6, generate_tokens=4, before=("code",), after=("russian",))
    steps = drive(workload, 40)
    assert steps[25][1] == [0, 0, 0]
    assert any(token >= 0xD0 for tokens, *_ in steps[26:30] for token in tokens)
    assert steps[:25] == drive(SHORT, 25)


def test_generated_tokens_are_told_from_prompt() -> None:
    """While the prompt is fed nothing counts as generated; afterwards every answer does."""
    steps = drive(SHORT, 8, slots=1)
    made = [m[0] for *_, m in steps]
    begin = made.index(65)
    assert 3 <= begin <= 5
    assert made[:begin] == [-1] * begin


def test_tokens_of_prompts_are_told_from_generated_ones() -> None:
    """A request feeds its prompt, at least three quarters of six tokens, and then only what was generated."""
    requests = SlotRequests(SHORT, 0, 3)
    seen = []
    for step in range(7):  # no request is over by then
        requests.take(step)
        seen.append(requests.is_prompt.tolist())
        requests.give(np.full(3, 65))
    for slot in zip(*seen, strict=True):
        num_prompt = sum(slot)
        assert 5 <= num_prompt <= 6
        assert list(slot) == [True] * num_prompt + [False] * (7 - num_prompt)


def test_slots_run_empty() -> None:
    """With a limit each slot ends for itself, the rank has zero live tokens at last and is finished."""
    workload = Workload(requests_per_slot=2, prompt_tokens=6, generate_tokens=4)
    requests = SlotRequests(workload, 0, 3)
    lives = []
    for step in range(40):
        tokens, _, rows = requests.take(step)
        assert rows is None or len(rows) == len(tokens)
        requests.give(np.zeros(len(tokens), dtype=np.int64))
        lives.append(len(tokens))
    assert lives[0] == 3
    assert lives[-1] == 0
    assert requests.finished
    assert requests.live == 0


def test_an_idle_rank_never_has_work() -> None:
    """An idle rank takes nothing, also after the change, and is finished from the start."""
    workload = Workload(idle_ranks=(1,), change_step=5)
    assert all(tokens == [] for tokens, *_ in drive(workload, 10, rank=1))
    assert SlotRequests(workload, 1, 3).finished
    assert not SlotRequests(workload, 0, 3).finished


@pytest.mark.parametrize("options", [{"before": ("klingon",)}, {"after": ()}, {"prompt_tokens": 0}])
def test_what_cannot_work_is_refused(options: dict[str, object]) -> None:
    """Each bad option is one clear error at construction."""
    with pytest.raises(ConfigError):
        Workload(**options)  # type: ignore[arg-type]
