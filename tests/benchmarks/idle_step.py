"""What a ``step()`` costs while nothing is due, beside an empty method call and a bare ``next()`` on a generator.

With idle rounds, beside steps of which every so many post a bare all-reduce of as many words as a vote has.

python -m tests.benchmarks.idle_step
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
import tracemalloc
from collections.abc import Callable, Generator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from eplb_fsm import Placement, RebalanceConfig, RebalanceFSM
from eplb_fsm.core.votes import NUM_VOTE_WORDS
from eplb_fsm.runtime.failstop import raise_error
from tests.benchmarks.ranks import expert_bank, report, run_ranks

_PASS_S = 0.001
"""A forward pass: matrix products for this long, which leave the caches as cold for a step as a pass does."""

_NUM_IDLE_ROUNDS = 100
_LAG = 4


class _Empty:
    def step(self) -> None:
        """Do nothing."""


class _BareRounds:
    """An all-reduce of a vote's words every so many steps, and nothing else: what gloo takes of an idle round."""

    def __init__(self, store: dist.Store, rank: int, num_ranks: int, interval: int) -> None:
        self._group = dist.ProcessGroupGloo(dist.PrefixStore("bare", store), rank, num_ranks, timedelta(seconds=30))
        self._words = torch.zeros(2 * NUM_VOTE_WORDS, dtype=torch.int64)
        self._interval = interval
        self._step_idx = 0

    def step(self) -> None:
        """Post it where it is due, and wait for it a few steps later."""
        self._step_idx += 1
        if self._step_idx % self._interval == 0:
            self._work = self._group.allreduce([self._words])
        elif self._step_idx % self._interval == _LAG and self._step_idx > _LAG:
            self._work.wait()


def _bare() -> Generator[None, None, None]:
    while True:
        yield


def measure(rank: int, num_ranks: int, store: dist.Store, rounds: int) -> dict[str, Any]:
    """Return nanoseconds for one call of each kind, measured in turn."""
    placement = Placement.initial(4, 16, 24, num_ranks)
    bank = expert_bank(4, 16, 24, num_ranks, 12_000)
    idle = RebalanceConfig(num_redundant_experts=8, step_interval=0)
    with RebalanceFSM.connect(store, rank, num_ranks, [bank], [placement], idle, fail_stop=raise_error) as fsm:
        fsm.arm()
        generator, empty = _bare(), _Empty()
        kinds: dict[str, Callable[[], Any]] = {
            "idle_step_ns": fsm.step,
            "empty_method_ns": empty.step,
            "generator_next_ns": generator.__next__,
        }
        seen: dict[str, list[float]] = {name: [] for name in kinds}
        for _ in range(rounds):
            # Between two idle rounds: the steps up to the next multiple of the interval do nothing.
            _align(fsm, idle.idle_round_interval)
            for name, call in kinds.items():
                seen[name].append(_time(call, idle.idle_round_interval - 8))
        gc.collect()
        gc.freeze()  # as engines do after warm-up: one full collection costs as much as a thousand idle steps
        num_steps = _NUM_IDLE_ROUNDS * idle.idle_round_interval
        steps = _time_steps(fsm.step, num_steps)
        # Reading the clocks, with caches as cold as they are after a pass, is not the step's.
        clocks = _time_steps(empty.step, num_steps)
        bare = _time_steps(_BareRounds(store, rank, num_ranks, idle.idle_round_interval).step, num_steps)
        grown = _grown_bytes(fsm)
    result: dict[str, Any] = {name: statistics.median(values) for name, values in seen.items()}
    result["with_idle_rounds_wall_ns"] = steps[0] - clocks[0]
    result["with_idle_rounds_cpu_ns"] = steps[1] - clocks[1]
    result["bare_all_reduces_cpu_ns"] = bare[1] - clocks[1]
    result["grown_bytes_in_100000_steps"] = grown
    return result


def _align(fsm: RebalanceFSM, interval: int) -> None:
    """Step to just behind the reading of an idle round."""
    while fsm.step_idx % interval != 4:
        fsm.step()


def _time(call: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter_ns()
    for _ in range(calls):
        call()
    return (time.perf_counter_ns() - start) / calls


def _time_steps(call: Callable[[], Any], num_steps: int) -> tuple[float, float]:
    """Return mean wall and host CPU nanoseconds of a call that follows a forward pass."""
    wall = cpu = 0
    weights = torch.randn(1024, 1024)
    for _ in range(num_steps):
        end = time.perf_counter() + _PASS_S
        while time.perf_counter() < end:
            weights[:8] @ weights
        wall_start, cpu_start = time.perf_counter_ns(), time.thread_time_ns()
        call()
        cpu += time.thread_time_ns() - cpu_start
        wall += time.perf_counter_ns() - wall_start
    return wall / num_steps, cpu / num_steps


def _grown_bytes(fsm: RebalanceFSM) -> int:
    for _ in range(10_000):
        fsm.step()
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(100_000):
        fsm.step()
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    return grown


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=301)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    result = run_ranks(args.ranks, measure, args.rounds)[0]
    result["ranks"] = args.ranks
    report(result, args.json)


if __name__ == "__main__":
    main()
