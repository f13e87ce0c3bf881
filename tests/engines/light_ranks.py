"""What the ranks of the launcher's tests run: no model, so that they start quickly."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch

from eplb_fsm.engines.reference.ranks import RankContext


def send_and_return(context: RankContext) -> tuple[int, int, int]:
    """Send two messages; return what this rank knows of itself and its number of threads."""
    context.send(("hello", context.rank))
    context.send(("again", context.rank))
    return context.rank, context.world_size, torch.get_num_threads()


def die(context: RankContext, rank: int, how: str, folder: str) -> None:
    """Leave a note of this process and of a child; then one rank ends in the given way, the others wait."""
    child = os.fork()
    if child == 0:
        time.sleep(600)
        os._exit(0)
    Path(folder, f"{context.rank}.pid").write_text(f"{os.getpid()} {child}")
    torch.distributed.barrier()
    if context.rank == rank:
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "raise":
            raise ValueError("the reason of the test")
        if how == "exit":
            os._exit(7)
    time.sleep(600)
