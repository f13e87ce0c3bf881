"""The state of a rank at a glance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from eplb_fsm.core.rank import Outcome
from eplb_fsm.observe.gains import Gain


@dataclass(frozen=True, slots=True)
class Peer:
    """What this rank's watchdog knows of another one.

    Attributes:
        silent_s: Seconds since its liveness mark moved: its process, or the store, may be gone.
        stuck_s: Seconds since its step counter moved: its decode loop may be blocked.
    """

    rank: int
    silent_s: float
    stuck_s: float


@dataclass(frozen=True, slots=True)
class Health:
    """Where a rank is, for how long, and what is wrong.

    Attributes:
        why_stopped: Empty while rebalancing is possible; else the reason, with what to look at.
        num_outcomes: Epochs by outcome since the start.
        last_gain: What the last committed epoch promised, and what came of it; None before the first.
        load_predictability: Share of the last window's load that went to the experts to which the windows before it had
            it go; None before the second epoch.
        staging_bytes: Memory allocated for staging, once and for all.
        moved_bytes: Bytes of weights that this rank has written in commits; ``peer_bytes`` of them came over the wire.
        peers: The other ranks, where a watchdog runs.
    """

    rank: int
    state: str
    step_idx: int
    steps_in_state: int
    epoch: int
    is_frozen: bool
    is_drained: bool
    is_worker_alive: bool
    last_outcome: Outcome | None
    num_outcomes: Mapping[str, int]
    last_gain: Gain | None
    load_predictability: float | None
    why_stopped: str
    num_rounds: int
    num_late_rounds: int
    lag: int
    staging_bytes: int
    moved_bytes: int
    peer_bytes: int
    peers: tuple[Peer, ...]
