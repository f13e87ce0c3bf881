"""The smallest engine that embeds `RebalanceFSM`: experts that only know their own number.

    torchrun --nproc-per-node 2 examples/embed.py

Each expert's weights are filled with its number. A forward pass draws skewed routing, gathers what every rank holds in
the slots that the live maps name, and checks that it reached the experts it asked for.
"""

import os
from collections.abc import Iterator

import torch
import torch.distributed as dist

from eplb_fsm import Bank, Placement, RebalanceConfig, RebalanceFSM
from eplb_fsm.runtime.maps import BankMaps

NUM_LAYERS, NUM_LOGICAL, NUM_PHYSICAL, NUM_STEPS = 3, 8, 12, 400


class ToyEngine:
    """Holds one rank's experts and runs forward passes of drawn tokens."""

    def __init__(self, placement: Placement, rank: int) -> None:
        self.draw = torch.Generator().manual_seed(rank)
        self.num_local = placement.num_local_physical_experts
        first = rank * self.num_local
        held = torch.tensor(placement.physical_to_logical_map[:, first : first + self.num_local])
        self.experts = [
            {"weight": row.float().repeat_interleave(64).view(-1, 8, 8), "scale": row.float()} for row in held
        ]

    def forward_layers(self, maps: BankMaps, step: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Run a pass; yield what each layer routed: expert ids of shape (tokens, top_k)."""
        hot = 4 if step < NUM_STEPS // 2 else 6  # the text changes its domain half-way
        for layer, experts in enumerate(self.experts):
            skew = torch.ones(NUM_LOGICAL).index_fill_(0, torch.tensor([hot, hot + 1]), 12.0)
            topk_ids = torch.multinomial(skew.repeat(16, 1), 2, generator=self.draw)
            slots = maps.logical_to_physical_map[layer, topk_ids, 0]
            for tensor in experts.values():
                everywhere = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
                dist.all_gather(everywhere, tensor)  # stands for the all-to-all of a real engine
                reached = torch.cat(everywhere).view(len(maps.physical_to_logical_map[0]), -1)[slots, 0]
                assert torch.equal(reached.long(), topk_ids), f"step {step}: a token reached another expert"
            yield layer, topk_ids


def serve(store: dist.Store, rank: int, world_size: int) -> None:
    """Decode, and rebalance meanwhile."""
    # --8<-- [start:embedding]
    placement = Placement.initial(NUM_LAYERS, NUM_LOGICAL, NUM_PHYSICAL, world_size)
    engine = ToyEngine(placement, rank)
    # All tensors of an expert, for each MoE layer: name -> (num_local_physical_experts, ...), the engine's own.
    bank = Bank("target", NUM_LOGICAL, NUM_PHYSICAL, tensors=engine.experts)
    config = RebalanceConfig(num_redundant_experts=4, step_interval=50, window_size=50, idle_round_interval=5)
    with RebalanceFSM.connect(store, rank, world_size, [bank], [placement], config) as fsm:
        maps = fsm.maps()  # tensors that a commit writes in place; every forward pass reads them
        fsm.arm()  # after warm-up and graph capture: the agreed step 0
        for step in range(NUM_STEPS):
            for layer, topk_ids in engine.forward_layers(maps, step):
                fsm.record(layer, topk_ids)
            fsm.step()
        health = fsm.health()
    # --8<-- [end:embedding]
    print(f"rank {rank}: {dict(health.num_outcomes)}, every token reached its expert")


def main() -> None:
    """Join the ranks that torchrun started."""
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False
    )
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", store=dist.PrefixStore("engine", store), rank=rank, world_size=world_size)
    serve(dist.PrefixStore("run", store), rank, world_size)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
