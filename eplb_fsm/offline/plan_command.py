"""`eplb-fsm plan`: from recorded loads to a placement file."""

from __future__ import annotations

import argparse
from typing import Any

from eplb_fsm.errors import ConfigError
from eplb_fsm.observe.table import render
from eplb_fsm.offline.problem import Problem, read_problem
from eplb_fsm.placement.balancedness import FORMULAS, balancedness, balancedness_summary
from eplb_fsm.placement.files import save_bare_map, save_placement
from eplb_fsm.placement.moves import num_cross_node_moves, num_peer_moves
from eplb_fsm.placement.placement import Placement
from eplb_fsm.placement.policies import get_policy, minds_speeds
from eplb_fsm.placement.validate import EMPTY, Float64Array

_SUFFIXES = (".json", ".npz")


def run_plan(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Plan for the sum of all recorded windows and write the placement; blocks, for seconds with large models.

    Args:
        args: Of :func:`~eplb_fsm.offline.arguments.add_plan_arguments`.

    Returns:
        All figures, and the text to print.

    Raises:
        EplbError: Input that cannot be; nothing was written.
    """
    if args.output.suffix not in _SUFFIXES:
        raise ConfigError(f"--output {args.output}: must end in {' or '.join(_SUFFIXES)}")
    problem = read_problem(args)
    policy = get_policy(args.eplb_algorithm, problem.target_balancedness)
    if problem.topology.has_speeds and not minds_speeds(policy):
        raise ConfigError(f"--rank-speeds: policy {args.eplb_algorithm!r} treats all ranks alike; choose another one")
    load = problem.windows.sum(axis=0)
    planned = policy.plan(load, problem.start, problem.topology)
    is_bare = args.output.suffix == ".json"
    if is_bare and (planned.physical_to_logical_map == EMPTY).any():
        raise ConfigError(
            f"--output {args.output}: the placement has empty slots, which SGLang would take for the last expert; "
            "write .npz, or give every rank a speed above 0"
        )
    save = save_bare_map if is_bare else save_placement
    save(planned, args.output)
    figures = _figures(problem, load, planned, args)
    return figures, _text(figures, args)


def _figures(problem: Problem, load: Float64Array, planned: Placement, args: argparse.Namespace) -> dict[str, Any]:
    speeds = problem.topology.counted_speeds
    balance = {
        name: {formula: balancedness_summary(load, placement, formula, speeds) for formula in FORMULAS}
        for name, placement in (("before", problem.start), ("after", planned))
    }
    layers = balancedness(load, planned, speeds)
    moves = num_peer_moves(problem.start, planned)
    return {
        "policy": args.eplb_algorithm,
        "windows": len(problem.windows),
        "layers": planned.num_moe_layers,
        "logical_experts": planned.num_logical_experts,
        "physical_experts": planned.num_physical_experts,
        "ranks": planned.num_ranks,
        "balancedness": balance,
        "worst_layer": int(layers.argmin()),
        "layers_without_load": int((~load.any(axis=1)).sum()),
        "peer_moves": moves,
        "cross_node_moves": num_cross_node_moves(problem.start, planned, problem.topology.num_nodes),
        "moved_bytes": None if args.expert_bytes is None else moves * args.expert_bytes,
        "output": str(args.output),
    }


def _text(figures: dict[str, Any], args: argparse.Namespace) -> str:
    balance = figures["balancedness"]
    before = "before" if args.init_expert_location else "before (trivial)"
    rows = [["balancedness", before, "after"]]
    names = {"mean": "mean of the layers", "min": "worst layer", "vllm": "vLLM's formula", "sglang": "SGLang's formula"}
    for formula in FORMULAS:
        rows.append([names[formula], *(f"{balance[when][formula]:.4f}" for when in ("before", "after"))])
    nodes = f", {figures['cross_node_moves']} of them from another node" if args.num_nodes > 1 else ""
    size = "" if figures["moved_bytes"] is None else f", {figures['moved_bytes'] / 1e9:.1f} GB"
    slots = figures["layers"] * figures["physical_experts"]
    idle = figures["layers_without_load"]
    lines = [
        f"{figures['layers']} layers, {figures['logical_experts']} experts in {figures['physical_experts']} slots on "
        f"{figures['ranks']} ranks; {figures['windows']} recorded windows; policy {figures['policy']}",
        "",
        render(rows),
        "",
        f"experts that come from another rank: {figures['peer_moves']} of {slots} slots{size}{nodes}",
        *([f"layers without any load, left as they were: {idle}"] if idle else []),
        f"written: {figures['output']}",
    ]
    return "\n".join(lines)
