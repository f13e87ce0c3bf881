"""Ten thousand epochs in one process: outcomes, weights and memory at the end."""

from __future__ import annotations

import gc
import logging
import resource
import sys
import time
from pathlib import Path

import pytest
from clusters import ROW_BYTES, config

from eplb_fsm.simulate.cluster import SimulatedCluster
from eplb_fsm.simulate.engine import Shape

NUM_EPOCHS = 10_000
NUM_RANKS = 4
WARM_UP_EPOCHS = 1_000
MOST_NEW_BLOCKS = NUM_EPOCHS // 2
"""Less than one object an epoch, however small."""
MOST_NEW_BYTES = 32 << 20


def memory() -> tuple[int, int]:
    """Blocks that the interpreter holds, and resident bytes of the process (0 where the system does not say)."""
    gc.collect()
    pages = Path("/proc/self/statm")
    resident = int(pages.read_text().split()[1]) * resource.getpagesize() if pages.exists() else 0
    return sys.getallocatedblocks(), resident


def num_epochs(cluster: SimulatedCluster) -> int:
    """Epochs that have ended on every rank."""
    return min(sum(rank.fsm.health().num_outcomes.values()) for rank in cluster.ranks)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ten_thousand_epochs(caplog: pytest.LogCaptureFixture) -> None:
    """All of 10,000 epochs end alike on 4 ranks, a tenth or more aborted, no pass is wrong or torn, memory is flat."""
    caplog.set_level(logging.ERROR, logger="eplb_fsm")  # pytest keeps every record, a warning for each abort
    began = time.process_time()
    cluster = SimulatedCluster(
        NUM_RANKS,
        config(
            step_interval=1,
            idle_round_interval=1,
            commit_bytes=ROW_BYTES,
            window_size=1000,
            backoff_steps=1,
            max_backoff_steps=1,
        ),
        seed=20,
        lag=1,
        shape=Shape(num_moe_layers=3, num_logical_experts=NUM_RANKS, num_physical_experts=NUM_RANKS),
    )
    cluster.worker_share = 0.93
    cluster.mark_share = 0.001
    chunks = set()
    reached = 0
    before: tuple[int, int] | None = None
    while (ended := num_epochs(cluster)) < NUM_EPOCHS:
        if ended // 8 != reached // 8:  # more than one in eight, since a request can miss its epoch
            cluster.ranks[ended // 8 % NUM_RANKS].fsm.request_abort()
        reached = ended
        chunks |= {o.num_commits for o in cluster.ranks[0].fsm.outcomes[-1:] if o.kind.name == "COMMITTED"}
        if before is None and ended >= WARM_UP_EPOCHS:
            before = memory()
        cluster.run_steps(8)
    cluster.settle()
    counts = [rank.fsm.health().num_outcomes for rank in cluster.ranks]
    assert before is not None
    new_blocks, new_bytes = (now - then for now, then in zip(memory(), before, strict=True))
    write = sys.stdout.write  # the figures that a reader of the log wants
    write(f"{NUM_EPOCHS} epochs, {time.process_time() - began:.1f} s of one core, {counts[0]}\n")
    write(f"grown since epoch {WARM_UP_EPOCHS} by {new_blocks} objects and {new_bytes} resident bytes\n")
    assert all(count == counts[0] for count in counts)
    assert counts[0]["ABORTED"] >= NUM_EPOCHS // 10
    assert counts[0]["COMMITTED"] >= NUM_EPOCHS // 2
    assert counts[0]["FAILED"] == 0
    assert min(chunks) >= 3
    assert cluster.torn == []
    assert new_blocks < MOST_NEW_BLOCKS
    assert new_bytes < MOST_NEW_BYTES
