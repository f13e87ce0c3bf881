"""Recorded loads: files of several programs, read into one array."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from eplb_fsm.errors import LoadError
from eplb_fsm.placement.validate import Float64Array, checked_load

LOAD_KEY = "logical_count"
"""The name of the array: SGLang's, in what its expert distribution recorder dumps."""


def read_recording(path: Path) -> Float64Array:
    """Read a recording.

    ``.npz``, ``.npy``, ``.pt`` and ``.json`` hold an array, or a mapping with one named ``logical_count`` (as SGLang's
    recorder dumps it with ``stat`` mode), of shape (layers, experts), or (windows, layers, experts). ``.csv`` is either
    one row for each layer with a column for each expert, or has a head that names the columns ``layer``, ``expert``,
    ``tokens`` and perhaps ``window``, in any order.

    Args:
        path: The file; its suffix says what it is.

    Returns:
        (windows, layers, experts) float64, each 0 or more.

    Raises:
        LoadError: The file cannot be read; says what is wrong and what to change.
    """
    try:
        reader = _READERS[path.suffix]
    except KeyError:
        raise LoadError(f"{path}: recorded loads are in a file that ends in {', '.join(_READERS)}") from None
    try:
        content = path.read_bytes()
    except OSError as error:
        raise LoadError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    try:
        found = reader(content)
    except LoadError as error:
        raise LoadError(f"{path}: {error}") from error
    except Exception as error:  # damaged bytes make zip, torch, numpy and json raise whatever they like
        raise LoadError(f"{path}: is not a {path.suffix} file of recorded loads ({error})") from error
    return _checked(found, path)


def _checked(found: object, path: Path) -> Float64Array:
    if isinstance(found, Mapping):
        if LOAD_KEY not in found:
            raise LoadError(f"{path}: has no {LOAD_KEY!r} but {', '.join(map(str, found))}; name the array so")
        found = found[LOAD_KEY]
    try:
        array = np.asarray(found, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise LoadError(f"{path}: {LOAD_KEY!r} is not an array of numbers ({error})") from error
    windows = array[None] if array.ndim == 2 else array
    if windows.ndim != 3 or not windows.size:
        raise LoadError(
            f"{path}: the loads have shape {array.shape}; give (layers, experts) or (windows, layers, experts)"
        )
    return np.stack([_checked_window(window, index, path) for index, window in enumerate(windows)])


def _checked_window(window: Float64Array, index: int, path: Path) -> Float64Array:
    try:
        return checked_load(window, window.shape)
    except LoadError as error:
        raise LoadError(f"{path}: window {index}: {error}") from error


def _read_numpy(content: bytes) -> object:
    loaded = np.load(io.BytesIO(content), allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        return loaded
    return loaded[loaded.files[0]] if len(loaded.files) == 1 else dict(loaded)


def _read_torch(content: bytes) -> object:
    import torch  # here: only who has such a file needs it

    def plain(value: Any) -> Any:
        return value.double().numpy() if isinstance(value, torch.Tensor) else value

    loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    if isinstance(loaded, Mapping):
        return {name: plain(value) for name, value in loaded.items()}
    return plain(loaded)


def _read_csv(content: bytes) -> object:
    rows = [row for row in csv.reader(content.decode().splitlines()) if row]
    if not rows:
        raise LoadError("is empty")
    head = [name.strip() for name in rows[0]]
    if "tokens" not in head:
        return [list(map(float, row)) for row in rows]
    columns = [head.index(name) if name in head else None for name in ("window", "layer", "expert", "tokens")]
    if None in columns[1:]:
        raise LoadError(f"the head names {', '.join(head)}; it must name layer, expert and tokens")
    entries = [[row[column] if column is not None else "0" for column in columns] for row in rows[1:]]
    places = np.array([list(map(int, entry[:3])) for entry in entries], dtype=np.int64).reshape(-1, 3)
    if not len(places) or places.min() < 0:
        raise LoadError("has no rows, or a window, layer or expert below 0")
    loads = np.zeros(places.max(axis=0) + 1)
    np.add.at(loads, tuple(places.T), [float(entry[3]) for entry in entries])
    return loads


_READERS: dict[str, Callable[[bytes], object]] = {
    ".npz": _read_numpy,
    ".npy": _read_numpy,
    ".pt": _read_torch,
    ".json": json.loads,
    ".csv": _read_csv,
}
