"""What the benchmarks of several ranks share: processes, experts of a given size, a sequence of placements."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import queue
import socket
import time
import traceback
import zlib
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from eplb_fsm import Bank, Placement
from eplb_fsm.placement import Topology, get_policy
from eplb_fsm.placement.policies import DeepseekPolicy


class ShuffledLoad:
    """DeepSeek's placement for a load drawn from what each rank holds now.

    So the sequence of placements from one start is always the same, whatever the mode, its timing and its chunks
    (which decide the order of the slots of a rank).
    """

    name = "shuffled-load"
    deterministic = True

    def warm_up(self) -> None:
        """Load the kernel, so that it is not measured."""
        DeepseekPolicy("global").warm_up()

    def plan(self, load: np.ndarray, current: Placement, topology: Topology) -> Placement:
        """Return the successor of ``current``."""
        held = current.physical_to_logical_map.reshape(current.num_moe_layers, current.num_ranks, -1)
        random = np.random.default_rng(zlib.crc32(np.sort(held, axis=2).tobytes()))
        drawn = random.lognormal(0.0, 1.0, size=load.shape)
        return get_policy("deepseek_global").plan(drawn, current, topology)


def report(result: dict[str, Any], path: Path | None) -> None:
    """Print a result with its machine, and write it where asked to."""
    result["machine"] = f"{os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}"
    text = json.dumps(result, indent=2)
    if path:
        path.write_text(text)
    print(text)


def run_ranks(num_ranks: int, target: Callable[..., Any], *args: object, timeout_s: float = 600) -> list[Any]:
    """Run ``target(rank, num_ranks, store, *args)`` in one process for each rank; return what each returned."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results: Queue[tuple[int, Any, str]] = context.Queue()
    processes = [
        context.Process(target=_run_rank, args=(rank, num_ranks, port, results, target, args), daemon=True)
        for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    try:
        answers = _collect(results, processes, timeout_s)
    except BaseException:
        for process in processes:
            process.kill()
        raise
    for process in processes:
        process.join(timeout=5)
        process.kill()
    return [answers[rank] for rank in range(num_ranks)]


def _collect(
    results: Queue[tuple[int, Any, str]], processes: Sequence[BaseProcess], timeout_s: float
) -> dict[int, Any]:
    """Wait for the answers of all ranks; one that fails, or ends without an answer, ends the wait."""
    answers: dict[int, Any] = {}
    deadline = time.monotonic() + timeout_s
    while len(answers) < len(processes):
        try:
            rank, answer, error = results.get(timeout=1)
        except queue.Empty:
            ended = [rank for rank, process in enumerate(processes) if process.exitcode and rank not in answers]
            if ended or time.monotonic() > deadline:
                raise RuntimeError(
                    f"no answer from ranks {ended or sorted({*range(len(processes))} - {*answers})}"
                ) from None
            continue
        if error:
            raise RuntimeError(f"rank {rank} failed:\n{error}")
        answers[rank] = answer
    return answers


def _run_rank(
    rank: int,
    num_ranks: int,
    port: int,
    results: Queue[tuple[int, Any, str]],
    target: Callable[..., Any],
    args: tuple[object, ...],
) -> None:
    torch.set_num_threads(1)
    try:
        store = dist.TCPStore("127.0.0.1", port, num_ranks, rank == 0, wait_for_workers=False)
        results.put((rank, target(rank, num_ranks, store, *args), ""))
        store.set(f"done/{rank}", "1")
        store.wait([f"done/{other}" for other in range(num_ranks)])  # rank 0 hosts the store
    except Exception:
        results.put((rank, None, traceback.format_exc()))


def expert_bank(
    num_layers: int, num_logical: int, num_physical: int, num_ranks: int, expert_bytes: int, device: str = "cpu"
) -> Bank:
    """Return a bank of fp32 experts: ``w13`` has two thirds of the bytes and ``w2`` one third."""
    num_local = num_physical // num_ranks
    words = expert_bytes // 12
    tensors = [
        {name: torch.randn(num_local, n, device=device) for name, n in (("w13", 2 * words), ("w2", words))}
        for _ in range(num_layers)
    ]
    return Bank("model", num_logical, num_physical, tensors)
