"""An independent reading of a plan: slots hold values, chunks are carried out one by one, in plain loops.

It uses nothing of the library but the public fields of a plan, and raises AssertionError where a promise
is broken.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from eplb_fsm.placement import BankShape, Budget, Chunk, Placement, Plan

# Layer -> expert in each slot, by value.
Contents = list[list[int]]


def contents_of(placement: Placement) -> Contents:
    """What the slots hold."""
    return placement.physical_to_logical_map.tolist()


def carry_out(plan: Plan, shapes: Sequence[BankShape], budget: Budget) -> list[Contents]:
    """Carry out a plan and check every promise on the way; returns what the banks hold in the end."""
    banks = [contents_of(placement) for placement in plan.base]
    written: set[tuple[int, int, int]] = set()
    for idx, chunk in enumerate(plan.chunks):
        assert chunk.idx == idx
        placement = plan.base[chunk.bank]
        check_sources(chunk, banks[chunk.bank], placement.num_local_physical_experts)
        check_bytes(chunk, shapes[chunk.bank].row_bytes, budget.commit_bytes, placement.num_ranks)
        apply(chunk, banks[chunk.bank], written)
        check_valid(banks[chunk.bank], placement.num_logical_experts)
        fresh = [
            Placement(bank, base.num_logical_experts, base.num_ranks)
            for bank, base in zip(banks, plan.base, strict=True)
        ]
        assert plan.placements_after(idx) == tuple(fresh)
        assert [p.digest for p in plan.placements_after(idx)] == [p.digest for p in fresh]
    check_begin_after(plan.chunks, budget.staging_buffers)
    return banks


def check_sources(chunk: Chunk, contents: Contents, num_local: int) -> None:
    """Sources hold the expert before the chunk; what the rank has is not fetched; what is fetched is
    fetched once.
    """
    rows = chunk.moves.tolist()
    assert rows or len(chunk.emptied)
    assert all(a[:2] < b[:2] for a, b in pairwise(rows))
    fetched: dict[tuple[int, int, int], int] = {}
    for layer, dst, src, expert in rows:
        assert contents[layer][src] == expert >= 0
        rank = dst // num_local
        if src // num_local != rank:
            assert expert not in contents[layer][rank * num_local : (rank + 1) * num_local]
            assert fetched.setdefault((layer, rank, expert), src) == src
    check_routes(chunk, fetched, num_local)


def check_routes(chunk: Chunk, fetched: dict[tuple[int, int, int], int], num_local: int) -> None:
    """The helpers of a chunk agree with each other on who sends what to whom, and in which order."""
    ranks = range(1 + max((max(dst, src) // num_local for _, dst, src, _ in chunk.moves.tolist()), default=0))
    received = [
        (layer, dst // num_local, expert, src)
        for rank in ranks
        for layer, dst, src, expert in chunk.receives(rank).tolist()
    ]
    assert sorted(received) == sorted((*key, src) for key, src in fetched.items())
    for a in ranks:
        for b in ranks:
            sent = [row for row in chunk.sends(a).tolist() if row[1] // num_local == b]
            assert sent == [row for row in chunk.receives(b).tolist() if row[2] // num_local == a]


def check_bytes(chunk: Chunk, row_bytes: Sequence[int], most: int, num_ranks: int) -> None:
    """No rank writes or sends more than the budget, and the chunk's own numbers are right."""
    num_local = chunk.num_local_physical_experts
    written, sent, transfers = Counter[int](), Counter[int](), set[tuple[int, int, int]]()
    for layer, dst, src, _ in chunk.moves.tolist():
        written[dst // num_local] += row_bytes[layer]
        transfer = (layer, src, dst // num_local)
        if src // num_local != dst // num_local and transfer not in transfers:
            transfers.add(transfer)
            sent[src // num_local] += row_bytes[layer]
    assert max([*written.values(), *sent.values()], default=0) <= most
    assert [chunk.bytes_to(rank) for rank in range(num_ranks)] == [written[rank] for rank in range(num_ranks)]
    assert [chunk.bytes_from(rank) for rank in range(num_ranks)] == [sent[rank] for rank in range(num_ranks)]


def apply(chunk: Chunk, contents: Contents, written: set[tuple[int, int, int]]) -> None:
    """Read all sources, then write all destinations; no slot is written twice in a plan, none in vain."""
    values = [(layer, dst, contents[layer][src]) for layer, dst, src, _ in chunk.moves.tolist()]
    values += [(layer, slot, -1) for layer, slot in chunk.emptied.tolist()]
    for layer, slot, value in values:
        assert contents[layer][slot] != value
        assert (chunk.bank, layer, slot) not in written
        written.add((chunk.bank, layer, slot))
        contents[layer][slot] = value


def check_valid(contents: Contents, num_experts: int) -> None:
    """Every expert has a slot in every layer."""
    for row in contents:
        assert {expert for expert in row if expert >= 0} == set(range(num_experts))


def check_begin_after(chunks: Sequence[Chunk], staging_buffers: int) -> None:
    """A chunk waits for the last earlier one of its layers and for a buffer, and for nothing else."""
    for i, chunk in enumerate(chunks):
        touched = set(chunk.layers)
        assert touched == {*chunk.moves[:, 0].tolist(), *chunk.emptied[:, 0].tolist()}
        conflicts = [j for j in range(i) if chunks[j].bank == chunk.bank and touched & set(chunks[j].layers)]
        assert chunk.begin_after == max([-1, i - staging_buffers, *conflicts])


def check_senders(plan: Plan, shapes: Sequence[BankShape], budget: Budget, num_nodes: int) -> None:
    """In no part of a layer could a transfer come from a nearer rank, or from one as near that sends two fewer.

    A nearer one may have sent all that it may.
    """
    per_node = plan.base[0].num_ranks // num_nodes
    banks = [contents_of(placement) for placement in plan.base]
    for chunk in plan.chunks:
        contents, num_local = banks[chunk.bank], chunk.num_local_physical_experts
        for layer in chunk.layers:
            transfers = {
                (src // num_local, dst // num_local, expert)
                for at, dst, src, expert in chunk.moves.tolist()
                if at == layer and src // num_local != dst // num_local
            }
            sends = Counter(src for src, _, _ in transfers)
            most = budget.commit_bytes // shapes[chunk.bank].row_bytes[layer]
            for src, dst, expert in transfers:
                holders = {slot // num_local for slot, held in enumerate(contents[layer]) if held == expert}
                near = {rank for rank in holders if rank // per_node == dst // per_node}
                alike = near if src in near else holders - near
                assert all(sends[src] <= sends[other] + 1 for other in alike)
                assert src in near or all(sends[other] >= most for other in near)
        apply(chunk, contents, set())
