"""This library in the place of vLLM's and SGLang's own rebalance: pauses, time in `step()`, cost of an idle step.

The engines' own EPLB modules run, as their wheels have them, in gloo processes (``make build/engines/.ready``), with
the same experts, the same load and the same forward passes: first vLLM's asynchronous EPLB and SGLang's blocking
rebalance, then this library in the seam of each, in turn, several times: with its own policy, and with DeepSeek's,
which is theirs, so that about as much moves.

    python -m tests.benchmarks.serving --ranks 4 --epochs 5 --pairs 3
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.benchmarks.contenders import CONTENDERS, Contender, Shape
from tests.benchmarks.ranks import report, run_ranks

SHAPE = Shape(num_layers=8, num_logical=64, num_physical=72, expert_shape=(3, 256, 512))
IDLE_CALLS = 20_000
NAMES = (
    "vllm_async",
    "ours_in_vllm",
    "ours_in_vllm:deepseek_global",
    "sglang",
    "ours_in_sglang",
    "ours_in_sglang:deepseek_global",
)
"""With the policy, where it is not the default one."""


@dataclass(slots=True)
class Figures:
    """One contender on one rank."""

    longest_wall_ms: list[float] = field(default_factory=list)
    longest_cpu_ms: list[float] = field(default_factory=list)
    sum_wall_ms: list[float] = field(default_factory=list)
    sum_cpu_ms: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    moved_slots: list[int] = field(default_factory=list)
    idle_us: float = 0.0
    idle_recording_us: float = 0.0


def measure(rank: int, num_ranks: int, store: dist.Store, name: str, num_epochs: int, pass_ms: float) -> dict[str, Any]:
    """Run epochs of one contender, after one that warms up."""
    logging.disable(logging.WARNING)
    kind, _, policy = name.partition(":")
    if policy:
        os.environ["EPLB_FSM_POLICY"] = policy
    contender = CONTENDERS[kind](rank, num_ranks, store, SHAPE)
    figures = Figures()
    contender.start()
    for epoch in range(num_epochs + 1):
        contender.draw_load(epoch)
        _run_epoch(contender, figures, pass_ms)
    for values in (f for f in asdict(figures).values() if isinstance(f, list)):
        assert len(values) == num_epochs + 1
    contender.record(False)
    figures.idle_us = _idle(contender)
    contender.record(True)
    figures.idle_recording_us = _idle(contender)
    assert contender.slots_are_right()
    contender.close()
    return {name: values[1:] if isinstance(values, list) else values for name, values in asdict(figures).items()}


def _run_epoch(contender: Contender, figures: Figures, pass_ms: float) -> None:
    for _ in range(20):  # what a plan is made of
        _forward(contender, pass_ms)
        contender.step()
    before = contender.map_rows()
    contender.trigger()
    wall_ms: list[float] = []
    cpu_ms: list[float] = []
    while True:
        _forward(contender, pass_ms)
        cpu, wall = time.thread_time_ns(), time.perf_counter_ns()
        contender.step()
        wall_ms.append((time.perf_counter_ns() - wall) / 1e6)
        cpu_ms.append((time.thread_time_ns() - cpu) / 1e6)
        if contender.is_over():
            break
    figures.longest_wall_ms.append(max(wall_ms))
    figures.longest_cpu_ms.append(max(cpu_ms))
    figures.sum_wall_ms.append(sum(wall_ms))
    figures.sum_cpu_ms.append(sum(cpu_ms))
    figures.steps.append(len(wall_ms))
    figures.moved_slots.append(int((contender.map_rows() != before).sum()))


def _forward(contender: Contender, pass_ms: float) -> None:
    """Wait for a device and for the other ranks, and count tokens."""
    time.sleep(pass_ms / 1e3)
    dist.all_reduce(torch.zeros(1))
    contender.count_pass()


def _idle(contender: Contender) -> float:
    """Median microseconds of a step in which nothing is due."""
    step: Callable[[], None] = contender.step
    times = []
    for _ in range(IDLE_CALLS):
        start = time.perf_counter_ns()
        step()
        times.append(time.perf_counter_ns() - start)
    return statistics.median(times) / 1e3


def compare(num_ranks: int, num_epochs: int, num_pairs: int, pass_ms: float) -> dict[str, Any]:
    """Run all contenders in turn; return medians over all epochs, and the ratios that matter."""
    runs: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in NAMES}
    for _ in range(num_pairs):
        for name in NAMES:
            runs[name].append(run_ranks(num_ranks, measure, name, num_epochs, pass_ms))
    result: dict[str, Any] = {"ranks": num_ranks, "epochs": num_epochs, "pairs": num_pairs, "pass_ms": pass_ms}
    for name, of_pairs in runs.items():
        result[name] = _medians(of_pairs)
    result["ratios"] = {
        name: _ratios(result["vllm_async" if "vllm" in name else "sglang"], result[name])
        for name in NAMES
        if name.startswith("ours")
    }
    return result


def _ratios(theirs: dict[str, float], ours: dict[str, float]) -> dict[str, float]:
    """How many times longer theirs takes."""
    return {name: theirs[name] / ours[name] for name in theirs if name.endswith(("_ms", "_us"))}


def _medians(of_pairs: list[list[dict[str, Any]]]) -> dict[str, float]:
    """Of each epoch the slowest rank; the median of these over all epochs and pairs."""
    medians = {}
    for name, first in of_pairs[0][0].items():
        if isinstance(first, list):
            epochs = [max(values) for ranks in of_pairs for values in zip(*(rank[name] for rank in ranks), strict=True)]
            medians[name] = statistics.median(epochs)
            if name.startswith("longest"):
                medians[f"worst_{name}"] = max(epochs)
        else:
            medians[name] = statistics.median(max(rank[name] for rank in ranks) for ranks in of_pairs)
    return medians


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--pass-ms", type=float, default=5.0, help="time a forward pass waits for its device")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    report(compare(args.ranks, args.epochs, args.pairs, args.pass_ms), args.json)


if __name__ == "__main__":
    main()
