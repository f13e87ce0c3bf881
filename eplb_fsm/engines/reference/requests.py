"""What one rank decodes: requests cut from the domain texts, one after the other in every sequence slot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from eplb_fsm.engines.reference.corpus import BOS_TOKEN, check_domain, evaluation_text
from eplb_fsm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The requests of all ranks; the same seed gives the same requests, whatever happens in the engine.

    Attributes:
        seed: Seed of every draw.
        before: Domains of the requests before the change.
        after: Domains of the requests after it.
        change_step: Step at which all slots are restarted with requests of `after`; None for no change.
        prompt_tokens: Most tokens of a prompt, fed one by one; a request has 3/4 of it at least.
        generate_tokens: Most tokens generated after it; a request has 3/4 of it at least.
        idle_ranks: Ranks that never get a request and only make dummy passes.
        requests_per_slot: Requests of each slot before it stays empty; None for no end.

    Raises:
        ConfigError: A domain is unknown, or a length is not positive.
    """

    seed: int = 0
    before: tuple[str, ...] = ("code", "logs")
    after: tuple[str, ...] = ("russian", "chinese")
    change_step: int | None = None
    prompt_tokens: int = 64
    generate_tokens: int = 96
    idle_ranks: tuple[int, ...] = ()
    requests_per_slot: int | None = None

    def __post_init__(self) -> None:
        for domain in (*self.before, *self.after):
            check_domain(domain)
        if not self.before or not self.after:
            raise ConfigError("before and after must each name at least one text domain")
        for name in ("prompt_tokens", "generate_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: set it to 1 or more")

    @property
    def max_length(self) -> int:
        """Most tokens of one sequence, for the KV cache."""
        return self.prompt_tokens + self.generate_tokens


class PassInput(NamedTuple):
    """What a forward pass decodes: tokens, positions and slots (None: all, in order), int64 `(tokens,)`."""

    tokens: torch.Tensor
    positions: torch.Tensor
    rows: torch.Tensor | None


class SlotRequests:
    """The sequence slots of one rank and the requests in them.

    Args:
        workload: The requests of all ranks.
        rank: This rank.
        slots: Number of sequence slots.
    """

    def __init__(self, workload: Workload, rank: int, slots: int) -> None:
        self._workload, self._rank, self._slots = workload, rank, slots
        self._prompts = np.zeros((slots, workload.prompt_tokens), dtype=np.int64)
        self._prompt_ends = np.zeros(slots, dtype=np.int64)
        self._ends = np.zeros(slots, dtype=np.int64)
        self._positions = np.zeros(slots, dtype=np.int64)
        self._tokens = np.zeros(slots, dtype=np.int64)
        self._numbers = np.zeros(slots, dtype=np.int64)
        self._live = np.zeros(slots, dtype=bool)
        self._rows = np.arange(slots)
        self.is_prompt = torch.zeros(slots, dtype=torch.bool)
        """bool `(tokens,)`: which tokens of the last :meth:`take` are of prompts."""
        self._phase = 0
        if rank not in workload.idle_ranks:
            self._restart()

    @property
    def live(self) -> int:
        """Slots that hold a request."""
        return int(self._live.sum())

    @property
    def finished(self) -> bool:
        """Whether no slot holds a request and none will."""
        workload = self._workload
        waiting = workload.change_step is not None and self._phase == 0 and self._rank not in workload.idle_ranks
        return not self._live.any() and not waiting

    def take(self, step: int) -> PassInput:
        """Returns the input of this step's forward pass; at the change of domain all slots start anew."""
        if step == self._workload.change_step and self._rank not in self._workload.idle_ranks:
            self._phase = 1
            self._restart()
        self._rows = np.flatnonzero(self._live)
        whole = len(self._rows) == self._slots
        tokens, positions = self._tokens[self._rows], self._positions[self._rows]
        rows = None if whole else torch.from_numpy(self._rows)
        self.is_prompt = torch.from_numpy(positions < self._prompt_ends[self._rows])
        return PassInput(torch.from_numpy(tokens), torch.from_numpy(positions), rows)

    def give(self, chosen: np.ndarray) -> np.ndarray:
        """Takes the greedy choice of each token of the last `take`; moves every slot to its next token.

        Args:
            chosen: int64 `(tokens,)`.

        Returns:
            Generated tokens by slot, int16 `(slots,)`; -1 where the prompt goes on or the slot is empty.
        """
        rows = self._rows
        produced = np.full(self._slots, -1, dtype=np.int16)
        self._positions[rows] += 1
        at = self._positions[rows]
        in_prompt = at < self._prompt_ends[rows]
        produced[rows] = np.where(in_prompt, -1, chosen)
        prompt = self._prompts[rows, np.minimum(at, self._workload.prompt_tokens - 1)]
        self._tokens[rows] = np.where(in_prompt, prompt, chosen)
        for slot in rows[at >= self._ends[rows]]:
            self._begin(int(slot))
        return produced

    def _restart(self) -> None:
        self._numbers[:] = 0
        for slot in range(self._slots):
            self._begin(slot)

    def _begin(self, slot: int) -> None:
        """Puts the slot's next request into it, or leaves it empty."""
        workload, number = self._workload, int(self._numbers[slot])
        self._live[slot] = workload.requests_per_slot is None or number < workload.requests_per_slot
        if not self._live[slot]:
            return
        draw = np.random.default_rng([workload.seed, self._phase, self._rank, slot, number])
        domains = workload.after if self._phase else workload.before
        text = evaluation_text(domains[draw.integers(len(domains))])
        prompt, generate = (
            int(draw.integers(-(-most * 3 // 4), most + 1))
            for most in (workload.prompt_tokens, workload.generate_tokens)
        )
        start = int(draw.integers(0, len(text) - workload.prompt_tokens))
        self._prompts[slot, 0] = BOS_TOKEN
        self._prompts[slot, 1:] = np.frombuffer(text, np.uint8, workload.prompt_tokens - 1, start)
        self._prompt_ends[slot], self._ends[slot] = prompt, prompt + generate
        self._positions[slot], self._tokens[slot] = 0, BOS_TOKEN
        self._numbers[slot] += 1
