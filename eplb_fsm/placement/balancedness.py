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


def balancedness(load: ArrayLike, placement: Placement, speeds: Float64Array | None = None) -> Float64Array:
    """Mean rank load / largest rank load of each layer, with speeds by time; 1.0 is perfect, and an idle layer's value.

    Args:
        load: (num_moe_layers, num_logical_experts) tokens per expert, 0 or more.
        placement: Where the experts are.
        speeds: As for :func:`mean_over_max`.

    Returns:
        (num_moe_layers,) float64 in (0, 1].

    Raises:
        LoadError: see :func:`rank_loads`.
    """
    return mean_over_max(rank_loads(load, placement), speeds)


def mean_over_max(loads: Float64Array, speeds: Float64Array | None = None) -> Float64Array:
    """Balancedness of each layer: the time that it would take, perfectly divided, over that of its slowest rank.

    Args:
        loads: (num_moe_layers, num_ranks) rank loads.
        speeds: (num_ranks,) float64 above 0, as in `Topology.counted_speeds`; None: all ranks are equally fast.
    """
    largest = slowest_times(loads, speeds)
    idle = largest <= 0.0
    perfect = loads.mean(axis=1) if speeds is None else loads.sum(axis=1) / speeds.sum()
    return np.where(idle, 1.0, perfect / np.where(idle, 1.0, largest))


def slowest_times(loads: Float64Array, speeds: Float64Array | None = None) -> Float64Array:
    """What each layer takes: the largest of its ranks' loads over their speeds; arguments as :func:`mean_over_max`."""
    return np.asarray((loads if speeds is None else loads / speeds).max(axis=1))


def _mean(loads: Float64Array, speeds: Float64Array | None = None) -> float:
    return float(mean_over_max(loads, speeds).mean())


def _min(loads: Float64Array, speeds: Float64Array | None = None) -> float:
    return float(mean_over_max(loads, speeds).min())


def _vllm(loads: Float64Array, speeds: Float64Array | None = None) -> float:
    del speeds  # the engine takes all ranks as alike
    largest = float(loads.max(axis=1).sum())
    return float(loads.mean(axis=1).sum()) / largest if largest > 0.0 else 0.0


def _sglang(loads: Float64Array, speeds: Float64Array | None = None) -> float:
    del speeds  # likewise
    return float(((loads.mean(axis=1) + 1e-5) / (loads.max(axis=1) + 1e-5)).mean())


FORMULAS: Mapping[str, Callable[..., float]] = MappingProxyType(
    {"mean": _mean, "min": _min, "vllm": _vllm, "sglang": _sglang}
)


def balancedness_summary(
    load: ArrayLike, placement: Placement, formula: str = "mean", speeds: Float64Array | None = None
) -> float:
    """One number for all layers.

    Args:
        load: (num_moe_layers, num_logical_experts) tokens per expert, 0 or more.
        placement: Where the experts are.
        formula: "mean" or "min" of the layers' balancedness; "vllm": sum over layers of the mean rank
            load / sum over layers of the largest, 0.0 when idle; "sglang": mean over layers of
            (mean + 1e-5) / (max + 1e-5).
        speeds: As for :func:`mean_over_max`; not known to the engines' formulas.

    Raises:
        ConfigError: an unknown formula.
        LoadError: see :func:`rank_loads`.
    """
    if formula not in FORMULAS:
        raise ConfigError(f"unknown balancedness formula {formula!r}; choose one of {', '.join(FORMULAS)}")
    return FORMULAS[formula](rank_loads(load, placement), speeds)
