"""What tests have shown of each engine: ``@pytest.mark.compatibility`` says it, and a run that passes writes it down.

With ``WRITE_COMPATIBILITY=FILE`` (``make test-engines`` sets it) what passed is merged into that file, from which the
table in the docs is made.
"""

from __future__ import annotations

import json
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

_PASSED: dict[tuple[str, str, str], dict[str, str]] = {}


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker."""
    config.addinivalue_line("markers", "compatibility(engine, version, what, how): what a test shows of an engine")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """Take note of a test that passed."""
    report = yield
    if report.when == "call" and report.passed:
        for mark in item.iter_markers("compatibility"):
            row = dict(mark.kwargs)
            row["test"] = item.nodeid.partition("[")[0].removeprefix("tests/serving/")
            _PASSED[row["engine"], row["what"], row["how"]] = row
    return report


def pytest_sessionfinish() -> None:
    """Merge what passed into the file."""
    if (file := os.environ.get("WRITE_COMPATIBILITY")) and _PASSED:
        path = Path(file)
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        rows = {(row["engine"], row["what"], row["how"]): row for row in known} | _PASSED
        path.write_text(json.dumps([rows[key] for key in sorted(rows)], indent=2) + "\n", encoding="utf-8")
