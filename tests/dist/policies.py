"""Policies for tests with real planner processes; numpy only, named as ``tests.dist.policies:NAME``."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np

from eplb_fsm.placement import Placement, Topology, get_policy
from eplb_fsm.placement.policies import DeepseekPolicy

HANG_S = 3600.0
MARKER = "TEST_POLICY_MARKER"
"""Environment variable with the path of a file: while it is there, :class:`Marked` misbehaves as it says."""


class Shuffled:
    """DeepSeek's placement for a load drawn from the digest of the current one: the same sequence every time."""

    name = "shuffled"
    deterministic = True

    def warm_up(self) -> None:
        """Load the kernel, so that no plan of a test with short limits waits for it."""
        DeepseekPolicy("global").warm_up()

    def plan(self, load: np.ndarray, current: Placement, topology: Topology) -> Placement:
        """Return the successor of ``current``."""
        random = np.random.default_rng(abs(current.digest))
        return get_policy("deepseek_global").plan(random.lognormal(0.0, 1.0, size=load.shape), current, topology)


class NeedsWarmUp(Shuffled):
    """Cannot plan in a process that did not call :meth:`warm_up` before."""

    name = "needs_warm_up"
    is_warm = False

    def warm_up(self) -> None:
        """Remember that it was called."""
        super().warm_up()
        NeedsWarmUp.is_warm = True

    def plan(self, load: np.ndarray, current: Placement, topology: Topology) -> Placement:
        """Return the successor of ``current``."""
        if not self.is_warm:
            raise RuntimeError("nobody called warm_up()")
        return super().plan(load, current, topology)


class Chancy(Shuffled):
    """The same, but it does not declare itself deterministic."""

    name = "chancy"
    deterministic = False


class Differing(Shuffled):
    """Declares itself deterministic and is not: every process gets plans of its own."""

    name = "differing"

    def plan(self, load: np.ndarray, current: Placement, topology: Topology) -> Placement:
        """Return something that depends on the process."""
        random = np.random.default_rng(os.getpid())
        return get_policy("deepseek_global").plan(random.lognormal(0.0, 1.0, size=load.shape), current, topology)


class Marked(Shuffled):
    """Misbehaves while the marker file is there: its text is ``raise``, ``nonsense``, ``exit`` or ``hang``."""

    name = "marked"

    def plan(self, load: np.ndarray, current: Placement, topology: Topology) -> Placement:
        """Do what the marker says."""
        marker = Path(os.environ[MARKER])
        how = marker.read_text() if marker.exists() else ""
        if how == "raise":
            raise ValueError("this policy does not like the load")
        if how == "nonsense":
            return "no placement at all"  # type: ignore[return-value]
        if how == "other experts":
            return Placement.initial(current.num_moe_layers, 2, current.num_physical_experts, current.num_ranks)
        if how == "exit":
            os._exit(3)
        if how == "hang":
            time.sleep(HANG_S)
        return super().plan(load, current, topology)


class Broken(Shuffled):
    """Cannot even be made."""

    name = "broken"

    def __init__(self) -> None:
        raise RuntimeError("no licence for this policy")
