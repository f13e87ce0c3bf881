"""The examples of the docs run as they are printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("example", ["embed.py", "adapter.py"])
def test_example(example: str) -> None:
    """Under torchrun an example commits at least one epoch on every rank, and no token reaches another expert."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command = [*launch, "--nproc-per-node", "2", f"examples/{example}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as ranks:
        try:
            output, _ = ranks.communicate(timeout=100)
        finally:
            if ranks.poll() is None:
                ranks.terminate()  # torchrun then ends the ranks, which are in process groups of their own
                ranks.wait(timeout=30)
    assert ranks.returncode == 0, output
    committed = re.findall(r"rank \d: \{'COMMITTED': (\d+)", output)
    assert len(committed) == 2, output
    assert all(int(count) >= 1 for count in committed), output
