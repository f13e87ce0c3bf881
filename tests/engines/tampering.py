"""Damage done to one rank of a demo in its async run; spawned ranks import it by name."""

from __future__ import annotations

import json

from eplb_fsm.engines.reference.model import WEIGHTS, ParallelModel

DAMAGED_STEP = 5
"""Before the first epoch, whose commits write the maps anew."""
_LAYER = 1


def _busiest_experts() -> list[int]:
    """The two experts of the damaged layer that get the most tokens of the demo's first domain."""
    facts = json.loads((WEIGHTS / "training.json").read_text(encoding="utf-8"))
    return [int(expert) for expert in facts["top_4_experts_per_layer"]["code"][_LAYER][:2]]


def one_wrong_map_entry(run: str, rank: int, steps: int, model: ParallelModel) -> None:
    """Send the busiest expert's tokens to the slot of another one, on one rank."""
    maps = model.experts[_LAYER].maps
    if run == "async" and rank == 0 and steps == DAMAGED_STEP and maps is not None:
        first, second = _busiest_experts()
        maps.logical_to_physical_map[_LAYER, first, 0] = int(maps.logical_to_physical_map[_LAYER, second, 0])


def one_swapped_row(run: str, rank: int, steps: int, model: ParallelModel) -> None:
    """Swap one weight row of the busiest expert with the same row of its neighbour, on the rank that holds it."""
    if run != "async" or steps != DAMAGED_STEP:
        return
    held = model.placement.physical_to_logical_map[_LAYER].tolist()
    slot = held.index(_busiest_experts()[0])
    experts = model.experts[_LAYER]
    if slot // experts.num_local == rank:
        local = slot % experts.num_local
        other = (local + 1) % experts.num_local
        experts.down_proj[[local, other], 0] = experts.down_proj[[other, local], 0]
