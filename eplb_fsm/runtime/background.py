"""Threads that work beside the decode loop and let it finish what it is at."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

_THIS_THREAD = 0


@contextmanager
def unobtrusive_threads() -> Iterator[None]:
    """Have threads that are started inside take turns with others, but interrupt none when they wake.

    A thread of a transfer sleeps and wakes for every message, and where cores are few it wakes in the middle of a
    step, which then stands until the scheduler comes back to it, for milliseconds. Linux has a policy for work that
    can wait so long, ``SCHED_BATCH``, with the same share of a core; threads inherit it from the one that starts them,
    so that it reaches those of a library too. Elsewhere, and in a thread of another policy, this changes nothing.
    """
    if not hasattr(os, "SCHED_BATCH") or os.sched_getscheduler(_THIS_THREAD) != os.SCHED_OTHER:
        yield
        return
    usual = os.sched_param(0)
    os.sched_setscheduler(_THIS_THREAD, os.SCHED_BATCH, usual)
    try:
        yield
    finally:
        os.sched_setscheduler(_THIS_THREAD, os.SCHED_OTHER, usual)
