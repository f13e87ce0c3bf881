"""SGLang's table of the one slot that a rank sends each expert's tokens to."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from eplb_fsm.engines.sglang.location import nearest_slots
from eplb_fsm.placement.placement import Placement
from eplb_fsm.runtime.maps import table_rows


@given(st.randoms(use_true_random=False), st.sampled_from([1, 2]))
def test_the_nearest_slot_is_taken(random: object, num_nodes: int) -> None:
    """A rank sends to a slot of its own, else to one of its node where others are elsewhere, always to a replica."""
    rng = np.random.default_rng(random.getrandbits(32))  # type: ignore[attr-defined]
    num_ranks, num_local, num_logical = 4, 3, 6
    row = np.concatenate([np.arange(num_logical), rng.integers(0, num_logical, num_ranks * num_local - num_logical)])
    placement = Placement([rng.permutation(row)], num_logical, num_ranks)
    experts, slots, counts = table_rows(placement, num_ranks * num_local, [0])
    for rank in range(num_ranks):
        nearest = nearest_slots(slots, counts, placement, rank, num_nodes)[0]
        for expert, slot in enumerate(nearest):
            replicas = np.flatnonzero(experts[0] == expert)
            ranks = replicas // num_local
            node = num_ranks // num_nodes
            near = replicas[ranks // node == rank // node]
            own = replicas[ranks == rank]
            assert slot in (own if len(own) else near if len(near) else replicas)


def test_ranks_without_a_replica_are_spread_over_the_others() -> None:
    """Ranks that have none of an expert's replicas do not all send to the same one."""
    placement = Placement([[0, 1, 0, 2, 3, 4, 5, 6]], 7, 4)
    _, slots, counts = table_rows(placement, 8, [0])
    chosen = [int(nearest_slots(slots, counts, placement, rank, 1)[0, 0]) for rank in range(4)]
    assert chosen[:2] == [0, 2]
    assert set(chosen[2:]) == {0, 2}
