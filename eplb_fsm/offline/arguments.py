"""The options of `eplb-fsm plan` and `eplb-fsm compare`; imports nothing heavy, so that `--help` stays quick."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `eplb-fsm plan`."""
    _add_common(parser)
    add = parser.add_argument
    add("--eplb-algorithm", default="deepseek_refined", metavar="NAME", help="policy (default %(default)s)")
    add(
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help="placement to write: .json for SGLang's --init-expert-location and this library, .npz with a digest",
    )


def add_compare_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `eplb-fsm compare`."""
    _add_common(parser)
    add = parser.add_argument
    add(
        "--eplb-algorithms",
        metavar="A,B",
        help="policies (default: all, but for deepseek_refined, which is slow, and deepseek_hierarchical)",
    )
    add(
        "--replica-split",
        choices=("equal", "weighted"),
        default="equal",
        help="how tokens are divided among replicas, by all policies (default %(default)s)",
    )
    add("--window-size", type=int, default=1, metavar="N", help="recorded windows to a plan (default %(default)s)")
    add("--plot", type=Path, metavar="FILE", help="balance against moves, one point a policy (.svg, .png or .pdf)")
    add("--quiet", action="store_true", help="no progress")


def _add_common(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("loads", type=Path, metavar="LOADS", help="recorded loads: .npz, .npy, .pt (SGLang's recorder), .json or .csv")
    add("--ranks", type=int, required=True, metavar="N", help="ranks of the expert-parallel group")
    add("--ep-num-redundant-experts", type=int, default=0, metavar="N", help="slots beyond one for each expert")
    add("--num-nodes", type=int, default=1, metavar="N", help="nodes of the ranks (default %(default)s)")
    add("--num-groups", type=int, default=1, metavar="N", help="expert groups of the router (default %(default)s)")
    add(
        "--rank-speeds",
        metavar="S,S",
        help="tokens that each rank works off in the time in which others work off one; 0: it is to hold no expert "
        "(default: all ranks are alike)",
    )
    add("--init-expert-location", type=Path, metavar="FILE", help="the placement to start from")
    add("--target-balancedness", type=float, metavar="X", help="when movement_aware leaves a layer as it is")
    add("--expert-bytes", type=int, metavar="N", help="bytes of one expert of one layer: moves are shown in bytes, too")
    add("--json", type=Path, metavar="FILE", help="write all figures")
