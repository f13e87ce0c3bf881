"""The NDJSON trace: one line for each event, one file for each rank."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from eplb_fsm.errors import ConfigError
from eplb_fsm.observe.events import Event

SCHEMA_VERSION = 1


class NdjsonTrace:
    """Writes events as JSON lines; the first line says what the file is.

    Lines are buffered, so a write is a memory copy for most events; :meth:`close` writes the rest.

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
            self._file = self.path.open("w", encoding="utf-8", buffering=1 << 20)
        except OSError as error:
            raise ConfigError(f"the trace folder {str(folder)!r} cannot be written: {error}; name another") from error
        self._write({"trace": "eplb_fsm", "schema": SCHEMA_VERSION, "rank": rank})

    def on_event(self, event: Event) -> None:
        """Write one line."""
        self._write(asdict(event))

    def close(self) -> None:
        """Write what is buffered."""
        self._file.close()

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line, separators=(",", ":")) + "\n")
