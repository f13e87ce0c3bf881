"""Threads that work beside the decode loop and let it finish what it is at."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

_THIS_THREAD = 0


@contextmanager
def unobtrusive_threads() -> Iterator[None]:
    """Have threads that are started inside take turns with others, but interrupt none when they wake.

    A thread of a transfer, or of a round over gloo, sleeps and wakes for every message, and where cores are few it
    wakes in the middle of a step, which then stands until the scheduler comes back to it, for milliseconds. Linux has a
    policy for work that can wait so long, ``SCHED_BATCH``, with the same share of a core; threads inherit it from the
    one that starts them, so that it reaches those of a library too. Elsewhere, in a thread of another policy, and where
    a sandbox forbids it, this changes nothing.

    A thread that spins once it has a core keeps it all the same; so votes have none where ranks are few
    (:mod:`eplb_fsm.runtime.mesh`).
    """
    is_changed = _set_policy("SCHED_OTHER", "SCHED_BATCH")
    try:
        yield
    finally:
        if is_changed:
            _set_policy("SCHED_BATCH", "SCHED_OTHER")


def _set_policy(before: str, after: str) -> bool:
    """Change the policy of this thread, if it is the one before and the system can; return whether it did."""
    if not hasattr(os, after):
        return False
    try:
        if os.sched_getscheduler(_THIS_THREAD) != getattr(os, before):
            return False
        os.sched_setscheduler(_THIS_THREAD, getattr(os, after), os.sched_param(0))
    except OSError:
        return False
    return True
