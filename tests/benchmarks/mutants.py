"""How many generated runs it takes to find each mutant, over many seeds: the table of `docs/explanation/mutants.md`.

python -m tests.benchmarks.mutants --seeds 20
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/explanation/mutants.md"
sys.path.insert(0, str(ROOT / "tests/properties/protocol"))  # where pytest finds them, too

from hunt import hunt  # noqa: E402
from mutants import MUTANTS, Mutant  # noqa: E402

_TABLE = re.compile(r"(<!-- measured -->\n).*?(<!-- end measured -->)", re.DOTALL)
_HEADER = ("mutant", "what is wrong", "public report", "violates in the spec", "runs until found: median", "maximum")


def spec_checks() -> dict[str, tuple[str, str]]:
    """The property that each mutant of the spec violates, and the public reports behind it."""
    checks = json.loads((ROOT / "spec/manifest.json").read_text(encoding="utf-8"))
    found = {}
    for check in checks:
        folder, _, name = check["name"].partition("/")
        if folder == "mutants":
            reports = re.findall(r"\(([^()]+)\)", check["why"].replace("step()", "step"))
            found[name] = check["property"], ", ".join(reports)
    return found


def measure(mutant: Mutant, num_seeds: int, max_runs: int) -> list[int | None]:
    """Runs until it is found, for each seed; None where it is not."""
    return [hunt(mutant, max_runs, with_seed) for with_seed in range(num_seeds)]


def rows(names: Sequence[str], num_seeds: int, max_runs: int) -> Iterator[tuple[str, ...]]:
    """A row of the table for each mutant."""
    checks = spec_checks()
    for mutant in (mutant for mutant in MUTANTS if mutant.name in names):
        num_runs = measure(mutant, num_seeds, max_runs)
        missed = num_runs.count(None)
        known = [number or max_runs for number in num_runs]
        longest = f"{max(known)}" if not missed else f"{missed} of {num_seeds} not within {max_runs}"
        spec_property, reports = checks.get(mutant.name, ("", ""))
        violates = f"`{spec_property}`" if spec_property else "not in the spec"
        row = (f"`{mutant.name}`", mutant.is_wrong_how, reports, violates, f"{statistics.median(known):g}", longest)
        print(*row, sep=" | ", flush=True)
        yield row


def main() -> None:
    """Measure, print, and write the page if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--max-runs", type=int, default=1000, help="after so many a seed is given up")
    parser.add_argument("--only", nargs="*", default=[mutant.name for mutant in MUTANTS], help="names of mutants")
    parser.add_argument("--write", action="store_true", help="put the table into the page")
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = [_HEADER, ("---",) * len(_HEADER), *rows(args.only, args.seeds, args.max_runs)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    if args.write:
        text = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(_TABLE.sub(lambda match: f"{match[1]}{table}\n{match[2]}", text), encoding="utf-8")


if __name__ == "__main__":
    main()
