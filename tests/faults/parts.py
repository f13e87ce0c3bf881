"""Parts of a machine that fail on purpose."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from eplb_fsm import Placement
from eplb_fsm.core.votes import Progress, Tally, Vote
from eplb_fsm.errors import ChannelError, TransferError
from eplb_fsm.placement.validate import Float64Array
from eplb_fsm.runtime.domain import Domain
from eplb_fsm.runtime.maps import TensorMapWriter
from eplb_fsm.runtime.mesh import MeshVoteChannel
from eplb_fsm.runtime.pending import Pending
from eplb_fsm.runtime.transport import GlooTransport
from tests.dist.decode import SHAPE
from tests.dist.harness import RankLink


class FaultyChannel(MeshVoteChannel):
    """A mesh with hooks.

    Attributes:
        before_post: Called with each vote before it goes out.
        is_broken: Asked before each post and poll about the last vote; True makes it fail from then on, as one that
            has lost a rank does.
        loses: Asked about each tally before this rank sees it; True makes it fail from then on.
    """

    def __init__(self, link: RankLink, store: Any) -> None:
        super().__init__(Domain(link.rank, link.world_size), store, start_timeout_s=20.0)
        self.before_post: Callable[[Vote], None] = lambda vote: None
        self.is_broken: Callable[[Vote], bool] = lambda vote: False
        self.loses: Callable[[Tally], bool] = lambda tally: False
        self._last: Vote | None = None
        self._is_lost = False

    def post(self, vote: Vote) -> None:
        self._last = vote
        self._fail_if_broken()
        self.before_post(vote)
        super().post(vote)

    def poll(self, round_idx: int) -> Tally | None:
        self._fail_if_broken()
        tally = super().poll(round_idx)
        self._is_lost = tally is not None and self.loses(tally)
        self._fail_if_broken()
        return tally

    def _fail_if_broken(self) -> None:
        assert self._last is not None
        if self._is_lost or self.is_broken(self._last):
            self._is_lost = True
            raise ChannelError("this test broke the vote channel of this rank")


def is_staged(vote: Vote) -> bool:
    """Whether a vote promises a commit."""
    return vote.progress == Progress.STAGED


def signal_self_when_staged(number: int) -> Callable[[Vote], None]:
    """Return a hook that sends this process a signal just before its first promise goes out."""
    sent: list[Vote] = []

    def hook(vote: Vote) -> None:
        if is_staged(vote) and not sent:
            sent.append(vote)
            os.kill(os.getpid(), number)
            time.sleep(0.05)  # a stop signal takes a moment to reach this thread

    return hook


KILL_WHEN_STAGED = signal_self_when_staged(signal.SIGKILL)


class FaultyTransport(GlooTransport):
    """A gloo transport that holds, fails, or damages what it sends, while the test wants it to.

    Attributes:
        late_s: Seconds by which this rank notices late that an exchange is done; the others have staged by then.
    """

    def __init__(self, link: RankLink, store: Any, timeout_s: float = 20.0) -> None:
        super().__init__(Domain(link.rank, link.world_size), store, timeout_s, start_timeout_s=20.0)
        self.is_held = False
        self.fails = False
        self.damages = False
        self.late_s = 0.0

    def begin(self, sends: Sequence[Any], receives: Sequence[Any], tag: int) -> Any:
        while self.is_held:
            time.sleep(0.005)
        if self.fails:
            raise TransferError("this test broke the transfer of this rank")
        if self.damages:
            sends = [(peer, _with_one_wrong_byte(buffer)) for peer, buffer in sends]
        return _Late(super().begin(sends, receives, tag), self.late_s)


class _Late:
    def __init__(self, inner: Pending, late_s: float) -> None:
        self._inner = inner
        self._late_s = late_s

    def poll(self) -> bool:
        return self._inner.poll()

    def wait(self, timeout_s: float) -> None:
        self._inner.wait(timeout_s)
        time.sleep(self._late_s)


def _with_one_wrong_byte(buffer: torch.Tensor) -> torch.Tensor:
    damaged = buffer.clone()
    damaged[len(damaged) // 2] ^= 0x10
    return damaged


class FaultyMapWriter(TensorMapWriter):
    """Writes the library's tables, and calls hooks."""

    def __init__(self, world_size: int) -> None:
        placement = Placement.initial(
            SHAPE.num_moe_layers, SHAPE.num_logical_experts, SHAPE.num_physical_experts, world_size
        )
        super().__init__([placement])
        self.before_prepare: Callable[[], None] = lambda: None
        self.after_write: Callable[[], None] = lambda: None

    def prepare(
        self, bank: int, layers: Sequence[int], placement: Placement, shares: Float64Array | None = None
    ) -> object:
        self.before_prepare()
        return super().prepare(bank, layers, placement, shares)

    def write(self, prepared: object) -> None:
        super().write(prepared)
        self.after_write()


def fail(error: BaseException) -> Callable[[], None]:
    """Return something that raises."""

    def raise_it() -> None:
        raise error

    return raise_it
