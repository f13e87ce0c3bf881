"""What stands in the place of SGLang's ``EPLBManager``: the same methods, driven by the state machine."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any

from sglang.srt.eplb.eplb_manager import EPLBManager
from sglang.srt.eplb.expert_location import ModelConfigForExpertLocation
from sglang.srt.runtime_context import get_exec, get_parallel

from eplb_fsm.engines.session import Session
from eplb_fsm.engines.sglang.engine import SGLangEngine, is_whole
from eplb_fsm.engines.sglang.options import check_supported, make_config
from eplb_fsm.errors import EplbError

logger = logging.getLogger(__name__)

_DISABLED = "disable_rebalance()"


class BackgroundEPLBManager(EPLBManager):  # type: ignore[misc]  # SGLang is not installed where types are checked
    """Rebalances in the background; what SGLang does where a rank is lost stays its own.

    SGLang makes it before it has loaded the model, and :meth:`start` is called once it has. After a rank fault, or
    where ranks come and go, the machine is given up, and SGLang's own manager, which blocks, goes on in its place until
    :meth:`rebalance` adopts the map that SGLang has written.

    Args:
        **getters: As SGLang's own.

    Raises:
        ConfigError: What SGLang was started with cannot be rebalanced in the background.
    """

    def __init__(self, **getters: Any) -> None:
        super().__init__(**getters)
        moe, parallel = get_exec().moe, get_parallel()
        check_supported(moe, parallel)
        model = ModelConfigForExpertLocation.from_model_config(self._model_config)
        self.config = make_config(moe, parallel, getattr(model, "num_groups", None), os.environ)
        self._engine = SGLangEngine(self._get_model)
        self.session = Session(self._engine, self.config)
        self._may_adopt = True

    def start(self) -> None:
        """Connect to the other ranks and try the experts out; blocks until all of them have loaded the model."""
        self.session.start()
        logger.info("EPLB runs in the background (eplb_fsm): %s", self.config.changed)

    def on_forward_pass_end(self) -> None:
        """Step the machine; called after every forward pass, real or idle, on every rank."""
        if self.session.is_abandoned:
            super().on_forward_pass_end()
        else:
            self.session.step()

    def rebalance(self) -> Iterator[None]:
        """Recover from a rank fault with SGLang's own rebalance, then adopt the map that it wrote.

        SGLang drains it inside a forward pass, on all surviving ranks alike: so the epoch under way is given up without
        a vote, and nothing of it is committed anywhere. Also used by SGLang's own turn while the machine is given up.
        """
        self.session.abandon("SGLang rebalances itself, after a rank fault")
        yield from super().rebalance()
        if self._may_adopt and is_whole():
            self._adopt()

    def reset_generator(self) -> None:
        """Abort the epoch under way at an agreed step; with elastic EP SGLang replaces the map next, so give it up."""
        super().reset_generator()
        if get_exec().moe.elastic_ep_backend is not None:
            # A rank that comes back is a new process, which cannot know of the generations before it.
            self._may_adopt = False
            self.session.abandon("ranks come back or join, and SGLang replaces the map of experts")
        else:
            self.session.request_abort()

    def disable_rebalance(self, reason: str) -> None:
        """Have no epoch from an agreed step on."""
        super().disable_rebalance(reason)
        self.session.request_freeze(_DISABLED)

    def enable_rebalance(self) -> None:
        """Take :meth:`disable_rebalance` back, and count with the recorder that SGLang has now."""
        super().enable_rebalance()
        if not self.session.is_abandoned:
            self._engine.count_load()
        self.session.unfreeze(_DISABLED)

    def check_experts(self) -> None:
        """After a reload: where SGLang put other tensors into the place of the experts', end all rebalancing.

        SGLang's own rebalance would move the old ones, too.
        """
        if not self.session.is_abandoned and not self._engine.has_same_experts():
            logger.error(
                "SGLang has replaced tensors of experts in a reload, so they cannot be moved any more, by nobody: "
                "restart to rebalance again"
            )
            self._may_adopt = False
            self.session.abandon("tensors of experts were replaced")
            super().disable_rebalance("tensors of experts were replaced")

    def _adopt(self) -> None:
        try:
            self.session.adopt()
        except EplbError:
            logger.exception("the map that SGLang wrote cannot be adopted; its own rebalance goes on, and blocks")
