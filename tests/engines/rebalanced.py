"""A decode loop with a real FSM, for the ranks of the engine tests."""

from __future__ import annotations

from typing import Any

from eplb_fsm.config import RebalanceConfig
from eplb_fsm.engines.reference.loop import DecodeLoop
from eplb_fsm.engines.reference.model import ParallelModel, load_model
from eplb_fsm.engines.reference.ranks import RankContext
from eplb_fsm.engines.reference.requests import SlotRequests, Workload
from eplb_fsm.engines.reference.timeline import Timeline
from eplb_fsm.fsm import RebalanceFSM
from eplb_fsm.placement.placement import Placement
from eplb_fsm.runtime.bank import Bank
from tests.engines.workers import EXPERTS, decode


def decode_rebalanced(
    context: RankContext, placement: Placement, workload: Workload, slots: int, steps: int, options: dict[str, Any]
) -> tuple[Timeline, Any, tuple[Placement, ...]]:
    """Decode with a real FSM; return the timeline, its health at the end, and the placements it ended with."""
    model = ParallelModel(load_model(), placement, slots, workload.max_length)
    config = RebalanceConfig(num_redundant_experts=placement.num_redundant_experts, **options)
    bank = Bank("model", EXPERTS, placement.num_physical_experts, model.expert_tensors)
    fsm = RebalanceFSM.connect(
        context.store, context.rank, context.world_size, [bank], [placement], config, name=f"eplb-{config.mode}"
    )
    with fsm:
        maps = fsm.maps()
        model.bind_maps(maps.logical_to_physical_map, maps.logical_replica_count)
        requests = SlotRequests(workload, context.rank, slots)
        loop = DecodeLoop(
            model, requests, steps, rebalancer=fsm, state=lambda: fsm.state.value, lost_peers=fsm.lost_peers
        )
        fsm.arm()
        timeline = loop.run()
        return timeline, fsm.health(), fsm.placements


def decode_plain_and_rebalanced(
    context: RankContext, placement: Placement, workload: Workload, slots: int, steps: int, options: dict[str, Any]
) -> list[tuple[Timeline, Any, Any]]:
    """Decode without a rebalancer, then in async and in sync mode; return the three runs."""
    runs: list[tuple[Timeline, Any, Any]] = [(decode(context, placement, workload, slots, steps)[0], None, None)]
    for mode in ("async", "sync"):
        settings = {**options, "mode": mode}
        runs.append(decode_rebalanced(context, placement, workload, slots, steps, settings))
    return runs
