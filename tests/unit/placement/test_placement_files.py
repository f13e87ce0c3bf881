"""Placement files: round trip, one clear error for each kind of damage, atomic writing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from eplb_fsm.errors import PlacementError
from eplb_fsm.placement import Placement, files

PLACEMENT = Placement([[0, 1, 2, 3, 2, -1], [3, 3, 2, 1, 0, 3]], 4, 3)
SUFFIXES = [".json", ".npz"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_round_trip(tmp_path: Path, suffix: str) -> None:
    """What is saved is loaded, also over an older file."""
    path = tmp_path / f"placement{suffix}"
    Placement.initial(1, 2, 2, 1).save(path)
    PLACEMENT.save(str(path))
    assert Placement.load(path) == PLACEMENT
    assert Placement.load(str(path), like=PLACEMENT).digest == PLACEMENT.digest
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_truncation_is_refused(tmp_path: Path, suffix: str) -> None:
    """A file cut off anywhere is one placement error, never another exception."""
    path = tmp_path / f"placement{suffix}"
    PLACEMENT.save(path)
    content = path.read_bytes()
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        with pytest.raises(PlacementError, match="truncated or not"):
            Placement.load(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_no_flipped_byte_is_loaded_as_something_else(tmp_path: Path, suffix: str) -> None:
    """A damaged byte is refused, or does not matter (white space, fields that nothing reads)."""
    path = tmp_path / f"placement{suffix}"
    PLACEMENT.save(path)
    content = path.read_bytes()
    for at in range(len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x15]) + content[at + 1 :])
        try:
            assert Placement.load(path) == PLACEMENT
        except PlacementError:
            continue


def _edited(tmp_path: Path, **entries: object) -> Path:
    path = tmp_path / "placement.json"
    PLACEMENT.save(path)
    record = {**json.loads(path.read_text()), **entries}
    path.write_text(json.dumps({name: value for name, value in record.items() if value is not None}))
    return path


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"version": 2}, "has version 2, this library reads 1"),
        ({"version": None}, "has version None"),
        ({"format": "other"}, "not a placement file"),
        ({"digest": "0" * 16}, "does not match its digest"),
        ({"digest": None}, "lacks digest"),
        ({"num_ranks": None, "num_moe_layers": None}, "lacks num_moe_layers, num_ranks"),
        ({"physical_to_logical_map": None}, "lacks physical_to_logical_map"),
        ({"physical_to_logical_map": [[0, 1, 2, 2, 2, 2]] * 2}, "no slot for logical expert 3"),
        ({"physical_to_logical_map": [[0, 1, 2, 3, 2, 2]] * 2}, "does not match its digest"),
        ({"physical_to_logical_map": [[0, 1, 2, 3, 2, 2]]}, r"declares \(layers, physical\) = \(2, 6\)"),
        ({"physical_to_logical_map": [[0, 1], [0]]}, "rectangular"),
        ({"num_physical_experts": 8}, r"declares \(layers, physical\) = \(2, 8\)"),
        ({"num_ranks": 4}, "do not divide among 4 ranks"),
        ({"num_ranks": "3"}, "must be integers"),
        ({"num_logical_experts": 4.0}, "must be integers"),
    ],
)
def test_wrong_entries_are_refused(tmp_path: Path, entries: dict[str, object], message: str) -> None:
    """Each wrong entry has one error that names the file and what is wrong in it."""
    path = _edited(tmp_path, **entries)
    with pytest.raises(PlacementError, match=message) as caught:
        Placement.load(path)
    assert str(path) in str(caught.value)


def test_a_file_that_is_json_but_no_record(tmp_path: Path) -> None:
    """A list in a JSON file is not a placement."""
    path = tmp_path / "placement.json"
    path.write_text("[1, 2]")
    with pytest.raises(PlacementError, match="not a placement file"):
        Placement.load(path)


def test_an_npz_of_something_else(tmp_path: Path) -> None:
    """Arrays without a header are not a placement; pickled objects are never unpacked."""
    path = tmp_path / "placement.npz"
    np.savez(path, weights=np.ones(3))
    with pytest.raises(PlacementError, match="truncated or not"):
        Placement.load(path)
    np.savez(path, header=np.array([{}], dtype=object))
    with pytest.raises(PlacementError, match="truncated or not"):
        Placement.load(path)


def test_the_shape_must_be_the_models(tmp_path: Path) -> None:
    """A placement of another model or number of ranks names both shapes."""
    path = tmp_path / "placement.npz"
    PLACEMENT.save(path)
    with pytest.raises(PlacementError, match=r"\(2, 6, 4, 3\), the model needs \(1, 4, 4, 2\)"):
        Placement.load(path, like=Placement.initial(1, 4, 4, 2))


def test_missing_file_and_folder(tmp_path: Path) -> None:
    """A path that cannot be read or written is a placement error that names it."""
    with pytest.raises(PlacementError, match="cannot read"):
        Placement.load(tmp_path / "none.json")
    with pytest.raises(PlacementError, match="cannot write"):
        PLACEMENT.save(tmp_path / "none" / "placement.json")


@pytest.mark.parametrize("name", ["placement.txt", "placement", "placement.npz.bak"])
def test_other_suffixes_are_refused(tmp_path: Path, name: str) -> None:
    """The suffix chooses the format, so an unknown one is an error, for saving and loading."""
    with pytest.raises(PlacementError, match=r"must end in \.json or \.npz"):
        PLACEMENT.save(tmp_path / name)
    with pytest.raises(PlacementError, match=r"must end in \.json or \.npz"):
        Placement.load(tmp_path / name)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the disk fails before the rename, the old file stands whole and nothing is left beside it."""
    path = tmp_path / "placement.json"
    PLACEMENT.save(path)

    def broken(handle: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "fsync", broken)
    with pytest.raises(PlacementError, match="disk full"):
        Placement.initial(1, 2, 2, 1).save(path)
    monkeypatch.undo()
    assert Placement.load(path) == PLACEMENT
    assert os.listdir(tmp_path) == [path.name]


def test_the_content_is_on_the_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order is write, flush to the disk, rename: a crash never leaves a short file under the name."""
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(files.os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd))[1])
    monkeypatch.setattr(files.os, "replace", lambda a, b: (calls.append("replace"), replace(a, b))[1])
    PLACEMENT.save(tmp_path / "placement.json")
    assert calls[:2] == ["fsync", "replace"]


def test_a_bare_map_needs_a_model(tmp_path: Path) -> None:
    """SGLang's JSON says no sizes: they come from the model, and the map must fit it."""
    placement = Placement.initial(2, 4, 6, 2)
    files.save_bare_map(placement, tmp_path / "bare.json")
    assert Placement.load(tmp_path / "bare.json", like=placement) == placement
    with pytest.raises(PlacementError, match="says no sizes"):
        Placement.load(tmp_path / "bare.json")
    with pytest.raises(PlacementError, match="holds expert 3"):
        Placement.load(tmp_path / "bare.json", like=Placement.initial(2, 3, 6, 2))
    with pytest.raises(PlacementError, match="the model needs"):
        Placement.load(tmp_path / "bare.json", like=Placement.initial(1, 4, 6, 2))
