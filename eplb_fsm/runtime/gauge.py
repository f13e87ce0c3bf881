"""Keeps staging out of the decode loop's way."""

from __future__ import annotations

from collections import deque
from statistics import median

from eplb_fsm.runtime.worker import Pace

_NUM_BASELINE = 32
_NUM_RECENT = 5


class StepGauge:
    """Mean step times at the resolution of rounds.

    They spread the pieces of planning over steps, and slow staging when the loop is slower than before an epoch.

    Args:
        pace: The worker's pace.
        max_slowdown: Tolerated relative slowdown; 0 never slows the worker.
    """

    def __init__(self, pace: Pace, max_slowdown: float) -> None:
        self._pace = pace
        self._max_slowdown = max_slowdown
        self._last: tuple[int, float] | None = None
        self._baseline: deque[float] = deque(maxlen=_NUM_BASELINE)
        self._recent: deque[float] = deque(maxlen=_NUM_RECENT)

    def note(self, step_idx: int, now: float, *, is_transferring: bool) -> None:
        """Take the time of a step at which a vote was posted; decode thread."""
        last, self._last = self._last, (step_idx, now)
        if last is None or step_idx == last[0] or not self._max_slowdown:
            return
        step_s = (now - last[1]) / (step_idx - last[0])
        if not is_transferring:
            self._baseline.append(step_s)
            self._recent.clear()
            self._pace.set_breath(median(self._baseline))
            return
        self._recent.append(step_s)
        if len(self._baseline) < 2 or len(self._recent) < _NUM_RECENT:
            return
        if median(self._recent) > median(self._baseline) * (1 + self._max_slowdown):
            self._pace.slow_down()
        else:
            self._pace.speed_up()
