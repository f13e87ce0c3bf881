"""The options of `eplb-fsm simulate`; imports nothing heavy, so that `--help` stays quick."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add = parser.add_argument
    add("--seeds", type=seed_range, default=range(1000), metavar="A:B", help="seeds from A up to B (default 0:1000)")
    add("--ranks", type=int, default=3, metavar="N", help="ranks of every run, from 2 (default %(default)s)")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--lockstep", action="store_const", const=True, dest="is_lockstep", help="only lockstep ranks")
    group.add_argument("--free", action="store_const", const=False, dest="is_lockstep", help="only free ones")
    add("--jobs", type=int, metavar="N", help="processes (default: one for each core)")
    add("--json", type=Path, metavar="FILE", help="write all figures")
    add("--trace", type=Path, metavar="DIR", help="write the NDJSON trace of every rank, in a folder for each seed")
    add("--verbose", action="store_true", help="print every event of every run, and every combination not seen")
    add("--quiet", action="store_true", help="no progress")


def seed_range(text: str) -> range:
    """Return the seeds of ``A:B``; argparse makes an error message of the exception."""
    first, _, end = text.partition(":")
    seeds = range(int(first), int(end))
    if not seeds:
        raise ValueError
    return seeds


seed_range.__name__ = "range A:B of seeds"
