"""Step times: they keep staging out of the decode loop's way, and say what an epoch took from it."""

from __future__ import annotations

from collections import deque
from statistics import median

from eplb_fsm.runtime.costs import Measured
from eplb_fsm.runtime.worker import Pace

_NUM_BASELINE = 32
_NUM_RECENT = 5


class StepGauge:
    """Mean step times at the resolution of rounds; decode thread only.

    They spread the pieces of planning over steps, and slow staging when the loop is slower than before an epoch.

    Args:
        pace: The worker's pace.
        max_slowdown: Tolerated relative slowdown; 0 never slows the worker.

    """

    def __init__(self, pace: Pace, max_slowdown: float) -> None:
        self._pace = pace
        self._max_slowdown = max_slowdown
        self._last: tuple[int, float] | None = None
        self._begun: tuple[int, float] = (0, 0.0)
        self._baseline: deque[float] = deque(maxlen=_NUM_BASELINE)
        self._recent: deque[float] = deque(maxlen=_NUM_RECENT)
        self._transfers = Measured()

    def note(self, step_idx: int, now: float, *, is_transferring: bool) -> None:
        """Take the time of a step at which a vote was posted."""
        last, self._last = self._last, (step_idx, now)
        if last is None or step_idx == last[0]:
            return
        step_s = (now - last[1]) / (step_idx - last[0])
        if is_transferring:
            self._recent.append(step_s)
            self._keep_pace()
        else:  # nothing is worked out here: this runs in every idle round
            self._baseline.append(step_s)
            self._recent.clear()

    @property
    def measured(self) -> Measured:
        """What is known of steps and transfers so far."""
        return self._transfers._replace(step_ns=round(self._usual_s * 1e9))

    @property
    def _usual_s(self) -> float:
        return median(self._baseline) if self._baseline else 0.0

    def start(self) -> None:
        """Note that an epoch starts: from here on the worker spreads its pieces over steps of the usual length."""
        if self._max_slowdown and self._baseline:
            self._pace.set_breath(self._usual_s)

    def _keep_pace(self) -> None:
        if not self._max_slowdown or len(self._baseline) < 2 or len(self._recent) < _NUM_RECENT:
            return
        if median(self._recent) > self._usual_s * (1 + self._max_slowdown):
            self._pace.slow_down()
        else:
            self._pace.speed_up()

    def begin(self, step_idx: int, now: float) -> None:
        """Note that a transfer begins."""
        self._begun = (step_idx, now)

    def end(self, step_idx: int, now: float, num_bytes: int) -> None:
        """Note that all of it is committed; ``num_bytes`` came from other ranks, all ranks together.

        In sync mode no step has passed, so all of the time is lost.
        """
        transfer_ns = round((now - self._begun[1]) * 1e9)
        lost_ns = transfer_ns - (step_idx - self._begun[0]) * self.measured.step_ns
        before = self._transfers
        self._transfers = Measured(
            moved_bytes=before.moved_bytes + num_bytes,
            transfer_ns=before.transfer_ns + transfer_ns,
            lost_ns=before.lost_ns + lost_ns,
        )
        self._last = None  # the step of a sync epoch is no step like others
