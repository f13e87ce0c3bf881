"""Splitting an expert's tokens unequally among its replicas, so that small drifts of the load need no move.

With `replica_split="weighted"` a slot gets the share of its expert's tokens that keeps the heaviest rank as light as
the placement allows (:mod:`~eplb_fsm.placement.kernels.split`). The shares reach the engine as more or fewer entries in
the table that it looks replicas up in anyway (:mod:`~eplb_fsm.placement.kernels.turns`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from eplb_fsm.placement.digest import Int64Array
from eplb_fsm.placement.placement import Placement
from eplb_fsm.placement.validate import Float64Array, checked_load

logger = logging.getLogger(__name__)

_WEIGHTED_WIDTH = 64


def weighted_shares(
    load: ArrayLike,
    placement: Placement,
    layers: Sequence[int] | None = None,
    speeds: Float64Array | None = None,
) -> Float64Array:
    """Shares with which the slowest rank of each layer is as quick as the placement allows, within 1 %.

    Pure computation, any thread; tens of microseconds a layer where numba is installed.

    Args:
        load: (num_moe_layers, num_logical_experts) tokens per expert, 0 or more.
        placement: Where the experts are.
        layers: Only these; None: all.
        speeds: As for :func:`.balancedness.mean_over_max`.

    Returns:
        (layers, num_physical_experts) float64, 0 to 1: the share of its expert's tokens that each slot gets; 0
        for an empty slot. The slots of an expert sum to 1; without load they get equal shares.

    Raises:
        LoadError: wrong shape, or an entry that is not a finite number of 0 or more.
    """
    return _split(load, placement, layers, speeds)[0]


def weighted_rank_loads(load: ArrayLike, placement: Placement, speeds: Float64Array | None = None) -> Float64Array:
    """Load of each rank with :func:`weighted_shares`; arguments and result as :func:`.balancedness.rank_loads`."""
    return _split(load, placement, None, speeds)[1]


def turn_tables(placement: Placement, layers: Sequence[int], shares: Float64Array, width: int) -> Int64Array:
    """Tables of some layers that name each slot in proportion to its share.

    Args:
        placement: Where the experts are.
        layers: Which layers.
        shares: (len(layers), num_physical_experts) as from :func:`weighted_shares`.
        width: Most entries of an expert; the shares are met more closely the larger it is.

    Returns:
        (len(layers), num_logical_experts, width) int64 slots, padded with -1.
    """
    from eplb_fsm.placement.kernels.turns import take_turns  # here: only who splits needs a compiler

    rows = placement.physical_to_logical_map[list(layers)]
    return take_turns(rows, np.ascontiguousarray(shares), placement.num_logical_experts, width)


def entered_shares(tables: Int64Array, num_physical_experts: int) -> Float64Array:
    """Shares that the slots get by the tables of :func:`turn_tables`: what is left of the wanted ones after rounding.

    Args:
        tables: (layers, num_logical_experts, width) int64.
        num_physical_experts: Slots of a layer.

    Returns:
        (layers, num_physical_experts) float64.
    """
    layer, expert, column = np.nonzero(tables >= 0)
    shares = np.zeros((len(tables), num_physical_experts))
    totals = (tables >= 0).sum(axis=-1)
    np.add.at(shares, (layer, tables[layer, expert, column]), 1.0 / totals[layer, expert])
    return shares


def table_width(placement: Placement, *, is_weighted: bool) -> int:
    """Entries of an expert in a bank's table: room for all replicas that any placement can give one expert.

    Where shares are weighted at least 64, so that each is off by less than one part in 64 of an expert's tokens.
    """
    most = placement.num_physical_experts - placement.num_logical_experts + 1
    return max(most, _WEIGHTED_WIDTH) if is_weighted else most


def warm_up() -> None:
    """Have the kernels compiled, so that no plan and no commit waits for that; takes seconds at most once."""
    from eplb_fsm.placement.kernels.compiled import IS_COMPILED

    if not IS_COMPILED:
        logger.warning(
            "replica_split='weighted' without numba: shares of large models take seconds for each plan, in which other "
            "threads of this process run more slowly; pip install 'eplb-fsm[fast]'"
        )
    placement = Placement.initial(1, 1, 2, 2)
    turn_tables(placement, [0], weighted_shares([[1.0]], placement), 2)


def _split(
    load: ArrayLike, placement: Placement, layers: Sequence[int] | None, speeds: Float64Array | None
) -> tuple[Float64Array, Float64Array]:
    from eplb_fsm.placement.kernels.split import split_layers

    array = checked_load(load, (placement.num_moe_layers, placement.num_logical_experts))
    chosen = np.arange(placement.num_moe_layers) if layers is None else np.array(layers, dtype=np.int64)
    widths = np.ones(placement.num_ranks) if speeds is None else speeds
    return split_layers(array[chosen], placement.physical_to_logical_map[chosen], widths)
