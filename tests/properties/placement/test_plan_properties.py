"""Plans between random placements keep every promise of a plan."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from instances import Problem, problems
from path_checker import carry_out, check_senders, contents_of

from eplb_fsm.placement import BankShape, Budget, Placement, Plan

MANY = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def by_rank(placement: Placement) -> list[list[Counter[int]]]:
    """For each layer and rank how many slots hold each expert: a placement up to slot order."""
    num_local = placement.num_local_physical_experts
    return [
        [Counter(row[at : at + num_local]) for at in range(0, len(row), num_local)] for row in contents_of(placement)
    ]


@MANY
@given(problems())
def test_a_plan_is_a_path_of_valid_placements_to_the_target(problem: Problem) -> None:
    """Carried out by value, the chunks keep all promises and end exactly in the plan's targets, which are
    the policy's up to the order of slots in a rank.
    """
    plan = problem.plan()
    banks = carry_out(plan, problem.shapes, problem.budget)
    assert banks == [contents_of(target) for target in plan.banks]
    assert [by_rank(p) for p in plan.banks] == [by_rank(p) for p in problem.target]


@MANY
@given(problems())
def test_nothing_moves_that_may_stay(problem: Problem) -> None:
    """The slots written are as few as the contents of the ranks allow."""
    plan = problem.plan()
    least = sum(
        (wanted - held).total()
        for current, target in zip(problem.current, problem.target, strict=True)
        for layers in zip(by_rank(current), by_rank(target), strict=True)
        for held, wanted in zip(*layers, strict=True)
    )
    assert plan.num_moves + sum(len(chunk.emptied) for chunk in plan.chunks) == least
    assert bool(plan.skip_reason) == (least == 0)


@MANY
@given(problems())
def test_senders_are_balanced(problem: Problem) -> None:
    """Within a layer of a chunk no transfer could be given to a nearer or a clearly less busy holder."""
    check_senders(problem.plan(), problem.shapes, problem.budget, problem.num_nodes)


@MANY
@given(st.integers(0, 2**32 - 1))
def test_senders_are_balanced_where_there_is_choice(seed: int) -> None:
    """The same with many ranks and replicas, where most transfers have several possible senders."""
    rng = np.random.default_rng(seed)
    num_ranks = int(rng.integers(4, 9))
    layers = [rng.permutation([*range(num_ranks), *rng.integers(0, num_ranks, 2 * num_ranks)]) for _ in range(4)]
    current, target = (Placement(rows, num_ranks, num_ranks) for rows in (layers[:2], layers[2:]))
    shape = BankShape("experts", (10, 10))
    num_nodes = int(rng.choice([nodes for nodes in range(1, num_ranks + 1) if num_ranks % nodes == 0]))
    problem = Problem((current,), (target,), (shape,), Budget(10 * int(rng.integers(1, 5))), num_nodes)
    check_senders(problem.plan(), problem.shapes, problem.budget, num_nodes)


@MANY
@given(problems())
def test_bytes_are_those_of_the_moves(problem: Problem) -> None:
    """Totals of a plan are the sums over its chunks."""
    plan = problem.plan()
    ranks = range(plan.base[0].num_ranks)
    assert plan.peer_bytes == sum(chunk.bytes_from(rank) for chunk in plan.chunks for rank in ranks)
    assert plan.moved_bytes == sum(chunk.bytes_to(rank) for chunk in plan.chunks for rank in ranks)
    assert plan.busiest_rank_bytes == sum(
        max(max(chunk.bytes_from(rank), chunk.bytes_to(rank)) for rank in ranks) for chunk in plan.chunks
    )


@MANY
@given(problems())
def test_decoding_gives_the_plan_back(problem: Problem) -> None:
    """What one rank encodes another decodes to an equal plan of equal digest."""
    plan = problem.plan()
    again = Plan.decode(plan.encode().copy(), problem.current, problem.shapes, problem.budget)
    assert again == plan
    assert again.digest == plan.digest
    assert hash(again) == hash(plan)
    assert again.encode().tolist() == plan.encode().tolist()


@MANY
@given(problems())
def test_equal_input_gives_an_equal_plan(problem: Problem) -> None:
    """Planning is deterministic."""
    assert problem.plan().digest == problem.plan().digest


@MANY
@given(problems())
def test_a_layer_that_fits_is_not_cut(problem: Problem) -> None:
    """With a budget for all slots of all ranks at once, each layer is in one chunk."""
    assume(any(by_rank(c) != by_rank(t) for c, t in zip(problem.current, problem.target, strict=True)))
    whole = max(
        current.num_physical_experts * max(shape.row_bytes)
        for current, shape in zip(problem.current, problem.shapes, strict=True)
    )
    plan = replace(problem, budget=Budget(whole)).plan()
    touched = [(chunk.bank, layer) for chunk in plan.chunks for layer in chunk.layers]
    assert len(touched) == len(set(touched))
