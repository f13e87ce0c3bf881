"""Rows that are cut into pieces, and small ones that are packed together: they arrive whole, and damage is seen."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import pytest
import torch

from eplb_fsm import Bank, Placement
from eplb_fsm.placement.chunks import Chunk
from eplb_fsm.runtime.maps import TensorMapWriter
from eplb_fsm.runtime.pending import Done, Pending
from eplb_fsm.runtime.staging import CommitProgram, IntegrityError, StagingArea
from eplb_fsm.runtime.tables import Tables
from eplb_fsm.runtime.transport import InMemoryExchange, InMemoryTransport, Parcel
from eplb_fsm.runtime.worker import Pace

_LAYERS, _LOCAL, _EXPERTS = 2, 3, 6
_SIZES = {
    "small": [24, 5],
    "one tensor of several pieces": [700_001],
    "pieces that end within a tensor, at its end, and behind it": [300_005, 8, (256 << 10) - 64, 3],
}


class _DamagingTransport(InMemoryTransport):
    """Flips a bit of one byte of what it sends."""

    damaged_byte: int | None = None

    def begin(self, sends: list[Parcel], receives: list[Parcel], tag: int):  # type: ignore[no-untyped-def, override]
        for _, buffer in sends if self.damaged_byte is not None else ():
            buffer[self.damaged_byte] ^= 4
        return super().begin(sends, receives, tag)


class _Ranks(NamedTuple):
    banks: list[Bank]
    areas: list[StagingArea]
    transports: list[_DamagingTransport]


def _ranks(sizes: list[int], between_pieces: Callable[[], None] = lambda: None, integrity: str = "wire") -> _Ranks:
    random = torch.Generator().manual_seed(len(sizes))
    banks = []
    for _ in range(2):
        layer = [
            {str(i): torch.randint(256, (_LOCAL, n), dtype=torch.uint8, generator=random) for i, n in enumerate(sizes)}
            for _ in range(_LAYERS)
        ]
        banks.append(Bank("target", _EXPERTS, _EXPERTS, layer))
    exchange = InMemoryExchange(2)
    areas = [
        StagingArea(
            [bank],
            rank,
            num_buffers=1,
            commit_bytes=16 << 20,
            integrity=integrity,
            between_pieces=between_pieces,
        )
        for rank, bank in enumerate(banks)
    ]
    return _Ranks(banks, areas, [_DamagingTransport(exchange, rank) for rank in range(2)])


def _swap_all() -> Chunk:
    """Every expert changes the rank: slot i of one with slot i of the other."""
    moves = [
        (layer, slot, (slot + _LOCAL) % _EXPERTS, (slot + _LOCAL) % _EXPERTS)
        for layer in range(_LAYERS)
        for slot in range(_EXPERTS)
    ]
    nothing = np.zeros(2, dtype=np.int64)
    return Chunk(0, 0, np.array(moves), np.zeros((0, 2), dtype=np.int64), -1, 0, _LOCAL, nothing, nothing)


def _tables(placement: Placement) -> Tables:
    return Tables(TensorMapWriter([placement]), is_weighted=False)


def _stage(ranks: _Ranks) -> list[CommitProgram]:
    """Stage the chunk on both ranks; the receivers check what they got, rank 1 first."""
    placement = Placement.initial(_LAYERS, _EXPERTS, _EXPERTS, 2)
    programs: list[CommitProgram] = []

    def job(rank: int) -> Iterator[Pending]:
        area, transport = ranks.areas[rank], ranks.transports[rank]
        programs.append((yield from area.stage(_swap_all(), Done(), 1, transport, _tables(placement), (placement,))))

    jobs = [job(1), job(0)]
    exchanges = [[next(job), next(job)][1] for job in jobs]  # the event of the last commit, then the exchange
    for exchange in exchanges:
        exchange.poll()
    for body in jobs:
        next(body, None)
    return programs


@pytest.mark.parametrize("sizes", _SIZES.values(), ids=_SIZES)
def test_every_byte_of_a_row_arrives(sizes: list[int]) -> None:
    """All experts of two ranks change places, byte for byte."""
    ranks = _ranks(sizes)
    before = [[t.clone() for layer in bank.tensors for t in layer.values()] for bank in ranks.banks]
    for program in _stage(ranks):
        program.run()
    after = [[t for layer in bank.tensors for t in layer.values()] for bank in ranks.banks]
    for seen, wanted in zip(after[0] + after[1], before[1] + before[0], strict=True):
        assert torch.equal(seen, wanted)


@pytest.mark.parametrize("sizes", _SIZES.values(), ids=_SIZES)
def test_a_damaged_bit_in_any_piece_is_seen(sizes: list[int]) -> None:
    """In the first, the middle and the last bytes of the first and of the last row, and in a hash itself."""
    layout = _ranks(sizes).banks[0].layout
    last_row = (_LAYERS * _LOCAL - 1) * layout.stride
    inside = [0, layout.payload_bytes // 2, layout.segments[-1][0] + sizes[-1] - 1, layout.payload_bytes]
    for place in [*inside, *(last_row + offset for offset in inside)]:
        ranks = _ranks(sizes)
        ranks.transports[0].damaged_byte = place
        with pytest.raises(IntegrityError, match="bank 'target' from rank 0 was damaged"):
            _stage(ranks)


@pytest.mark.parametrize("sizes", _SIZES.values(), ids=_SIZES)
@pytest.mark.parametrize(("integrity", "num_acts"), [("off", 1), ("wire", 2)])
def test_a_step_gets_a_word_in_between_pieces(sizes: list[int], integrity: str, num_acts: int) -> None:
    """Each rank packs six rows, and checks as many: at least once for each of them and for each quarter of a MiB."""
    called: list[None] = []
    ranks = _ranks(sizes, lambda: called.append(None), integrity)
    _stage(ranks)
    layout = ranks.banks[0].layout
    num_blocks = 2 * num_acts * -(-_LAYERS * _LOCAL // layout.rows_per_block)
    assert len(called) >= num_blocks * -(-layout.payload_bytes // (256 << 10))


def test_staging_stands_still_during_a_step() -> None:
    """A thread that stages rows gets no further while a step is under way, and ends once it is over, or at a close."""
    for end in (Pace.close, lambda pace: setattr(pace, "is_in_step", False)):
        pace = Pace(0)
        pace.is_in_step = True
        thread = threading.Thread(target=_stage, args=(_ranks([24, 5], pace.let_step_end),))
        thread.start()
        time.sleep(0.05)
        assert thread.is_alive()
        end(pace)
        thread.join(10)
        assert not thread.is_alive()
