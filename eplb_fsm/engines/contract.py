"""What an engine has to bring so that its experts can move while it serves: one contract for every engine.

**Who steps.** The thread that enqueues forward passes calls :meth:`.session.Session.step` after each of them, on every
rank of the agreement domain equally often. A *dummy* pass, which an idle rank makes so that the others can meet it in
their collectives, counts like a real one, and its tokens are not recorded. A *profiling* pass, which one rank makes
alone before it serves, counts on no rank: it comes before the first step.

**Rows and tables.** A bank names every tensor of an expert by rows; a map writer changes the tables that the router
reads, in place, on the stream on which forward passes are enqueued.

**Replicas.** Where all ranks route the same tokens and add up what each of them computed, every rank has to pick the
same replica of an expert for a token. Then tables must change at the same step everywhere, which commits do and
weighted shares do not, so :func:`refuse_weighted_shares` is for such engines.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch.distributed as dist

from eplb_fsm.config import RebalanceConfig
from eplb_fsm.errors import ConfigError
from eplb_fsm.runtime.parts import EngineSide
from eplb_fsm.runtime.verify import Probe


class Meeting(NamedTuple):
    """Where the ranks of an agreement domain find each other.

    Attributes:
        store: A ``TCPStore``, also behind a prefix, that all of them reach. Groups are built from it, so that none of
            the engine's own is used.
        rank: This rank of the domain; it owns the slots from ``rank * num_local_physical_experts``.
        world_size: Number of ranks.
        name: Prefix in the store, another one for each domain (pipeline stage) of the engine.
    """

    store: dist.Store
    rank: int
    world_size: int
    name: str


class EngineContract(Protocol):
    """One agreement domain of an engine, as seen from one rank. All methods belong to the decode thread."""

    def meeting(self) -> Meeting:
        """Return where the ranks meet."""
        ...

    def side(self) -> EngineSide:
        """Return banks, tables, counters, stream and fail-stop as they are now.

        Called once for every connection, also after the engine's own recovery has written a map: the placements are
        read back from the tables that the router reads.

        Raises:
            EplbError: If the experts cannot be moved; says why and what to change.
        """
        ...

    def probe(self, bank: int) -> Probe | None:
        """Return what runs a fixed input through one slot with the engine's own kernel; None: it cannot be tried."""
        ...


def refuse_weighted_shares(config: RebalanceConfig, why: str) -> None:
    """Refuse shares that change on each rank at a step of its own.

    Args:
        config: The configuration.
        why: What in the engine needs equal tables on all ranks.

    Raises:
        ConfigError: With ``replica_split="weighted"``.
    """
    if config.replica_split == "weighted":
        raise ConfigError(
            f"replica_split = 'weighted': {why}, so that every rank has to pick the same replica for a token; use "
            "replica_split = 'equal'"
        )
