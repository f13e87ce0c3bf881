"""The store that an engine's ranks were started with."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed import distributed_c10d

from eplb_fsm.errors import ConfigError


def tcp_store() -> dist.Store:
    """Return the store of the default process group; it serves further groups, and connections of one's own.

    Raises:
        ConfigError: There is none, or it is no ``TCPStore``.
    """
    if not dist.is_initialized():
        raise ConfigError("the engine has no process group yet; connect after it has started its ranks")
    store = innermost = distributed_c10d._get_default_store()
    while isinstance(innermost, dist.PrefixStore):
        innermost = innermost.underlying_store
    if not isinstance(innermost, dist.TCPStore):
        raise ConfigError(
            f"the engine's ranks meet over a {type(innermost).__name__}, which does not take a second connection; "
            "start it with tcp:// or env:// as init method"
        )
    return store
