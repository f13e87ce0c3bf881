"""Ending a rank: no thread is left inside a C++ call, where it would abort the process at the interpreter's exit."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import torch.distributed as dist

from tests.dist.decode import DecodeLoop, own_threads
from tests.dist.harness import RankLink, Ranks

ROOT = Path(__file__).resolve().parents[2]

_FORGETFUL = """
import sys
import torch.distributed as dist
from tests.dist.decode import DecodeLoop
from tests.dist.harness import RankLink

store = dist.TCPStore("127.0.0.1", int(sys.argv[1]), None, False, wait_for_workers=False)
connect = {"generation": int(sys.argv[2])}
loop = DecodeLoop(
    RankLink(0, 1, store.port, None), store=store, lockstep=False, connect=connect, vote_timeout_s=0.005
)
loop.fsm.arm()
loop.run_steps(20)
sys.exit(3)
"""


def _leave_a_peer_in_a_transfer(link: RankLink) -> list[str]:
    """Rank 1 waits in the worker for rank 0, whose worker stands still; then both close."""
    loop = DecodeLoop(link, lockstep=False, collecting_deadline_steps=1_000_000)
    transport = loop.fsm._parts.transport
    if link.rank == 0:
        reduce = transport.all_reduce_sum

        def late(tensor: object) -> object:
            link.listen()
            return reduce(tensor)

        transport.all_reduce_sum = late
    loop.fsm.arm()
    loop.fsm.request_rebalance()
    loop.run(lambda: loop.fsm.state.value == "COLLECTING")
    if link.rank == 1:
        time.sleep(0.2)  # its worker is inside gloo by now; if it is not, the test asks less
        loop.fsm.close()
        link.tell("closed", own_threads())
    else:
        link.listen()
        loop.fsm.close()
    return own_threads()


def test_close_ends_a_wait_for_a_peer_that_does_not_come() -> None:
    """Its worker is inside a collective that rank 0 never joins: the thread is gone when close() returns."""
    with Ranks(2, _leave_a_peer_in_a_transfer) as ranks:
        assert ranks.expect(1, "closed") == []
        ranks.say(0)
        ranks.say(0)
        assert ranks.join() == [[], []]


def test_a_rank_that_was_not_closed_exits_as_it_wanted_to() -> None:
    """Its watchdog talks to the store all the time, also while the interpreter goes down; so it is tried some times."""
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for generation in range(3):
        command = [sys.executable, "-c", _FORGETFUL, str(store.port), str(generation)]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 3, done.stderr
