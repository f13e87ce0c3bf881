"""The decode loop of one rank: one forward pass per step, with or without a rebalancer."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist

from eplb_fsm.engines.reference.collectives import exchange_blocks
from eplb_fsm.engines.reference.model import ParallelModel
from eplb_fsm.engines.reference.requests import SlotRequests
from eplb_fsm.engines.reference.timeline import Timeline
from eplb_fsm.errors import PeerLost

NAME_LOST_PEERS_S = 3.0
"""How long to look for the rank that failed a collective."""


class Rebalancer(Protocol):
    """What the loop needs of a `RebalanceFSM`."""

    def record(self, layer: int, topk_ids: torch.Tensor, *, prefill: torch.Tensor) -> None:
        """Counts the router's choice, int64 `(tokens, top_k)`, and which tokens are of prompts; in the forward pass."""

    def step(self, pass_id: int | None = None) -> Any:
        """Is called after every forward pass, real or dummy, on every rank."""


class Piggyback(Protocol):
    """Words that ride on the collective which the loop makes before every forward pass anyway."""

    def outgoing(self) -> torch.Tensor:
        """Returns this rank's words, int64 `(n,)`, the same n on all ranks and at every step."""

    def deliver(self, gathered: torch.Tensor) -> None:
        """Takes the words of all ranks, int64 `(world_size, n)`."""


class DecodeLoop:
    """Decodes one token of every live sequence per step, in step with the other ranks.

    Args:
        model: This rank's share of the model.
        requests: What this rank decodes.
        most_steps: The loop ends after so many steps, or when no rank has work left.
        rebalancer: Called in and after every forward pass; None decodes on a fixed placement.
        piggyback: Words for the collective of each step.
        state: Returns the rebalancer's state, to be noted after each step.
        lost_peers: Finds out, in the given number of seconds, which ranks are gone; asked when a collective of
            the forward pass failed, which does not say which rank failed it.
        group: Process group of the engine, or None for the default one.
    """

    def __init__(
        self,
        model: ParallelModel,
        requests: SlotRequests,
        most_steps: int,
        *,
        rebalancer: Rebalancer | None = None,
        piggyback: Piggyback | None = None,
        state: Callable[[], str] | None = None,
        lost_peers: Callable[[float], Sequence[int]] | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self._model, self._requests, self._most_steps = model, requests, most_steps
        self._rebalancer, self._piggyback, self._state, self._group = rebalancer, piggyback, state, group
        self._lost_peers = lost_peers
        model.bind_record(self._record if rebalancer is not None else None)
        placement = model.placement
        self.timeline = Timeline.empty(most_steps, placement.num_moe_layers, placement.num_ranks, model.max_sequences)
        words = 0 if piggyback is None else len(piggyback.outgoing())
        self._words = torch.zeros(model.world_size, 2 + words, dtype=torch.int64)
        self._all_words = torch.zeros(model.world_size, 2 + words, dtype=torch.int64)
        self._ended_ns = 0

    @property
    def steps(self) -> int:
        """Steps made so far: the number of the next forward pass."""
        return self.timeline.steps

    def step(self) -> bool:
        """Makes one forward pass with all ranks; blocks in the engine's collectives.

        Returns:
            False, on all ranks at the same step and without a pass, when the loop has ended.

        Raises:
            PeerLost: A rank has ended or hangs; names it where `lost_peers` can tell.
        """
        step = self.steps
        pass_input = self._requests.take(step)
        try:
            if self._agree_to_end(len(pass_input.tokens)):
                return False
            logits = self._model.forward(*pass_input)
        except PeerLost as error:
            raise self._named(error) from error
        line = self.timeline
        line.tokens[step] = self._requests.give(logits.argmax(-1).numpy())
        line.logits_digests.append(hashlib.sha256(logits.numpy().data).digest())
        line.rank_rows[step] = self._model.rank_rows
        line.live_tokens[step] = len(pass_input.tokens)
        self._rebalance(step)
        now = time.perf_counter_ns()
        line.itl_ns[step] = now - self._ended_ns if self._ended_ns else 0
        self._ended_ns = now
        line.steps += 1
        return True

    def run(self, on_step: Callable[[int], None] | None = None) -> Timeline:
        """Makes all steps; `on_step` is called with the number of steps made, outside the measured part."""
        while self.step():
            if on_step is not None:
                on_step(self.steps)
                self._ended_ns = time.perf_counter_ns()
        return self.timeline

    def _agree_to_end(self, live: int) -> bool:
        """Tells all ranks how many tokens this one brings and whether it is done."""
        words = self._words
        words[:, 0] = live
        words[:, 1] = self.steps >= self._most_steps or self._requests.finished
        if self._piggyback is not None:
            words[:, 2:] = self._piggyback.outgoing()
        exchange_blocks(self._all_words, words, self._group)
        ended = bool(self._all_words[:, 1].all())
        if self._piggyback is not None and not ended:
            self._piggyback.deliver(self._all_words[:, 2:])
        return ended

    def _named(self, error: PeerLost) -> PeerLost:
        ranks = () if self._lost_peers is None else tuple(self._lost_peers(NAME_LOST_PEERS_S))
        who = f"ranks {list(ranks)} ended or hang" if ranks else "a rank ended or hangs"
        return PeerLost(f"{who}; rank {self._model.rank} stops at pass {self.steps} ({error})", ranks)

    def _record(self, layer: int, topk_ids: torch.Tensor) -> None:
        assert self._rebalancer is not None
        self._rebalancer.record(layer, topk_ids, prefill=self._requests.is_prompt)

    def _rebalance(self, step: int) -> None:
        if self._rebalancer is None:
            return
        cpu, wall = time.thread_time_ns(), time.perf_counter_ns()
        self._rebalancer.step(step)
        self.timeline.rebalance_ns[step] = time.perf_counter_ns() - wall
        self.timeline.rebalance_cpu_ns[step] = time.thread_time_ns() - cpu
        if self._state is not None:
            self.timeline.states.append(self._state())
