"""Staging where experts are not in host memory: what is waited for, and which buffer a commit reads.

There is no accelerator here: the "device" is other memory of the host, and its copies are done at once. That commits
keep their place among passes is shown on a real one (``tests/dist/test_accelerator.py``).
"""

from __future__ import annotations

from collections.abc import Generator

import numpy as np
import pytest
import torch

from eplb_fsm import Bank, Placement
from eplb_fsm.placement.chunks import Chunk
from eplb_fsm.runtime import staging
from eplb_fsm.runtime.device import CpuDevice
from eplb_fsm.runtime.maps import TensorMapWriter
from eplb_fsm.runtime.pending import Done, Pending
from eplb_fsm.runtime.staging import CommitProgram, StagingArea
from eplb_fsm.runtime.tables import Tables
from eplb_fsm.runtime.transport import InMemoryExchange, InMemoryTransport

_LOCAL, _EXPERTS, _BYTES = 3, 6, 400_001


class _WorkerEvent(Done):
    """Of the worker's stream."""


class _Beside(CpuDevice):
    def worker_event(self) -> Pending:
        """An event that can be told from others."""
        return _WorkerEvent()


def _other_memory(commit_bytes: int, num_buffers: int, device: torch.device) -> tuple[list[torch.Tensor], ...]:
    """As for a bank on an accelerator, whose staged rows are not where messages are received."""
    receive, send, staged = (
        [torch.zeros(commit_bytes, dtype=torch.uint8) for _ in range(num_buffers)] for _ in range(3)
    )
    return receive, send, staged


def _chunk() -> Chunk:
    """Slots 0 and 3 change places between two ranks, and slot 2 gets what slot 1 has."""
    moves = np.array([(0, 0, 3, 3), (0, 3, 0, 0), (0, 2, 1, 1)])
    nothing = np.zeros(2, dtype=np.int64)
    return Chunk(0, 0, moves, np.zeros((0, 2), dtype=np.int64), -1, 0, _LOCAL, nothing, nothing)


def _bank(rank: int) -> Bank:
    random = torch.Generator().manual_seed(rank)
    layer = {
        name: torch.randint(256, (_LOCAL, size), dtype=torch.uint8, generator=random)
        for name, size in (("weight", _BYTES), ("scale", 12))
    }
    return Bank("target", _EXPERTS, _EXPERTS, [layer])


def test_rows_are_awaited_before_they_are_sent_and_before_they_are_voted_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a commit reads what was brought to the device, not the message."""
    monkeypatch.setattr(staging, "_allocate", _other_memory)
    banks = [_bank(rank) for rank in range(2)]
    before = [[t.clone() for t in bank.tensors[0].values()] for bank in banks]
    areas = [
        StagingArea([bank], rank, num_buffers=1, commit_bytes=4 << 20, integrity="wire", device=_Beside())
        for rank, bank in enumerate(banks)
    ]
    exchange = InMemoryExchange(2)
    placement = Placement.initial(1, _EXPERTS, _EXPERTS, 2)
    programs: list[CommitProgram] = []
    tables = Tables(TensorMapWriter([placement]), is_weighted=False)

    def job(rank: int) -> Generator[Pending, None, None]:
        transport = InMemoryTransport(exchange, rank)
        programs.append((yield from areas[rank].stage(_chunk(), Done(), 1, transport, tables, (placement,))))

    jobs = [job(0), job(1)]
    begun = [[next(body), next(body), next(body)] for body in jobs]
    for _, packed, exchanged in begun:
        assert isinstance(packed, _WorkerEvent)
        assert exchanged.poll() or not isinstance(exchanged, _WorkerEvent)
    assert all(exchanged.poll() for _, _, exchanged in begun)
    for body in jobs:
        assert isinstance(next(body), _WorkerEvent)
        assert next(body, None) is None
    for area in areas:
        area._receive[0].zero_()
    for program in programs:
        program.run()
    for part, (mine, theirs) in enumerate(zip(*before, strict=True)):
        wanted = [[theirs[0], mine[1], mine[1]], [mine[0], theirs[1], theirs[2]]]
        for bank, rows in zip(banks, wanted, strict=True):
            assert torch.equal(list(bank.tensors[0].values())[part], torch.stack(rows))
