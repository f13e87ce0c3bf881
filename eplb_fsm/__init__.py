"""Background rebalance of expert-parallel MoE inference as an explicit state machine per rank.

Names are loaded when they are first used, so that ``eplb_fsm.core`` and ``eplb_fsm.placement`` import no torch.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eplb_fsm.config import RebalanceConfig
    from eplb_fsm.fsm import RebalanceFSM
    from eplb_fsm.placement.placement import Placement
    from eplb_fsm.runtime.bank import Bank, find_unregistered_tensors

_HOMES = {
    "Bank": "eplb_fsm.runtime.bank",
    "Placement": "eplb_fsm.placement.placement",
    "RebalanceConfig": "eplb_fsm.config",
    "RebalanceFSM": "eplb_fsm.fsm",
    "find_unregistered_tensors": "eplb_fsm.runtime.bank",
}

__all__ = ["Bank", "Placement", "RebalanceConfig", "RebalanceFSM", "find_unregistered_tensors"]

logging.getLogger(__name__).addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    """Load a public name from its home."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
