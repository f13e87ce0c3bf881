"""What makes a physical-to-logical map a valid placement."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from eplb_fsm.errors import LoadError, PlacementError
from eplb_fsm.placement.digest import Int64Array

Float64Array = NDArray[np.float64]
EMPTY = -1


def checked_map(values: ArrayLike, num_logical_experts: int, num_ranks: int) -> Int64Array:
    """Copy `values` into a fresh (num_moe_layers, num_physical_experts) int64 array and check it.

    Raises:
        PlacementError: it is not a two-dimensional integer array, its slots do not divide among the
            ranks, a slot holds an unknown expert, or an expert has no slot in some layer.
    """
    array = _integer_array(values)
    if array.ndim != 2 or 0 in array.shape:
        raise PlacementError(
            f"physical_to_logical_map has shape {array.shape}; give (num_moe_layers, num_physical_experts)"
        )
    if num_logical_experts < 1 or num_ranks < 1:
        raise PlacementError(f"num_logical_experts={num_logical_experts} and num_ranks={num_ranks} must be 1 or more")
    if array.shape[1] % num_ranks:
        raise PlacementError(
            f"{array.shape[1]} physical experts do not divide among {num_ranks} ranks; "
            "change num_redundant_experts so that they do"
        )
    check_experts(array, num_logical_experts)
    return array


def check_experts(array: Int64Array, num_logical_experts: int, first_layer: int = 0) -> None:
    """Check that rows hold known experts only and every expert at least once.

    Args:
        array: (layers, num_physical_experts) int64.
        num_logical_experts: Logical experts per layer.
        first_layer: Number of row 0 in messages.

    Raises:
        PlacementError: naming the first offending layer, slot and expert.
    """
    if array.min() < EMPTY or array.max() >= num_logical_experts:
        layer, slot = np.argwhere((array < EMPTY) | (array >= num_logical_experts))[0].tolist()
        raise PlacementError(
            f"layer {first_layer + layer}, slot {slot} holds expert {array[layer, slot]}; "
            f"use 0..{num_logical_experts - 1}, or -1 for an empty slot"
        )
    counts = replica_counts(array, num_logical_experts)
    if counts.min() < 1:
        layer, expert = np.argwhere(counts < 1)[0].tolist()
        raise PlacementError(
            f"layer {first_layer + layer} has no slot for logical expert {expert}; "
            "every logical expert needs at least one physical slot in every layer"
        )


def replica_counts(array: Int64Array, num_logical_experts: int) -> Int64Array:
    """Slots that hold each expert: (layers, slots) map to (layers, num_logical_experts) int64."""
    layers, width = array.shape[0], num_logical_experts + 1
    keys = array + np.arange(1, layers * width, width)[:, None]
    counts = np.bincount(keys.ravel(), minlength=layers * width).reshape(layers, width)
    return counts[:, 1:]


_MOST = 1e300
"""Of a load: sums of any number of them are finite."""


def checked_load(load: ArrayLike, shape: tuple[int, int]) -> Float64Array:
    """`load` as a float64 array of `shape` (num_moe_layers, num_logical_experts).

    Raises:
        LoadError: another shape, not numbers, or an entry that is negative, NaN or above 1e300: sums are finite then.
    """
    try:
        array = np.asarray(load, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise LoadError(f"load is not an array of numbers ({error})") from None
    if array.shape != shape:
        raise LoadError(f"load has shape {array.shape}, needed is (num_moe_layers, num_logical_experts) = {shape}")
    if array.size and not (array.min() >= 0.0 and array.max() <= _MOST):
        layer, expert = np.argwhere(~((array >= 0.0) & (array <= _MOST)))[0].tolist()
        raise LoadError(
            f"load of layer {layer}, expert {expert} is {array[layer, expert]}; give counts from 0 to {_MOST:.0e}"
        )
    return array


def _integer_array(values: ArrayLike) -> Int64Array:
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise PlacementError(f"physical_to_logical_map is not a rectangular array ({error})") from None
    if not np.issubdtype(array.dtype, np.integer):
        raise PlacementError(f"physical_to_logical_map has dtype {array.dtype}; give integers")
    return np.array(array, dtype=np.int64, order="C")
