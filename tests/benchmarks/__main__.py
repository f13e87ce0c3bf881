"""Runs every benchmark with its defaults, one after the other: ``make bench``."""

from __future__ import annotations

import subprocess
import sys

BENCHMARKS = ("idle_step", "pause", "itl", "identity", "placement", "split", "nodes", "estimate")


def main() -> None:
    """Run them; arguments choose some by name."""
    for name in sys.argv[1:] or BENCHMARKS:
        print(f"== {name}", flush=True)
        subprocess.run([sys.executable, "-m", f"tests.benchmarks.{name}"], check=True)


if __name__ == "__main__":
    main()
