"""How long one ``step()`` stops the decode loop: async, sync, and a floor of bare copies and loopback.

All modes move the same bytes through the same sequence of placements. The pause of a step is the CPU time of the
host thread in it; the wall time stands beside it, and beside that the wall time of an empty step() under the same
load, since with more ranks than cores any step can be descheduled.

    python -m tests.benchmarks.pause --ranks 4 --epochs 20
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from eplb_fsm import Placement, RebalanceConfig, RebalanceFSM
from eplb_fsm.runtime.domain import Domain
from eplb_fsm.runtime.failstop import raise_error
from eplb_fsm.runtime.transport import GlooTransport
from tests.benchmarks.ranks import expert_bank, report, run_ranks

SYNC_OPTIONS = {"commit_bytes": 256 << 20, "staging_buffers": 1}
"""One chunk: what blocks the loop has no reason to cut it small, and sync shall be as fast as it can be."""
ASYNC_OPTIONS = {"max_slowdown": 0.0}
"""The library's defaults, but never giving way to the loop: on a noisy machine that would measure the noise."""
LAYERS, LOGICAL, PHYSICAL, EXPERT_BYTES = 8, 64, 72, 3 * 256 * 512 * 4


@dataclass(slots=True)
class EpochFigures:
    """One epoch on one rank; milliseconds and bytes."""

    longest_cpu_ms: float = 0.0
    longest_wall_ms: float = 0.0
    idle_wall_ms: float = 0.0
    total_cpu_ms: float = 0.0
    epoch_wall_ms: float = 0.0
    steps: int = 0
    moved_bytes: int = 0
    peer_bytes: int = 0


def measure_mode(
    rank: int,
    num_ranks: int,
    store: dist.Store,
    mode: str,
    num_epochs: int,
    pass_ms: float,
    device: str,
    options: dict[str, Any],
) -> tuple[list[EpochFigures], list[float], int]:
    """Run the epochs of one mode; return figures of each, the floors of the same bytes, and late rounds."""
    placement = Placement.initial(LAYERS, LOGICAL, PHYSICAL, num_ranks)
    bank = expert_bank(LAYERS, LOGICAL, PHYSICAL, num_ranks, EXPERT_BYTES, device)
    config = RebalanceConfig(
        mode=mode,  # type: ignore[arg-type]
        policy="tests.benchmarks.ranks:ShuffledLoad",
        num_redundant_experts=PHYSICAL - LOGICAL,
        step_interval=0,
        idle_round_interval=8,
        min_gain=0.0,
        horizon_steps=0,
        **options,
    )
    figures: list[EpochFigures] = []
    floors: list[float] = []
    domain = Domain(rank, num_ranks, name=f"engine-{mode}")
    engine = GlooTransport(domain, store, 60)
    floor = Floor(domain, engine)
    with RebalanceFSM.connect(
        store, rank, num_ranks, [bank], [placement], config, name=mode, fail_stop=raise_error
    ) as fsm:
        fsm.arm()
        for _ in range(num_epochs):
            figures.append(_run_epoch(fsm, engine, pass_ms))
            floors.append(floor.measure(figures[-1].peer_bytes))
        late = fsm.late_rounds
    return figures, floors, late


def _run_epoch(fsm: RebalanceFSM, engine: GlooTransport, pass_ms: float) -> EpochFigures:
    """Decode until one more epoch has ended."""
    figures = EpochFigures()
    before, bytes_before = len_outcomes(fsm), (fsm.moved_bytes, fsm.health().peer_bytes)
    fsm.request_rebalance()
    start = 0.0
    idle: list[float] = []
    while len_outcomes(fsm) == before:
        _forward_pass(engine, pass_ms)
        was_idle = fsm.state.value == "IDLE"
        cpu, wall = time.thread_time_ns(), time.perf_counter_ns()
        fsm.step()
        wall_ms, cpu_ms = (time.perf_counter_ns() - wall) / 1e6, (time.thread_time_ns() - cpu) / 1e6
        is_over = len_outcomes(fsm) > before
        if was_idle and fsm.state.value == "IDLE" and not is_over:
            continue
        start = start or wall / 1e6
        figures.steps += 1
        figures.longest_cpu_ms = max(figures.longest_cpu_ms, cpu_ms)
        figures.longest_wall_ms = max(figures.longest_wall_ms, wall_ms)
        figures.total_cpu_ms += cpu_ms
        idle.append(_empty_step_ms())
    figures.idle_wall_ms = max(idle)
    figures.epoch_wall_ms = time.perf_counter_ns() / 1e6 - start
    figures.moved_bytes = fsm.moved_bytes - bytes_before[0]
    figures.peer_bytes = fsm.health().peer_bytes - bytes_before[1]
    return figures


