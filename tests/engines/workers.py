"""What the ranks of the engine tests run; spawned processes import it by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from eplb_fsm.engines.reference.loop import DecodeLoop
from eplb_fsm.engines.reference.model import WEIGHTS, ParallelModel, load_model
from eplb_fsm.engines.reference.ranks import RankContext
from eplb_fsm.engines.reference.requests import SlotRequests, Workload
from eplb_fsm.engines.reference.timeline import Timeline
from eplb_fsm.placement.placement import Placement

LAYERS, EXPERTS = 4, 32


def random_placement(seed: int, num_ranks: int, num_physical: int) -> Placement:
    """Every expert at least once, the rest of the slots drawn, all in any order; of its first layer, one empty."""
    draw = np.random.default_rng(seed)
    rows = []
    for layer in range(LAYERS):
        extra = draw.integers(0, EXPERTS, num_physical - EXPERTS)
        if layer == 0 and len(extra):
            extra[0] = -1
        rows.append(draw.permutation(np.concatenate([np.arange(EXPERTS), extra])))
    return Placement(np.stack(rows), EXPERTS, num_ranks)


class Corruption:
    """A rebalancer that makes one mistake after a given pass: `map`, `row`, or nothing."""

    def __init__(self, model: ParallelModel, kind: str, step: int) -> None:
        self._model, self._kind, self._step = model, kind, step
        self.recorded = torch.zeros(LAYERS, EXPERTS, dtype=torch.int64)

    def record(self, layer: int, topk_ids: torch.Tensor, *, prefill: torch.Tensor) -> None:
        """Count, so that the sum can be compared with the tokens that were decoded."""
        assert len(prefill) == len(topk_ids)
        self.recorded[layer] += torch.bincount(topk_ids.flatten(), minlength=EXPERTS)

    def step(self, pass_id: int | None = None) -> None:
        """After pass `step`, swap one expert's map entry with another's, or two weight rows."""
        if pass_id != self._step or self._model.rank != 0:
            return
        experts = self._model.experts[1]
        busy = self.recorded[1].topk(2).indices
        if self._kind == "map":
            assert experts.maps is not None
            table = experts.maps.logical_to_physical_map[1]
            table[busy[0], 0] = int(table[busy[1], 0])
        elif self._kind == "row":
            counts = self._model.placement.physical_to_logical_map[1, : experts.num_local]
            loads = self.recorded[1][torch.from_numpy(np.maximum(counts, 0))]
            first, second = int(loads.argmax()), int(loads.argmin())
            experts.down_proj[[first, second]] = experts.down_proj[[second, first]]


def decode(
    context: RankContext,
    placement: Placement,
    workload: Workload,
    slots: int,
    steps: int,
    corruption: tuple[str, int] | None = None,
    weights: Path = WEIGHTS,
) -> tuple[Timeline, torch.Tensor | None]:
    """Decode; return the timeline and, with a corruption, the load that its `record` was told."""
    model = ParallelModel(load_model(weights), placement, slots, workload.max_length)
    mistake = Corruption(model, *corruption) if corruption is not None else None
    loop = DecodeLoop(model, SlotRequests(workload, context.rank, slots), steps, rebalancer=mistake)
    return loop.run(), None if mistake is None else mistake.recorded


class Words:
    """Piggyback words that say who sent them and when; keeps what arrived."""

    def __init__(self, rank: int) -> None:
        self.rank, self.sent = rank, 0
        self.arrived: list[list[list[int]]] = []

    def outgoing(self) -> torch.Tensor:
        """Return this rank and how often it was asked."""
        self.sent += 1
        return torch.tensor([self.rank, self.sent])

    def deliver(self, gathered: torch.Tensor) -> None:
        """Keep a copy."""
        self.arrived.append(gathered.tolist())


def decode_with_words(context: RankContext, placement: Placement, workload: Workload, steps: int) -> Any:
    """Decode with piggyback words; return all that were delivered to this rank, and the steps made."""
    model = ParallelModel(load_model(), placement, 2, workload.max_length)
    words = Words(context.rank)
    loop = DecodeLoop(model, SlotRequests(workload, context.rank, 2), steps, piggyback=words)
    return words.arrived, loop.run().steps


def decode_given_tokens(context: RankContext, placement: Placement, tokens: torch.Tensor) -> torch.Tensor:
    """Feed given sequences, `(world * slots, length)`, to the ranks; return this rank's logits of all positions."""
    slots = len(tokens) // context.world_size
    mine = tokens[context.rank * slots : (context.rank + 1) * slots]
    model = ParallelModel(load_model(), placement, slots, tokens.shape[1])
    steps = [model.forward(mine[:, i].contiguous(), torch.full((slots,), i)) for i in range(tokens.shape[1])]
    return torch.stack(steps, dim=1).clone()


def decode_cases(context: RankContext, cases: list[tuple[str, tuple[Any, ...]]]) -> list[Any]:
    """Run several of the functions above, by name, in one launch; return their results in order."""
    return [globals()[name](context, *arguments) for name, arguments in cases]
