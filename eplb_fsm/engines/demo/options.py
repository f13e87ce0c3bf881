"""What a demo is made of: its options, its defaults, and the three runs that follow from them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from eplb_fsm.config import RebalanceConfig
from eplb_fsm.engines.reference.corpus import check_domain
from eplb_fsm.engines.reference.model import WEIGHTS
from eplb_fsm.engines.reference.requests import Workload
from eplb_fsm.engines.reference.run import RunSpec
from eplb_fsm.engines.reference.shape import read_shape
from eplb_fsm.errors import ConfigError
from eplb_fsm.placement import get_policy

RUNS = ("none", "sync", "async")
WINDOW_STEPS = 200
"""Steps over which balancedness before and after the change is taken."""
FEWEST_STEPS = 40


def demo_defaults(steps: int, ranks: int) -> dict[str, Any]:
    """Return the rebalance options of a demo of so many steps, where nobody sets them.

    The library's defaults are for servers: an epoch each 3000 steps. Here several epochs have to end in each half,
    and the experts are small, so the commit budget is too: five experts. Ranks that share cores feel the background
    at work, so it is paced: fewer bytes a second, and rounds further apart.
    """
    interval = max(20, min(80, steps // 10))
    return {
        "step_interval": interval,
        "window_size": interval,
        "idle_round_interval": min(10, interval // 4),
        "commit_bytes": 500_000,
        "max_transfer_mb_s": 4.0,
        "lag": 4,
        "num_redundant_experts": read_shape(WEIGHTS).fitting_redundancy(8, max(1, ranks)),
    }


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """The options of a demo, validated when they are made.

    Attributes:
        ranks: Processes.
        steps: Forward passes of each run; the domain changes half-way.
        batch: Sequences that each rank decodes at the same time.
        seed: Of the requests.
        domains: Domain of the text before and after the change.
        config: Rebalance options; its mode is set by the run.
        placement: File with the placement at start; None for the one of an engine that has not rebalanced.
        trace: Folder for the traces, with a folder for each run.

    Raises:
        EplbError: Something cannot work; the message says what to change.
    """

    ranks: int = 4
    steps: int = 1000
    batch: int = 8
    seed: int = 0
    domains: tuple[str, str] = ("code", "chinese")
    config: RebalanceConfig
    placement: Path | None = None
    trace: Path | None = None

    def __post_init__(self) -> None:
        read_shape(WEIGHTS).check_ranks(self.ranks)
        for name, least in (("ranks", 2), ("steps", FEWEST_STEPS), ("batch", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}: set it to {least} or more")
        for domain in self.domains:
            check_domain(domain)
        get_policy(self.config.policy, self.config.target_balancedness)
        self.specs()

    @property
    def change_step(self) -> int:
        """The step at which the domain of the text changes."""
        return self.steps // 2

    @property
    def window(self) -> int:
        """Steps over which balancedness is taken; fewer than usual only in a short demo."""
        return min(WINDOW_STEPS, self.steps // 4)

    def specs(self) -> list[RunSpec]:
        """Return the three runs: equal but for the rebalancer."""
        redundant = self.config.num_redundant_experts
        plain = RunSpec(
            name="none",
            workload=Workload(
                seed=self.seed, before=self.domains[:1], after=self.domains[1:], change_step=self.change_step
            ),
            placement=read_shape(WEIGHTS).first_placement(redundant, self.ranks, self.placement),
            batch=self.batch,
            steps=self.steps,
            report_every=max(5, self.steps // 40),
        )
        modes: tuple[Literal["sync", "async"], ...] = ("sync", "async")
        return [plain] + [
            replace(
                plain,
                name=mode,
                config=replace(self.config, mode=mode),
                trace=None if self.trace is None else self.trace / mode,
            )
            for mode in modes
        ]
