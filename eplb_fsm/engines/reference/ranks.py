"""Joining the ranks of the engine: the store, the default gloo group, and what a rank knows about itself."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from eplb_fsm.errors import ConfigError

JOIN_TIMEOUT_S = 120.0
"""How long a rank waits for the others to start."""
PASS_TIMEOUT_S = 60.0
"""How long a collective of a forward pass may take before the rank gives up."""

_ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def _nobody(message: object) -> None:
    """Drops a message: there is no launcher that listens."""


@dataclass(frozen=True)
class RankContext:
    """One rank's place in the engine.

    Attributes:
        rank: Number of this rank, from 0.
        world_size: Number of ranks.
        store: Store that all ranks reach; use it through a `PrefixStore` of your own.
        send: Sends a picklable message to the launcher, from any one thread; drops it under `torchrun`.
    """

    rank: int
    world_size: int
    store: dist.Store
    send: Callable[[object], None] = field(default=_nobody)


def _number(name: str) -> int:
    try:
        return int(os.environ[name])
    except ValueError:
        raise ConfigError(f"environment variable {name} is {os.environ[name]!r}: set it to a whole number") from None


@contextmanager
def joined(
    send: Callable[[object], None] = _nobody, *, threads: int = 1, pass_timeout_s: float = PASS_TIMEOUT_S
) -> Iterator[RankContext]:
    """Joins the ranks named by the environment (as `torchrun` sets it); leaves the group at the end.

    Blocks until all ranks are there. Sets torch's number of threads for this process.

    Args:
        send: Where `RankContext.send` goes.
        threads: torch's threads of this rank; ranks that share cores do best with 1.
        pass_timeout_s: Limit of each of the engine's collectives, seconds.

    Raises:
        ConfigError: The environment does not say who this rank is.
    """
    missing = [name for name in _ENVIRONMENT if name not in os.environ]
    if missing:
        raise ConfigError(f"{', '.join(missing)} not set: start the ranks with torchrun, or with launch()")
    rank, world_size = _number("RANK"), _number("WORLD_SIZE")
    torch.set_num_threads(threads)
    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun, or our launcher, is the server
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        _number("MASTER_PORT"),
        world_size,
        is_master=rank == 0 and not served,
        timeout=timedelta(seconds=JOIN_TIMEOUT_S),
        wait_for_workers=False,
    )
    run = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(
        "gloo",
        store=dist.PrefixStore(f"engine/{run}", store),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=pass_timeout_s),
    )
    try:
        yield RankContext(rank, world_size, dist.PrefixStore(f"run/{run}", store), send)
    finally:
        dist.destroy_process_group()
