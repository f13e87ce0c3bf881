"""Recorded loads: the same array from every kind of file, and one clear error for what is none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from eplb_fsm.errors import LoadError
from eplb_fsm.offline.recording import read_recording

WINDOWS = np.arange(24.0).reshape(2, 3, 4)


def _csv(path: Path) -> None:
    rows = ["tokens,layer,window,expert", ""]
    rows += [f"{WINDOWS[w, x, e]},{x},{w},{e}" for w, x, e in np.ndindex(WINDOWS.shape)]
    path.write_text("\n".join(rows))


WRITERS: dict[str, Callable[[Path], object]] = {
    "several.npz": lambda path: np.savez(path, other=np.zeros(2), logical_count=WINDOWS.astype(np.int32)),
    "one.npz": lambda path: np.savez(path, whatever=WINDOWS),
    "array.npy": lambda path: np.save(path, WINDOWS),
    "sglang.pt": lambda path: torch.save({"rank": 0, "logical_count": torch.tensor(WINDOWS, dtype=torch.int32)}, path),
    "tensor.pt": lambda path: torch.save(torch.tensor(WINDOWS, dtype=torch.bfloat16), path),
    "object.json": lambda path: path.write_text(json.dumps({"logical_count": WINDOWS.tolist()})),
    "long.csv": _csv,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same(name: str, tmp_path: Path) -> None:
    """Windows, layers and experts in this order, as float64."""
    WRITERS[name](tmp_path / name)
    found = read_recording(tmp_path / name)
    assert found.dtype == np.float64
    assert np.array_equal(found, WINDOWS)


def test_a_plain_table_is_one_window(tmp_path: Path) -> None:
    """One row for each layer."""
    np.savetxt(tmp_path / "plain.csv", WINDOWS[1], delimiter=",")
    assert np.array_equal(read_recording(tmp_path / "plain.csv"), WINDOWS[1:])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("loads.txt", b"", r"ends in \.npz"),
        ("missing.csv", None, "cannot be read"),
        ("empty.csv", b"", "is empty"),
        ("ragged.csv", b"1,2\n3\n", "not an array of numbers"),
        ("words.csv", b"a,b\n", r"not a \.csv file"),
        ("head.csv", b"layer,tokens\n0,1\n", "must name layer, expert and tokens"),
        ("negative.csv", b"1,2\n3,-4\n", "window 0: load of layer 1, expert 1 is -4"),
        ("below.csv", b"layer,expert,tokens\n-1,0,1\n", "below 0"),
        ("nan.json", b"[[1, NaN]]", "expert 1 is nan"),
        ("flat.json", b"[1, 2]", "shape .2,."),
        ("none.json", b"[]", "shape"),
        ("other.json", b'{"counts": [[1]]}', "no 'logical_count' but counts"),
        ("text.json", b'{"logical_count": "much"}', "not an array of numbers"),
        ("damaged.npz", b"PK", r"not a \.npz file"),
        ("damaged.pt", b"no", r"not a \.pt file"),
    ],
)
def test_what_is_no_recording_is_one_clear_error(
    name: str, content: bytes | None, message: str, tmp_path: Path
) -> None:
    """The error names the file and what to change."""
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(LoadError, match=message) as caught:
        read_recording(path)
    assert str(path) in str(caught.value)
