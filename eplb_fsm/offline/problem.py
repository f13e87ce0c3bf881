"""What both commands start from: a recording, a topology, and the placement that is there."""

from __future__ import annotations

import argparse
from typing import NamedTuple

from eplb_fsm.config import DEFAULT_TARGET_BALANCEDNESS
from eplb_fsm.errors import ConfigError
from eplb_fsm.offline.recording import read_recording
from eplb_fsm.placement.placement import Placement
from eplb_fsm.placement.topology import Topology
from eplb_fsm.placement.validate import Float64Array


class Problem(NamedTuple):
    """Recorded loads and where they are to be served.

    Attributes:
        windows: (windows, layers, experts) float64 recorded loads.
        topology: The ranks.
        start: The placement of `--init-expert-location`, or the one of an engine that has not rebalanced.
        is_given: Whether it was given.
        target_balancedness: For policies that know the word.
    """

    windows: Float64Array
    topology: Topology
    start: Placement
    is_given: bool
    target_balancedness: float


def read_problem(args: argparse.Namespace) -> Problem:
    """Read the files that the arguments name.

    Raises:
        LoadError: Of the recording.
        PlacementError: Of the placement to start from, or of slots that do not fit.
        ConfigError: Of the numbers.
    """
    for name in ("ranks", "ep_num_redundant_experts", "expert_bytes"):
        value = getattr(args, name)
        if value is not None and value < (0 if name == "ep_num_redundant_experts" else 1):
            raise ConfigError(f"--{name.replace('_', '-')} {value}: give a larger number")
    topology = Topology(args.ranks, args.num_nodes, args.num_groups, speeds=_speeds(args.rank_speeds))
    windows = read_recording(args.loads)
    _, layers, experts = windows.shape
    start = Placement.initial(layers, experts, experts + args.ep_num_redundant_experts, args.ranks)
    given = args.init_expert_location
    if given is not None:
        start = Placement.load(given, like=start)
    target = args.target_balancedness
    return Problem(
        windows, topology, start, given is not None, DEFAULT_TARGET_BALANCEDNESS if target is None else target
    )


def _speeds(text: str | None) -> tuple[float, ...]:
    try:
        return () if text is None else tuple(float(speed) for speed in text.split(","))
    except ValueError:
        raise ConfigError(f"--rank-speeds {text}: give one number for each rank, with commas between") from None
