"""Recorded runs: the traces of all ranks, read from their files and made comparable."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from eplb_fsm.errors import ConfigError
from eplb_fsm.observe.trace import SCHEMA_VERSION

_PATTERN = "rank*.ndjson"


class Recorded(NamedTuple):
    """One event, as it stands in its file.

    Attributes:
        line: Its line, from 1.
    """

    action: str
    step: int
    words: Mapping[str, Any]
    line: int

    @property
    def detail(self) -> Mapping[str, Any]:
        """What the action was about."""
        detail: Mapping[str, Any] = self.words["detail"]
        return detail


class RecordedRun(NamedTuple):
    """What all ranks of one run recorded.

    Attributes:
        name: The folder of its files.
        files: By rank.
        events: By rank, each in the order in which they were recorded.
        is_cut: By rank: whether the trace has no last line, because its rank was killed.
    """

    name: str
    files: tuple[Path, ...]
    events: tuple[tuple[Recorded, ...], ...]
    is_cut: tuple[bool, ...]

    @property
    def num_events(self) -> int:
        """Events of all ranks."""
        return sum(map(len, self.events))


def find_runs(paths: Iterable[Path]) -> list[list[Path]]:
    """Return the trace files of each run: the files of one folder are one run.

    Args:
        paths: Trace files, and folders with trace files in or below them.

    Raises:
        ConfigError: There is none.
    """
    folders: dict[Path, set[Path]] = {}
    for path in paths:
        files = [path] if path.is_file() else sorted(path.rglob(_PATTERN))
        if not files:
            raise ConfigError(f"{path} has no trace: name a file or a folder that `--trace` wrote")
        for file in files:
            folders.setdefault(file.parent, set()).add(file)
    return [sorted(files) for _, files in sorted(folders.items())]


def read_run(files: Sequence[Path]) -> RecordedRun:
    """Read the traces of one run.

    Raises:
        ConfigError: A file is no trace of this version, or not whole, or a rank of the run is missing.
    """
    read = {rank: (file, events, is_cut) for rank, file, events, is_cut in map(_read_file, files)}
    name = str(files[0].parent)
    if len(read) < len(files):
        raise ConfigError(f"{name} has two traces of one rank: keep the runs in folders of their own")
    expected = max((_num_ranks(events) for _, events, _ in read.values()), default=0)
    missing = sorted(set(range(expected)) - read.keys())
    if missing:
        raise ConfigError(f"{name} has no trace of ranks {missing}: the votes of all ranks are needed to check any")
    ordered = [read[rank] for rank in sorted(read)]
    return RecordedRun(
        name,
        tuple(file for file, _, _ in ordered),
        tuple(tuple(events) for _, events, _ in ordered),
        tuple(is_cut for _, _, is_cut in ordered),
    )


def _num_ranks(events: Sequence[Recorded]) -> int:
    return int(events[0].detail["num_ranks"]) if events and events[0].action == "Init" else 0


def _read_file(file: Path) -> tuple[int, Path, list[Recorded], bool]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    lines = text.splitlines()
    if text and not text.endswith("\n"):
        lines.pop()  # it was being written when the rank was killed
    parsed = [_parse(file, number, line) for number, line in enumerate(lines, 1)]
    head = parsed[0] if parsed else {}
    if head.get("trace") != "eplb_fsm" or head.get("schema") != SCHEMA_VERSION:
        raise ConfigError(f"{file} is no trace of schema {SCHEMA_VERSION}: its first line says {head or 'nothing'}")
    is_cut = "end" not in parsed[-1]
    events = [_event(file, number, words) for number, words in enumerate(parsed[1 : None if is_cut else -1], 2)]
    _check_numbers(file, events, None if is_cut else parsed[-1]["end"])
    return int(head["rank"]), file, events, is_cut


def _parse(file: Path, number: int, line: str) -> dict[str, Any]:
    try:
        words = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{file}, line {number} is not JSON: {error}") from error
    if not isinstance(words, dict):
        raise ConfigError(f"{file}, line {number} is no JSON object")
    return words


def _event(file: Path, number: int, words: dict[str, Any]) -> Recorded:
    try:
        return Recorded(words["action"], words["step_idx"], words, number)
    except KeyError as error:
        raise ConfigError(f"{file}, line {number} is no event: it has no {error}") from error


def _check_numbers(file: Path, events: Sequence[Recorded], end: int | None) -> None:
    """Events are numbered without gaps, and the last line counts them."""
    for expected, event in enumerate(events, 1):
        if event.words.get("seq") != expected:
            raise ConfigError(
                f"{file}, line {event.line} has event {event.words.get('seq')} where event {expected} should stand: "
                "lines are missing, doubled or out of order"
            )
    if end is not None and end != len(events):
        raise ConfigError(f"{file} says that it has {end} events and has {len(events)}: lines are missing")
