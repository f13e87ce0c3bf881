"""What the tests of both engines share: driving passes until epochs have ended, and reading how they ended."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch

OPTIONS = {
    "PLANNER": "thread",
    "IDLE_ROUND_INTERVAL": "4",
    "MIN_GAIN": "0",
    "HORIZON_STEPS": "0",
    "TARGET_BALANCEDNESS": "1",
    "COMMIT_BYTES": "4096",
    "MAX_SLOWDOWN": "0",
    "VOTE_TIMEOUT_S": "20",
    "START_TIMEOUT_S": "90",
    "BACKOFF_STEPS": "1",
}
"""An epoch of several chunks as often as the load changes, and nothing that gives up on a slow machine."""

BACKGROUND = {
    "ENABLE_EPLB_REBALANCE_ASYNC": "1",
    "EPLB_FSM_IDLE_ROUND_INTERVAL": "2",
    "EPLB_FSM_MIN_GAIN": "0",
    "EPLB_FSM_HORIZON_STEPS": "0",
    "EPLB_FSM_TARGET_BALANCEDNESS": "1",
    "EPLB_FSM_MAX_SLOWDOWN": "0",
}
"""The same for a whole engine, as variables; how much a commit may write depends on its model."""

ON_ACCELERATOR = pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")

_MAX_PASSES = 4000


class Driven:
    """A rank that makes passes, each with skewed routing.

    Attributes:
        hot: The first of two experts that most tokens go to.
        num_passes: Passes made.
    """

    hot = 0
    num_passes = 0
    num_experts: int
    fsm: Any

    def forward(self) -> None:
        """Make a pass, and its step."""
        raise NotImplementedError

    def run_passes(self, count: int) -> None:
        """Make that many passes."""
        for _ in range(count):
            self.forward()

    def run_until(self, holds: Callable[[], bool]) -> None:
        """Make passes until something holds; with an agreed condition, equally many on all ranks."""
        for _ in range(_MAX_PASSES):
            if holds():
                return
            self.forward()
        raise AssertionError(self.fsm.health())

    def run_epochs(self, count: int) -> None:
        """Make passes until that many more epochs have ended, each with another domain of the text."""
        for _ in range(count):
            ended = len(self.fsm.outcomes)
            self.hot = (self.hot + 5) % (self.num_experts - 1)
            self.run_until(lambda ended=ended: len(self.fsm.outcomes) > ended)  # type: ignore[misc]


def accelerator() -> str:
    """What this torch calls its accelerator."""
    device = torch.accelerator.current_accelerator()
    assert device is not None
    return device.type


def outcome_names(outcomes: Iterable[Any]) -> list[str]:
    """``COMMITTED``, or ``ABORTED(REASON)``, of every epoch."""
    return [f"{o.kind.name}{f'({o.reason.name})' if o.reason else ''}" for o in outcomes]


def epochs(log: str, kind: str = "COMMITTED") -> Sequence[str]:
    """The lines of an engine's log that say how epochs ended."""
    return re.findall(rf"epoch \d+: {kind}.*", log)
