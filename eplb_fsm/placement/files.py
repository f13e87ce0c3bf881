"""Placement files: a versioned, digested record in JSON or NPZ, or SGLang's bare map, written atomically."""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from eplb_fsm.errors import PlacementError
from eplb_fsm.placement.placement import Placement

FORMAT = "eplb_fsm.placement"
VERSION = 1
_MAP = "physical_to_logical_map"
_SIZES = ("num_moe_layers", "num_physical_experts", "num_logical_experts", "num_ranks")


def save_placement(placement: Placement, path: Path) -> None:
    """Write `placement` beside `path`, flush it to the disk, then rename it into place.

    Raises:
        PlacementError: a suffix other than .json and .npz, or the file cannot be written.
    """
    encode = _codec(path)[0]
    record: dict[str, Any] = {"format": FORMAT, "version": VERSION}
    record.update(zip(_SIZES, placement.shape, strict=True))
    record["digest"] = f"{placement.digest & (1 << 64) - 1:016x}"
    _write(path, encode(record, placement))


def save_bare_map(placement: Placement, path: Path) -> None:
    """Write the JSON that SGLang's ``--init-expert-location`` takes: the map and nothing else, which SGLang insists on.

    Raises:
        PlacementError: the file cannot be written.
    """
    _write(path, json.dumps({_MAP: placement.physical_to_logical_map.tolist()}).encode())


def load_placement(path: Path, like: Placement | None = None) -> Placement:
    """Read and verify a placement file.

    Args:
        path: A `.json` or `.npz` file written by :func:`save_placement`, or one of :func:`save_bare_map`.
        like: If given, the shape that the file must have; a bare map needs it, since it does not say its sizes.

    Raises:
        PlacementError: saying what is wrong with the file and what to change.
    """
    decode = _codec(path)[1]
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PlacementError(f"cannot read placement file {path}: {error}; check the path") from error
    try:
        record = decode(content)
    except Exception as error:  # damaged bytes make zip, zlib, numpy and json raise whatever they like
        raise PlacementError(
            f"placement file {path} is truncated or not a {path.suffix} placement ({error}); save it again"
        ) from error
    placement = _bare(record, path, like) if _is_bare(record) else _verified(record, path)
    if like is not None and placement.shape != like.shape:
        raise PlacementError(
            f"placement file {path} has (layers, physical, logical, ranks) = {placement.shape}, the model "
            f"needs {like.shape}; make a placement for this model, num_redundant_experts and number of ranks"
        )
    return placement


def _is_bare(record: object) -> bool:
    return isinstance(record, dict) and set(record) == {_MAP}


def _bare(record: Any, path: Path, like: Placement | None) -> Placement:
    if like is None:
        raise PlacementError(f"placement file {path} is a bare map and says no sizes; load it for a model")
    try:
        return Placement(record[_MAP], like.num_logical_experts, like.num_ranks)
    except PlacementError as error:
        raise PlacementError(f"placement file {path}: {error}") from error


def _verified(record: object, path: Path) -> Placement:
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise PlacementError(f"{path} is not a placement file: its format entry is not {FORMAT!r}")
    if record.get("version") != VERSION:
        raise PlacementError(
            f"placement file {path} has version {record.get('version')!r}, this library reads {VERSION}; "
            "save it again with this library"
        )
    missing = [name for name in (*_SIZES, "digest", _MAP) if name not in record]
    if missing:
        raise PlacementError(f"placement file {path} lacks {', '.join(missing)}; save it again")
    sizes = [record[name] for name in _SIZES]
    if not all(type(size) is int for size in sizes):
        raise PlacementError(f"placement file {path}: {', '.join(_SIZES)} must be integers, not {sizes}")
    try:
        placement = Placement(record[_MAP], sizes[2], sizes[3])
    except PlacementError as error:
        raise PlacementError(f"placement file {path}: {error}") from error
    if placement.shape != tuple(sizes):
        raise PlacementError(
            f"placement file {path} declares (layers, physical) = {tuple(sizes[:2])}, its map has "
            f"{placement.shape[:2]}; save it again"
        )
    if record["digest"] != f"{placement.digest & (1 << 64) - 1:016x}":
        raise PlacementError(
            f"placement file {path} does not match its digest: it was changed or damaged; save it again"
        )
    return placement


def _json_bytes(record: dict[str, Any], placement: Placement) -> bytes:
    record = {**record, _MAP: placement.physical_to_logical_map.tolist()}
    return json.dumps(record).encode()


def _npz_bytes(record: dict[str, Any], placement: Placement) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        header=np.frombuffer(json.dumps(record).encode(), dtype=np.uint8),
        physical_to_logical_map=placement.physical_to_logical_map,  # _MAP, but mypy knows no such keyword
    )
    return buffer.getvalue()


def _npz_record(content: bytes) -> object:
    with np.load(io.BytesIO(content), allow_pickle=False) as archive:
        record = json.loads(archive["header"].tobytes())
        record[_MAP] = archive[_MAP]
    return record


_Encode = Callable[[dict[str, Any], Placement], bytes]
_Decode = Callable[[bytes], object]
_CODECS: dict[str, tuple[_Encode, _Decode]] = {
    ".json": (_json_bytes, json.loads),
    ".npz": (_npz_bytes, _npz_record),
}


def _codec(path: Path) -> tuple[_Encode, _Decode]:
    try:
        return _CODECS[path.suffix]
    except KeyError:
        raise PlacementError(f"placement file {path} must end in {' or '.join(_CODECS)}") from None


def _write(path: Path, content: bytes) -> None:
    try:
        _write_atomically(path, content)
    except OSError as error:
        raise PlacementError(f"cannot write placement file {path}: {error}; check folder and rights") from error


def _write_atomically(path: Path, content: bytes) -> None:
    """A reader, or a crash at any time, sees the old file or the new one, never a part."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    # The rename itself is durable only when the folder is flushed; not every system can.
    with contextlib.suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
