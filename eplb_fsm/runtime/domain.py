"""The ranks that agree with each other, and the blocking handshake before the first step."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from eplb_fsm.errors import ChannelError, ConfigError, ConfigMismatch, ConsensusTimeout, PeerFailed

_FAILED = "failed"
_POLL_S = 0.02
_MAX_DIFFERENCES = 5
_MAX_SHOWN = 100


@dataclass(frozen=True, slots=True)
class Domain:
    """An agreement domain: all ranks whose forward pass uses the same maps.

    Attributes:
        rank: This rank, ``0 .. world_size - 1``.
        world_size: Number of ranks.
        generation: Number of this membership; a fencing token of everything that belongs to it.
        name: Prefix in the store, so that several domains (pipeline stages) share one.
    """

    rank: int
    world_size: int
    generation: int = 0
    name: str = "eplb"

    def __post_init__(self) -> None:
        """Check the rank against the number of ranks."""
        if not (self.world_size >= 1 and 0 <= self.rank < self.world_size):
            raise ConfigError(
                f"rank = {self.rank} with world_size = {self.world_size}: ranks are numbered from 0 to world_size - 1"
            )

    def store(self, store: dist.Store, purpose: str) -> dist.Store:
        """Return a view of ``store`` for one purpose of this domain and generation."""
        return dist.PrefixStore(f"{self.name}/{self.generation}/{purpose}", store)


class Handshake:
    """What the ranks of a domain tell each other over the store before the first step; blocks, decode thread.

    A rank that cannot start says why, and the others raise at once instead of waiting for it.

    Args:
        store: Where the ranks find each other.
        domain: The ranks.
        timeout_s: Longest wait for the others.

    Raises:
        ConfigError: If this rank was connected under the same name and generation before.
    """

    def __init__(self, store: dist.Store, domain: Domain, timeout_s: float) -> None:
        self._domain = domain
        self._timeout_s = timeout_s
        self._view = domain.store(store, "start")
        with _lost_store():
            if self._view.add(f"came/{domain.rank}", 1) != 1:
                raise ConfigError(
                    f"rank {domain.rank} was connected as domain {domain.name!r}, generation {domain.generation}, on "
                    "this store before; give every new connection a generation (or a name) of its own"
                )

    def exchange(self, key: str, value: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Give every rank's mapping to every rank.

        Raises:
            PeerFailed: A rank could not start; with what it said.
            ConsensusTimeout: Naming the ranks that did not come in time.
            ChannelError: The store is lost.
        """
        keys = [f"{key}/{rank}" for rank in range(self._domain.world_size)]
        with _lost_store():
            self._view.set(keys[self._domain.rank], json.dumps(value))
            self._wait(keys)
            return [json.loads(self._view.get(k)) for k in keys]

    def fail(self, error: BaseException) -> None:
        """Tell the others that this rank will not come, and why, unless they find it out alike; never raises."""
        if isinstance(error, PeerFailed | ConsensusTimeout):
            return
        word = json.dumps([self._domain.rank, f"{type(error).__name__}: {error}"])
        with contextlib.suppress(RuntimeError):
            if self._view.add("num_failed", 1) == 1:  # what failed first is the cause
                self._view.set(_FAILED, word)

    def _wait(self, keys: list[str]) -> None:
        deadline = time.monotonic() + self._timeout_s
        while not self._view.check(keys):
            # In this order: a rank that fails after an exchange has taken part in it, and is no obstacle to it.
            if self._view.check([_FAILED]) and not self._view.check(keys):
                rank, what = json.loads(self._view.get(_FAILED))
                raise PeerFailed(f"rank {rank} could not start: {what}", [rank])
            if time.monotonic() > deadline:
                missing = [rank for rank, key in enumerate(keys) if not self._view.check([key])]
                raise ConsensusTimeout(
                    f"ranks {missing} did not start within start_timeout_s = {self._timeout_s} s; "
                    "see their logs, or raise start_timeout_s",
                    missing,
                )
            time.sleep(_POLL_S)


@contextlib.contextmanager
def _lost_store() -> Iterator[None]:
    try:
        yield
    except dist.DistError as error:
        raise ChannelError(f"the store is lost while the ranks start: {error}") from error


def check_equal(offers: list[dict[str, Any]], domain: Domain) -> None:
    """Compare what the ranks were started with.

    Raises:
        ConfigMismatch: On every rank alike, naming each option that differs and its value on each rank.
    """
    differences = []
    for name in {name: None for offer in offers for name in offer}:  # in order, without doubles
        values = [offer.get(name) for offer in offers]
        if any(value != values[0] for value in values):
            per_rank = ", ".join(f"{_short(v)} on rank {r}" for r, v in enumerate(values))
            differences.append(f"{name} is {per_rank}")
    if len(differences) > _MAX_DIFFERENCES:
        differences[_MAX_DIFFERENCES:] = [f"and {len(differences) - _MAX_DIFFERENCES} more"]
    if differences:
        raise ConfigMismatch(
            f"the {domain.world_size} ranks of domain {domain.name!r} were started differently: "
            f"{'; '.join(differences)}; start all ranks with the same values"
        )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 3]}..."
