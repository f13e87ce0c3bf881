"""The store that an engine's ranks were started with, or one beside it."""

from __future__ import annotations

from datetime import timedelta
from functools import lru_cache

import torch.distributed as dist
from torch.distributed import distributed_c10d

from eplb_fsm.errors import ConfigError

_PORT_KEY = "eplb_fsm/port"
_LOOPBACK = "127.0.0.1"
_TIMEOUT = timedelta(minutes=5)


def tcp_store() -> dist.Store:
    """Return a store over TCP that all ranks of the default process group reach; it takes further connections.

    Blocks, where the ranks met over a file, until the first of them is here.

    Raises:
        ConfigError: There is no process group, or its ranks met over something else.
    """
    if not dist.is_initialized():
        raise ConfigError("the engine has no process group yet; connect after it has started its ranks")
    store = innermost = distributed_c10d._get_default_store()
    while isinstance(innermost, dist.PrefixStore):
        innermost = innermost.underlying_store
    if isinstance(innermost, dist.TCPStore):
        return store
    if isinstance(innermost, dist.FileStore):
        return _beside(store)
    raise ConfigError(
        f"the engine's ranks meet over a {type(innermost).__name__}, which does not take a second connection; start "
        "it with tcp:// or env:// as init method"
    )


@lru_cache(maxsize=1)
def _beside(store: dist.Store) -> dist.Store:
    """Ranks that meet over a file are on one machine; the first one hosts a store for all."""
    if dist.get_rank() == 0:
        server = dist.TCPStore(_LOOPBACK, 0, None, True, _TIMEOUT, wait_for_workers=False)
        store.set(_PORT_KEY, str(server.port))
        return server
    port = int(store.get(_PORT_KEY))
    return dist.TCPStore(_LOOPBACK, port, None, False, _TIMEOUT, wait_for_workers=False)
