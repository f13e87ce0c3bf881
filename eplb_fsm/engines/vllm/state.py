"""What stands in the place of vLLM's ``EplbState``: the same methods, driven by the state machine."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.distributed.eplb.eplb_state import EplbState, _compute_eplb_load_stats
from vllm.distributed.parallel_state import get_ep_group, get_node_count

from eplb_fsm.config import RebalanceConfig
from eplb_fsm.engines.session import Session, refuse_to_meet
from eplb_fsm.engines.vllm.engine import VllmEngine
from eplb_fsm.engines.vllm.options import Layout, check_supported, make_config
from eplb_fsm.errors import EplbError, UsageError

logger = logging.getLogger(__name__)

_SCALING = "elastic scaling"
_RELOADING = "reload_weights()"
_LOOK_EVERY = 8
"""Steps between two looks at whether passes are to be counted, and between two takings of what layers have added up, so
that a step of which nothing is due stays short."""


class BackgroundEplbState(EplbState):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """Rebalances in the background; what vLLM does where ranks come and go stays its own.

    vLLM makes one, adds the models, and has :meth:`start_async_loop` called: there the machine is connected to the
    other ranks. When vLLM scales, :meth:`drain_async` closes that machine and vLLM's own reshuffle, which blocks,
    writes weights and maps. The first step after it connects a new machine, on ranks that stayed and that came.

    Args:
        parallel_config: vLLM's.
        device: Where the model is.

    Raises:
        ConfigError: What vLLM was started with cannot be rebalanced by this library.
    """

    is_v2_runner = False

    def __init__(self, parallel_config: Any, device: torch.device) -> None:
        check_supported(get_current_vllm_config(), is_v2_runner=self.is_v2_runner)
        super().__init__(parallel_config, device)
        self._engine = VllmEngine(self.model_states)
        self.session: Session | None = None
        self._starts_at_step = False
        self._is_recording = True
        self._takes_each_pass = True

    def add_model(self, model: Any, model_config: Any, model_name: str | None = None) -> None:
        """Take a model, target or draft, before the machine is connected.

        Raises:
            UsageError: The machine is connected already.
        """
        if self.session is not None:
            raise UsageError("a model was added after start_async_loop(); add draft and target model before it")
        super().add_model(model, model_config, model_name)
        # So that both model runners call start_async_loop() in synchronous mode too.
        self.is_async = True
        added = self.model_states[model_config.compute_hash()]
        added.expert_load_window = added.expert_load_window[:0].clone()  # passes are summed, not kept

    def start_async_loop(self, rank_mapping: dict[int, int] | None = None, is_profile: bool = False) -> None:
        """Connect to the other ranks and try the experts out; blocks. After a reshuffle the next step does so.

        When vLLM scales down it calls this before the ranks that leave have left, and when it scales up the ranks that
        have come are not yet waited for: only a step finds every rank of the new membership, and no other.
        """
        if self.session is None and not self._starts_at_step:
            self._start()

    def _start(self) -> None:
        self.session = Session(self._engine, self._make_config())
        # Dummy passes, which count no tokens, come between real ones only where ranks serve requests of their own.
        has_dummies = self.parallel_config.data_parallel_size > 1
        self._takes_each_pass = has_dummies or self.parallel_config.eplb_config.log_balancedness  # which is of one pass
        self._record(True)
        self.session.start()
        logger.info("EPLB runs by eplb_fsm: %s", self.session.config.changed)

    def _start_anew(self) -> None:
        """Connect the ranks of another membership and make their first step.

        Where they cannot be connected, all of them serve on with the map that vLLM made.
        """
        self._starts_at_step = False
        try:
            self._start()
            assert self.session is not None
            self.session.step()
        except EplbError as error:
            if self.session is not None:
                self.session.close()  # which tells the others, if it is they who wait
                self.session = None
            self._record(False)
            logger.error("EPLB has ended with %s: %s", _SCALING, error)

    def _make_config(self) -> RebalanceConfig:
        try:
            model = next(iter(self.model_states.values())).model
            layout = Layout(_num_nodes(), model.num_expert_groups or 1, model.num_redundant_experts)
            return make_config(self.parallel_config.eplb_config, layout, os.environ)
        except EplbError as error:
            refuse_to_meet(self._engine.meeting(), error)
            raise

    def step(self, is_dummy: bool = False, is_profile: bool = False, log_stats: bool = False) -> None:
        """Step the machine, after every forward pass, real or dummy, on every rank; a profiling pass counts on none."""
        if is_profile:
            self._engine.forget_pass()
            return
        session = self.session
        if session is None:
            if self._starts_at_step:
                self._start_anew()
            return
        self.expert_rearrangement_step += 1
        if log_stats and self.expert_rearrangement_step % self._log_interval == 0:
            self._log_balancedness()
        looks = not self.expert_rearrangement_step % _LOOK_EVERY or log_stats
        if self._is_recording:
            if is_dummy:
                self._engine.forget_pass()
            elif looks or self._takes_each_pass:
                self._engine.count_pass()
        session.step()
        if looks:
            self._follow_window(log_stats)

    def drain_async(self) -> None:
        """Close the machine before vLLM scales; all ranks call it after the same pass, and no transfer is left.

        Blocks. What was counted last becomes the load that vLLM's reshuffle places experts by.

        Raises:
            EplbError: As :meth:`.RebalanceFSM.quiesce_now`.
        """
        if self.session is None:
            return
        self.session.freeze_now(_SCALING)
        self.session.close()
        self.session = None
        loads = self._allreduce_list(self._engine.take_loads())
        for state, load in zip(self.model_states.values(), loads, strict=True):
            if load.any():
                state.last_expert_load = load

    def rearrange(
        self,
        is_profile: bool = False,
        rank_mapping: dict[int, int] | None = None,
        use_last_expert_load: bool = False,
    ) -> torch.Tensor | None:
        """Reshuffle as vLLM does when it scales: blocks, and needs the machine to be closed.

        Raises:
            UsageError: It is not, and both would write the same rows.
        """
        if self.session is not None:
            raise UsageError("rearrange() moves experts itself: drain_async() first")
        is_async, self.is_async = self.is_async, False
        try:
            result: torch.Tensor | None = super().rearrange(is_profile, rank_mapping, use_last_expert_load)
        finally:
            self.is_async = is_async
        self._starts_at_step |= not is_profile
        return result

    @contextmanager
    def reloading(self) -> Iterator[None]:
        """Have experts stand still while vLLM loads weights, each into the slot that it had at the start; blocks.

        Raises:
            UsageError: Some are in other slots.
            EplbError: As :meth:`.RebalanceFSM.quiesce_now`.
        """
        if self.session is not None:
            self.session.freeze_now(_RELOADING)
        try:
            if any(map(_have_moved, self.model_states.values())):
                raise UsageError(
                    f"{_RELOADING}: experts have moved, and vLLM loads each into the slot that it had at the start; "
                    "restart with the new weights, or serve without rebalancing"
                )
            yield
        finally:
            if self.session is not None:
                self.session.unfreeze(_RELOADING)

    def _follow_window(self, log_stats: bool) -> None:
        """Have the layers count from the next pass on, or no longer: as in vLLM only what a plan is made from."""
        assert self.session is not None
        is_recording = self.session.is_recording or log_stats
        if is_recording == self._is_recording:
            return
        if is_recording:
            self._engine.forget_pass()  # of passes before, such as those of a warm-up
        self._record(is_recording)

    def _record(self, is_recording: bool) -> None:
        """Have the layers count, or not."""
        self._is_recording = is_recording
        if self.should_record_tensor is not None:
            self.should_record_tensor.fill_(is_recording)

    @property
    def _log_interval(self) -> int:
        interval: int = self.parallel_config.eplb_config.log_balancedness_interval
        return interval

    def _log_balancedness(self) -> None:
        """Log what ``log_balancedness`` promises, of the last pass; blocks in a collective, as vLLM's does."""
        group = get_ep_group()
        for counts, state in zip(self._sync_load_pass(), self.model_states.values(), strict=True):
            of_ranks = counts.reshape(len(counts), group.world_size, -1).sum(-1).float()
            average, most = (float(value) for value in _compute_eplb_load_stats(of_ranks))
            if group.rank_in_group == 0:
                logger.info(
                    "EPLB step %d, model %s: avg_tokens=%.2f, max_tokens=%d, balancedness=%.4f, %s",
                    self.expert_rearrangement_step,
                    state.model_name,
                    average,
                    most,
                    average / most if most else 0.0,
                    self.session.fsm.state.value if self.session else "none",
                )


class BackgroundEplbStateV2(BackgroundEplbState):
    """The same under vLLM's second model runner, whose ranks step after every pass of every kind."""

    is_v2_runner = True


def _have_moved(state: Any) -> bool:
    """Whether experts of a model are in other slots than at the start."""
    model = state.model
    at_start = EplbState.build_initial_global_physical_to_logical_map(
        model.num_routed_experts, model.num_redundant_experts
    )
    return bool((state.physical_to_logical_map.cpu() != torch.tensor(at_start)).any())


def _num_nodes() -> int:
    """Nodes of the expert-parallel group; 1 where its ranks do not divide among them, as in vLLM."""
    nodes: int = get_node_count()
    return nodes if get_ep_group().world_size % nodes == 0 else 1
