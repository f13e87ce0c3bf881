"""What epochs promised, and what came of it."""

from __future__ import annotations

import logging
from typing import NamedTuple

from eplb_fsm.placement.placement import Placement
from eplb_fsm.placement.plan import Plan

logger = logging.getLogger(__name__)

_LEAST_SHARE = 0.5
"""A gain of which less than this share is measured has stayed away."""
_LEAST_TRUST = 0.1
_WEIGHT_OF_LAST = 0.5
"""Weight of the last epoch in the trust, against all before it."""
_FORGIVING = 0.125
"""Share of the lost trust that comes back with each epoch that moves nothing, so that it is not lost for good."""


class Gain(NamedTuple):
    """Balancedness, mean over all layers, around one committed epoch.

    Attributes:
        epoch: The epoch.
        before: Under the load that it was planned for, with the placement that it began with.
        predicted: Under the same load, with the placement that it made.
        measured: With that placement, under the next window, which no plan had seen; None until then, and while
            windows bring no load.
        unmoved: Under that window, with the placement that it began with: what there would be without the epoch.
    """

    epoch: int
    before: float
    predicted: float
    measured: float | None = None
    unmoved: float | None = None

    @property
    def share(self) -> float:
        """Share of the predicted gain that was measured, 0 to 1; 1 until it is known."""
        if self.measured is None or self.unmoved is None or self.predicted <= self.before:
            return 1.0
        return min(1.0, max(0.0, (self.measured - self.unmoved) / (self.predicted - self.before)))

    @property
    def stayed_away(self) -> bool:
        """Whether less than half of the predicted gain was measured."""
        return self.share < _LEAST_SHARE


class Seen(NamedTuple):
    """Balancedness under a window of load, mean over all layers.

    Attributes:
        live: With the live placement.
        unmoved: With the one that the last committed epoch began with.
    """

    live: float
    unmoved: float


class GainWatch:
    """Compares each committed plan with what the next window shows; decode thread only.

    Args:
        is_telling: Whether this rank writes it to the log; all ranks know the same, so one is enough.

    Attributes:
        last: The last committed epoch's, None before the first.
        trust: Share of the predicted gains that came true, the last epoch counting half; 1.0 at first. The same on all
            ranks, since all hold the same plans.
    """

    def __init__(self, *, is_telling: bool) -> None:
        self._is_telling = is_telling
        self.last: Gain | None = None
        self.trust = 1.0
        self._base: tuple[Placement, ...] | None = None

    def committed(self, epoch: int, plan: Plan) -> None:
        """Note that all of a plan is live."""
        self.last = Gain(epoch, plan.balancedness_before, plan.balancedness_after)
        self._base = plan.base

    @property
    def unmoved(self) -> tuple[Placement, ...] | None:
        """Placements that the last committed epoch began with; None once its gain is measured."""
        return self._base

    def planned(self, plan: Plan, seen: Seen | None) -> None:
        """Take note of a new plan, and of what was seen of the last one in the window that it was made for.

        Args:
            plan: The new plan.
            seen: With :attr:`unmoved` as it was when the window was taken; None: nothing was to be seen.
        """
        if plan.skip_reason:
            self.trust += _FORGIVING * (1.0 - self.trust)
        if seen is None or self.last is None or self._base is None:
            return
        self._base = None
        self.last = gain = self.last._replace(measured=seen.live, unmoved=seen.unmoved)
        self.trust = max(_LEAST_TRUST, self.trust + _WEIGHT_OF_LAST * (gain.share - self.trust))
        if self._is_telling:
            logger.log(
                logging.WARNING if gain.stayed_away else logging.INFO,
                "epoch %d: balancedness %.3f was to become %.3f; under the next window it is %.3f, and would be %.3f "
                "without the epoch%s",
                *(gain.epoch, gain.before, gain.predicted, seen.live, seen.unmoved),
                "; the load changes faster than it is followed: see step_interval and window_size"
                if gain.stayed_away
                else "",
            )
