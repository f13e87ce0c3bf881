"""The device, streams and events that the thread of vLLM's own asynchronous EPLB takes for granted.

Events need nothing here: vLLM's CPU worker already replaces `torch.Event` by one that does nothing, which is right for
CPUs, whose operations have ended when they return.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from vllm.distributed.eplb import eplb_state

_STREAM = torch.Stream(device="cpu")


def apply() -> None:
    """Let the thread start, and let it choose a device and a stream, which raises where there is no accelerator."""
    start_async_worker = eplb_state.start_async_worker

    def start_on_cpu(state: Any, *args: Any, **kwargs: Any) -> threading.Thread:
        # Without an index the thread dies of an assertion, and EPLB with it, silently.
        state.device_index = 0
        return start_async_worker(state, *args, **kwargs)

    eplb_state.start_async_worker = start_on_cpu
    torch.accelerator.current_stream = _current_stream
    torch.accelerator.set_stream = _ignore
    torch.accelerator.set_device_index = _ignore


def _current_stream(*_: Any) -> torch.Stream:
    return _STREAM


def _ignore(*_: Any) -> None:
    pass
