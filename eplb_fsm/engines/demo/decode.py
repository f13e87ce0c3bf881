"""One run of the reference engine: on processes that are started here, or as a rank that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from eplb_fsm.config import RebalanceConfig
from eplb_fsm.engines.demo.options import WINDOW_STEPS
from eplb_fsm.engines.demo.run import Report, launch_runs
from eplb_fsm.engines.reference.corpus import check_domain
from eplb_fsm.engines.reference.figures import run_figures
from eplb_fsm.engines.reference.machine import describe_machine, describe_versions
from eplb_fsm.engines.reference.model import WEIGHTS
from eplb_fsm.engines.reference.ranks import joined
from eplb_fsm.engines.reference.requests import Workload
from eplb_fsm.engines.reference.run import RankRun, RunSpec, run_rank
from eplb_fsm.engines.reference.shape import read_shape
from eplb_fsm.errors import ConfigError
from eplb_fsm.placement import get_policy


@dataclass(frozen=True, kw_only=True)
class DecodeOptions:
    """The options of a run, validated when they are made.

    Attributes:
        ranks: Processes to start; None: 4, or as many as torchrun started.
        config: Rebalance options; None for no rebalancing.
        num_redundant_experts: Slots beyond one for each expert, also without rebalancing.
        model: Folder of a Qwen3-MoE model; None for the shipped one.

    The others are those of :class:`~eplb_fsm.engines.demo.options.DemoOptions`.

    Raises:
        EplbError: Something cannot work; the message says what to change.
    """

    ranks: int | None = None
    steps: int = 1000
    batch: int = 8
    seed: int = 0
    domains: tuple[str, str] = ("code", "chinese")
    config: RebalanceConfig | None = None
    num_redundant_experts: int = 0
    placement: Path | None = None
    trace: Path | None = None
    model: Path | None = None

    def __post_init__(self) -> None:
        started = os.environ.get("WORLD_SIZE")
        if self.is_under_torchrun and self.ranks is not None and str(self.ranks) != started:
            raise ConfigError(f"--ranks {self.ranks}, but torchrun started {started} ranks: leave --ranks out")
        read_shape(self.model or WEIGHTS).check_ranks(self.world_size)
        for domain in self.domains:
            check_domain(domain)
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}: set it to 0 or more")
        if self.config is not None:
            get_policy(self.config.policy, self.config.target_balancedness)
        self.spec()

    @property
    def is_under_torchrun(self) -> bool:
        """Whether this process is already a rank."""
        return "RANK" in os.environ and "WORLD_SIZE" in os.environ

    @property
    def rank(self) -> int:
        """This rank under torchrun, else 0."""
        return int(os.environ["RANK"]) if self.is_under_torchrun else 0

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return int(os.environ["WORLD_SIZE"]) if self.is_under_torchrun else self.ranks or 4

    @property
    def name(self) -> str:
        """The name of the run, as in the demo: `none`, `sync` or `async`."""
        return "none" if self.config is None else self.config.mode

    def spec(self) -> RunSpec:
        """Return the run."""
        weights = self.model or WEIGHTS
        return RunSpec(
            name=self.name,
            workload=Workload(
                seed=self.seed, before=self.domains[:1], after=self.domains[1:], change_step=self.steps // 2
            ),
            placement=read_shape(weights).first_placement(self.num_redundant_experts, self.world_size, self.placement),
            batch=self.batch,
            steps=self.steps,
            config=self.config,
            weights=weights,
            trace=None if self.trace is None else self.trace / self.name,
            report_every=max(5, self.steps // 40),
        )


def run_decode(options: DecodeOptions, on_message: Callable[[int, Any], None]) -> Report | None:
    """Make the run; blocks until it is done.

    Args:
        options: The run.
        on_message: Called with a rank and its progress; under torchrun only with this rank's own.

    Returns:
        The report, with `runs.<name>` as in the demo; None under torchrun on any rank but the first.

    Raises:
        ConfigError: Something of the options cannot work.
        RankError: A rank was lost or failed.
    """
    spec = options.spec()
    if not options.is_under_torchrun:
        return _report(options, launch_runs([spec], options.world_size, on_message)[0])
    with joined(lambda message: on_message(options.rank, message)) as context:
        mine = run_rank(context, spec)
        runs: list[RankRun | None] | None = [None] * context.world_size if context.rank == 0 else None
        dist.gather_object(mine, runs)
        return None if runs is None else _report(options, [run for run in runs if run is not None])


def _report(options: DecodeOptions, ranks: list[RankRun]) -> Report:
    figures = run_figures(ranks, options.steps // 2, min(WINDOW_STEPS, max(1, options.steps // 4)))
    problems, notes = [], []
    if figures["epochs"]["failed"] or figures["why_stopped"]:
        problems.append(f"BROKEN: rebalancing stopped ({figures['why_stopped']})")
    if options.config is not None and not sum(figures["epochs"].values()):
        interval = options.config.step_interval
        notes.append(
            f"No epoch ended: one starts every {interval} steps and the run had {options.steps}; "
            "lower --eplb-rebalance-num-iterations or raise --steps."
        )
    return {
        "ranks": options.world_size,
        "steps": options.steps,
        "batch": options.batch,
        "seed": options.seed,
        "domains": list(options.domains),
        "runs": {options.name: figures},
        "problems": problems,
        "notes": notes,
        "config": None if options.config is None else asdict(options.config),
        "machine": describe_machine(),
        "versions": describe_versions(),
    }
