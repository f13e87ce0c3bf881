"""The NDJSON trace: one line for each event, one file for each rank.

The first line says what the file is, the last one how many events there were: a file without it was cut off, because
its rank was killed. Lines reach the operating system one by one, so nothing that a killed rank did is missing.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from eplb_fsm.errors import ConfigError
from eplb_fsm.observe.events import Event

SCHEMA_VERSION = 4


class NdjsonTrace:
    """Writes the events of one rank as JSON lines; decode thread, each write a system call of some microseconds.

    Args:
        folder: Made if it is not there; the file is ``rank<r>.ndjson`` in it and replaces an older one.
        rank: The rank whose events these are.

    Raises:
        ConfigError: If the file cannot be made.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.path = folder / f"rank{rank}.ndjson"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("w", encoding="utf-8", buffering=1)
        except OSError as error:
            raise ConfigError(f"the trace folder {str(folder)!r} cannot be written: {error}; name another") from error
        self._num_events = 0
        self._write({"trace": "eplb_fsm", "schema": SCHEMA_VERSION, "rank": rank})

    def on_event(self, event: Event) -> None:
        """Write one line."""
        self._num_events += 1
        self._write(asdict(event))

    def close(self) -> None:
        """Write the last line."""
        self._write({"end": self._num_events})
        self._file.close()

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line, separators=(",", ":")) + "\n")
