"""Load of each rank under a placement, and balancedness by the engines' formulas."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import ArrayLike

from eplb_fsm.errors import ConfigError
from eplb_fsm.placement.placement import Placement
from eplb_fsm.placement.validate import Float64Array, checked_load


def rank_loads(load: ArrayLike, placement: Placement, shares: Float64Array | None = None) -> Float64Array:
    """Load of each rank.

    Args:
        load: (num_moe_layers, num_logical_experts) tokens per expert, 0 or more.
        placement: Where the experts are.
        shares: (num_moe_layers, num_physical_experts) share of its expert's load that each slot gets; None: the
            replicas of an expert share its load equally.

    Returns:
        (num_moe_layers, num_ranks) float64, in the unit of `load`.

    Raises:
        LoadError: wrong shape, or an entry that is not a finite number of 0 or more.
    """
    array = checked_load(load, (placement.num_moe_layers, placement.num_logical_experts))
    each = array / placement.logical_replica_count if shares is None else array
    slots = placement.physical_to_logical_map
    # An empty slot reads the last expert's share here, and loses it again.
    held = each[np.arange(len(slots))[:, None], slots]
    if shares is not None:
        held *= shares
    held[slots < 0] = 0.0
    return np.asarray(held.reshape(len(slots), placement.num_ranks, -1).sum(axis=2))


RankLoads = Callable[[ArrayLike, Placement], Float64Array]
"""A way to divide tokens among replicas: :func:`rank_loads`, or :func:`~.split.weighted_rank_loads`."""


def balancedness(load: ArrayLike, placement: Placement) -> Float64Array:
    """Mean rank load / largest rank load of each layer; 1.0 is perfect, and an idle layer's value.

    Returns:
        (num_moe_layers,) float64 in (0, 1].

    Raises:
        LoadError: see :func:`rank_loads`.
    """
    return mean_over_max(rank_loads(load, placement))


def mean_over_max(loads: Float64Array) -> Float64Array:
    """Balancedness of each layer from (num_moe_layers, num_ranks) rank loads."""
    largest = loads.max(axis=1)
    idle = largest <= 0.0
    return np.where(idle, 1.0, loads.mean(axis=1) / np.where(idle, 1.0, largest))


def _vllm(loads: Float64Array) -> float:
    largest = float(loads.max(axis=1).sum())
    return float(loads.mean(axis=1).sum()) / largest if largest > 0.0 else 0.0


def _sglang(loads: Float64Array) -> float:
    return float(((loads.mean(axis=1) + 1e-5) / (loads.max(axis=1) + 1e-5)).mean())


FORMULAS: Mapping[str, Callable[[Float64Array], float]] = MappingProxyType(
    {
        "mean": lambda loads: float(mean_over_max(loads).mean()),
        "min": lambda loads: float(mean_over_max(loads).min()),
        "vllm": _vllm,
        "sglang": _sglang,
    }
)


def balancedness_summary(load: ArrayLike, placement: Placement, formula: str = "mean") -> float:
    """One number for all layers.

    Args:
        load: (num_moe_layers, num_logical_experts) tokens per expert, 0 or more.
        placement: Where the experts are.
        formula: "mean" or "min" of the layers' balancedness; "vllm": sum over layers of the mean rank
            load / sum over layers of the largest, 0.0 when idle; "sglang": mean over layers of
            (mean + 1e-5) / (max + 1e-5).

    Raises:
        ConfigError: an unknown formula.
        LoadError: see :func:`rank_loads`.
    """
    if formula not in FORMULAS:
        raise ConfigError(f"unknown balancedness formula {formula!r}; choose one of {', '.join(FORMULAS)}")
    return FORMULAS[formula](rank_loads(load, placement))
