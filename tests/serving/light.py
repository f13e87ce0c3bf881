"""Parts of an engine without the engine: its own files of one folder, over stand-ins for the rest.

A server's packages take gigabytes. But the modules that rebalance experts import little else, so that they run, as they
are in the wheel, in processes that have torch only: the packages above them are made without running what is in their
``__init__``, and the few other modules that they import are replaced by what the test sets up.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "build" / "engines"
"""Where ``make build/engines/.ready`` unpacks the engines' Python files."""


def sources_of(engine: str, version: str) -> Path:
    """Return the folder with an engine's sources; skips the test where they are not there."""
    folder = SOURCES / f"{engine}-{version}"
    if not folder.is_dir():
        reason = f"the sources of {engine} {version} are not there: make build/engines/.ready"
        if os.environ.get("REQUIRE_ENGINE_SOURCES"):
            pytest.fail(reason)
        pytest.skip(reason)
    return folder


def make_packages(root: Path, names: Iterable[str]) -> None:
    """Make packages whose modules are found below `root`, and whose ``__init__`` is not run."""
    for name in names:
        stand_in(name).__path__ = [str(root.joinpath(*name.split(".")))]


def stand_in(name: str, **contents: Any) -> ModuleType:
    """Put a module of these contents in the place of an engine's own."""
    module = ModuleType(name)
    module.__dict__.update(contents)
    sys.modules[name] = module
    parent, _, last = name.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], last, module)
    return module
