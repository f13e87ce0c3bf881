"""Whatever happens next, and to whichever rank: the invariants hold after every single thing that happens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from machine import RARE, ProtocolMachine

from eplb_fsm.core import rank as core_rank
from eplb_fsm.simulate.explore import quiet_log

WITHOUT_TARGET = [phase for phase in Phase if phase not in (Phase.target, Phase.explain)]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet_log():
        yield


def run_machine(how: settings) -> dict[str, int]:
    """Run examples; return how many have shown each of what is rare."""
    seen: dict[str, int] = {}
    run_state_machine_as_test(type("Machine", (ProtocolMachine,), {"seen": seen}), settings=how)
    return seen


@pytest.mark.slow
@pytest.mark.timeout(3600)  # the nightly profile
def test_any_order_of_anything() -> None:
    """No order of steps, rounds, work, failures, wishes and time breaks an invariant, and the rare ones are met."""
    seen = run_machine(settings(phases=WITHOUT_TARGET))
    assert set(seen) == set(RARE)
    if settings().derandomize:  # else chance may miss what seldom happens
        assert all(seen.values()), seen


@pytest.mark.timeout(3600)
def test_more_of_what_is_rare() -> None:
    """The same where Hypothesis changes examples to get more of what is rare in them; a few, as they are alike."""
    run_machine(settings(max_examples=max(settings().max_examples // 10, 5)))


def test_a_broken_protocol_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine fails where a core aborts an epoch without a word."""
    end_epoch = core_rank.RankCore._end_epoch

    def forget(self: core_rank.RankCore, *words: Any) -> None:
        before = self.last_outcome
        end_epoch(self, *words)
        self.last_outcome = before

    monkeypatch.setattr(core_rank.RankCore, "_end_epoch", forget)
    with pytest.raises(AssertionError):  # Hypothesis puts its own account in the place of the message
        run_machine(settings(phases=[Phase.generate], derandomize=True, max_examples=50, database=None))
