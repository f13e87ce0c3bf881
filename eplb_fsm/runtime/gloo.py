"""Gloo groups of one's own, built from (store, prefix, ranks) so that elastic engines can use them too."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist

from eplb_fsm.errors import ConsensusTimeout
from eplb_fsm.runtime.background import unobtrusive_threads
from eplb_fsm.runtime.domain import Domain


def make_group(
    domain: Domain, store: dist.Store, purpose: str, timeout_s: float, *, start_timeout_s: float | None = None
) -> Any:
    """Connect the ranks of a domain; blocks until all have come.

    Point-to-point calls of such a group take ranks of the domain. torch's type stubs leave its methods out. Its threads
    interrupt no step when a message wakes them, though one may spin on a core that it has; see
    :func:`~eplb_fsm.runtime.background.unobtrusive_threads`.

    Args:
        domain: The ranks.
        store: Where they find each other.
        purpose: Keeps the groups of a domain apart in the store.
        timeout_s: The group's own timeout; after one of those it is broken for good.
        start_timeout_s: Longest wait for the others here; None: ``timeout_s``.

    Raises:
        ConsensusTimeout: The ranks could not be connected.
    """
    view = domain.store(store, purpose)
    limit_s = timeout_s if start_timeout_s is None else start_timeout_s
    try:
        with unobtrusive_threads():
            group: Any = dist.ProcessGroupGloo(view, domain.rank, domain.world_size, timedelta(seconds=limit_s))
    except RuntimeError as error:
        raise ConsensusTimeout(
            f"the {purpose} group of {domain.world_size} ranks could not be connected in {limit_s} s ({error}); see "
            "the logs of the other ranks, and that they reach each other (GLOO_SOCKET_IFNAME chooses the network)"
        ) from error
    group._set_default_timeout(timedelta(seconds=timeout_s))
    return group