def _forward_pass(engine: GlooTransport, pass_ms: float) -> None:
    """Wait for a device, and for the other ranks, as every expert-parallel forward pass does."""
    time.sleep(pass_ms / 1e3)
    engine.all_reduce_sum(torch.zeros(1, dtype=torch.int64)).wait(60)


def len_outcomes(fsm: RebalanceFSM) -> int:
    """Epochs that have ended."""
    return sum(fsm.health().num_outcomes.values())


class _Empty:
    def step(self) -> None:
        pass


_EMPTY = _Empty()


def _empty_step_ms() -> float:
    wall = time.perf_counter_ns()
    _EMPTY.step()
    return (time.perf_counter_ns() - wall) / 1e6


class Floor:
    """The bare cost of an epoch's bytes: gather them, send them over loopback, copy them into place."""

    def __init__(self, domain: Domain, transport: GlooTransport) -> None:
        self._transport = transport
        self._peers = [peer for peer in range(domain.world_size) if peer != domain.rank]
        self._live, self._staged, self._received = (torch.zeros(0, dtype=torch.uint8) for _ in range(3))
        self._tag = 0

    def measure(self, peer_bytes: int) -> float:
        """Return the milliseconds that the mean of ``peer_bytes`` over the ranks takes, pages touched before."""
        total = torch.tensor([peer_bytes], dtype=torch.int64)
        self._transport.all_reduce_sum(total).wait(60)
        per_peer = int(total) // (len(self._peers) + 1) // len(self._peers)
        if self._live.numel() < per_peer * len(self._peers):
            size = 2 * per_peer * len(self._peers)
            self._live, self._staged, self._received = (torch.ones(size, dtype=torch.uint8) for _ in range(3))
        ranges = [slice(i * per_peer, (i + 1) * per_peer) for i in range(len(self._peers))]
        self._transport.all_reduce_sum(total).wait(60)
        start = time.perf_counter_ns()
        end = ranges[-1].stop
        self._staged[:end].copy_(self._live[:end])
        sends = [(peer, self._staged[part]) for peer, part in zip(self._peers, ranges, strict=True)]
        receives = [(peer, self._received[part]) for peer, part in zip(self._peers, ranges, strict=True)]
        self._tag += 1
        self._transport.begin(sends, receives, self._tag).wait(60)
        self._live[:end].copy_(self._received[:end])
        return (time.perf_counter_ns() - start) / 1e6


def compare(num_ranks: int, num_epochs: int, pass_ms: float, device: str) -> dict[str, Any]:
    """Run both modes and return medians and ratios."""
    runs = {
        mode: run_ranks(num_ranks, measure_mode, mode, num_epochs, pass_ms, device, options)
        for mode, options in (("sync", SYNC_OPTIONS), ("async", ASYNC_OPTIONS))
    }
    moved = {mode: [[e.moved_bytes for e in figures] for figures, _, _ in ranks] for mode, ranks in runs.items()}
    if moved["sync"] != moved["async"]:
        raise AssertionError(f"the modes moved other bytes: {moved}")
    result: dict[str, Any] = {"ranks": num_ranks, "epochs": num_epochs, "pass_ms": pass_ms, "device": device}
    for mode, ranks in runs.items():
        epochs = [[asdict(figures[i]) for figures, _, _ in ranks] for i in range(num_epochs)]
        result[mode] = {
            name: statistics.median(max(rank[name] for rank in epoch) for epoch in epochs) for name in epochs[0][0]
        }
        result[mode]["floor_wall_ms"] = statistics.median(max(f[i] for _, f, _ in ranks) for i in range(num_epochs))
        result[mode]["late_rounds"] = sum(late for _, _, late in ranks)
    sync, other = result["sync"], result["async"]
    result["ratios"] = {
        "sync_pause_over_async_pause_cpu": sync["longest_cpu_ms"] / other["longest_cpu_ms"],
        "sync_pause_over_async_pause_wall": sync["longest_wall_ms"] / other["longest_wall_ms"],
        "sync_over_floor_wall": sync["longest_wall_ms"] / sync["floor_wall_ms"],
        "async_epoch_over_sync_epoch_wall": other["epoch_wall_ms"] / sync["epoch_wall_ms"],
    }
    return result


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--pass-ms", type=float, default=5.0, help="time a forward pass waits for its device")
    parser.add_argument("--device", default="cpu", help="where the experts are, such as cuda; all ranks share one")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    result = compare(args.ranks, args.epochs, args.pass_ms, args.device)
    report(result, args.json)


if __name__ == "__main__":
    main()
