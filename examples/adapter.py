"""The rebalance in an engine that was not written for it: tables, counters and a recovery of its own.

    torchrun --nproc-per-node 2 examples/adapter.py

`Engine` stands for a serving engine. It knows nothing of this library: it keeps a map of experts, counts tokens per
slot, reloads weights, and can place its experts anew by itself, which blocks. `Adapter` says to the library where all
that is, and `serve` is what an engine's hooks come down to.
"""

import os

import torch
import torch.distributed as dist

from eplb_fsm import Bank, Placement, RebalanceConfig
from eplb_fsm.engines.contract import Meeting
from eplb_fsm.engines.session import Session
from eplb_fsm.load.physical import PhysicalLoadRecorder
from eplb_fsm.runtime.maps import BankMaps, TensorMapWriter
from eplb_fsm.runtime.parts import EngineSide

NUM_LAYERS, NUM_LOGICAL, NUM_PHYSICAL, NUM_PASSES = 3, 8, 12, 300


class Engine:
    """Experts that only know their own number, and all that an engine keeps about them."""

    def __init__(self, rank: int, num_ranks: int) -> None:
        self.rank, self.num_local = rank, NUM_PHYSICAL // num_ranks
        self.generator = torch.Generator().manual_seed(0)  # every rank computes the same tokens
        self.physical_to_logical = torch.arange(NUM_PHYSICAL).remainder(NUM_LOGICAL).repeat(NUM_LAYERS, 1)
        self.logical_to_physical = torch.full((NUM_LAYERS, NUM_LOGICAL, NUM_PHYSICAL - NUM_LOGICAL + 1), -1)
        self.num_replicas = torch.zeros(NUM_LAYERS, NUM_LOGICAL, dtype=torch.int64)
        self.counts = torch.zeros(NUM_LAYERS, NUM_PHYSICAL, dtype=torch.int32)
        self.weights = [torch.empty(self.num_local, 8, 8) for _ in range(NUM_LAYERS)]
        self.factor = 1.0
        self.place(self.physical_to_logical)

    def place(self, physical_to_logical: torch.Tensor) -> None:
        """Its own way to change the map: all at once, weights from disk, and nobody may decode meanwhile."""
        self.physical_to_logical.copy_(physical_to_logical)
        tables = Placement(physical_to_logical.numpy().copy(), NUM_LOGICAL, NUM_PHYSICAL // self.num_local)
        width = self.logical_to_physical.shape[-1]
        self.logical_to_physical.copy_(torch.from_numpy(tables.logical_to_physical(width)))
        self.num_replicas.copy_(torch.from_numpy(tables.logical_replica_count.copy()))
        self.reload(self.factor)

    def reload(self, factor: float) -> None:
        """Load weights anew, by the map: expert e holds the number e times a factor."""
        self.factor = factor
        own = self.physical_to_logical[:, self.rank * self.num_local :][:, : self.num_local]
        for weight, experts in zip(self.weights, own, strict=True):
            weight.copy_(experts[:, None, None] * factor)

    def forward(self, hot: int) -> None:
        """A pass: route, count, compute what is local, add up, and check that each token found its expert."""
        for layer, weight in enumerate(self.weights):
            skew = torch.ones(NUM_LOGICAL).index_fill_(0, torch.tensor([hot, hot + 1]), 12.0)
            experts = torch.multinomial(skew, 32, replacement=True, generator=self.generator)
            replica = torch.arange(32) % self.num_replicas[layer, experts]
            slots = self.logical_to_physical[layer, experts, replica]
            self.counts[layer] += torch.bincount(slots, minlength=NUM_PHYSICAL).int()
            local = slots - self.rank * self.num_local
            is_own = (local >= 0) & (local < self.num_local)
            output = torch.where(is_own, weight[local.clamp(0, self.num_local - 1), 0, 0], 0.0)
            dist.all_reduce(output)
            assert torch.equal(output, experts * self.factor), "a token reached another expert"


# --8<-- [start:adapter]
class Adapter:
    """An `EngineContract`: what the library has to know of `Engine`, read anew at every connection."""

    def __init__(self, engine: Engine, store: dist.Store) -> None:
        self.engine, self.store = engine, store

    def meeting(self) -> Meeting:
        """Where the ranks find each other: the store that the engine's process group was made with will do."""
        return Meeting(self.store, self.engine.rank, dist.get_world_size(), "eplb")

    def side(self) -> EngineSide:
        """Rows, tables and counters, as they are now."""
        engine = self.engine
        placement = Placement(engine.physical_to_logical.numpy().copy(), NUM_LOGICAL, dist.get_world_size())
        bank = Bank("model", NUM_LOGICAL, NUM_PHYSICAL, [{"weight": weight} for weight in engine.weights])
        load = PhysicalLoadRecorder([placement])
        self.take_counts = load.taker(0, engine.counts)
        tables = BankMaps(engine.physical_to_logical, engine.logical_to_physical, engine.num_replicas)
        writer = TensorMapWriter([placement], maps=[tables], load=load)
        return EngineSide(banks=[bank], placements=[placement], load_source=load, map_writer=writer)

    def probe(self, bank: int):
        """The engine's own kernel on one slot, so that the start finds a tensor that would stay behind."""
        return lambda layer, local_slot: self.engine.weights[layer][local_slot] @ torch.ones(8)


def serve(engine: Engine, store: dist.Store) -> Session:
    """What an engine's hooks call, and when."""
    config = RebalanceConfig(num_redundant_experts=4, step_interval=40, window_size=40, idle_round_interval=4)
    adapter = Adapter(engine, store)
    session = Session(adapter, config)
    session.start()  # once the model is loaded, on every rank
    for number in range(NUM_PASSES):
        engine.forward(hot=number // 75)
        adapter.take_counts()
        session.step()  # after every pass, also a dummy one
        if number == 120:  # a reload of weights, between two passes, on all ranks
            session.freeze_now("reload")
            engine.reload(factor=2.0)
            session.unfreeze("reload")
        if number == 200:  # a recovery of the engine's own, which writes weights and map itself
            session.abandon("the engine places its experts anew")
            engine.place(engine.physical_to_logical.roll(1, dims=1))
            session.adopt()
    return session


# --8<-- [end:adapter]


def main() -> None:
    """Join the ranks that torchrun started."""
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False
    )
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", store=dist.PrefixStore("engine", store), rank=rank, world_size=world_size)
    session = serve(Engine(rank, world_size), dist.PrefixStore("run", store))
    print(f"rank {rank}: {dict(session.fsm.health().num_outcomes)} since the recovery, every token reached its expert")
    session.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
