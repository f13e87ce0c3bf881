"""What stands in for a GPU worker under the engine cores that vLLM starts for data parallelism with expert parallelism.

Its runner makes forward passes of a small mixture of experts, whose layers meet the other rank in collectives as an
all-to-all would, and steps the rebalance with the second model runner's own controller and decorators, where that
runner has them: after `sample_tokens` and after `_dummy_run`.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from dp_model import HIDDEN, NUM_LAYERS, TOP_K, VOCABULARY, Experts, Routed, Weights
from vllm.config import set_current_vllm_config
from vllm.distributed.eplb.eplb_state import EplbLayerState
from vllm.distributed.parallel_state import get_ep_group
from vllm.model_executor.models.interfaces import MixtureOfExperts
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput
from vllm.v1.worker.gpu import eplb_utils
from vllm.v1.worker.gpu_worker import init_worker_distributed_environment
from vllm.v1.worker.worker_base import CompilationTimes, WorkerBase
from vllm_on_cpu.routing import map_and_record

MAX_TOKENS = 64
"""Of a pass on one rank."""
_MIB = 1 << 20
_STEPPED_DUMMIES = float(os.environ.get("DP_LOOP_STEPPED_DUMMIES", "inf"))
"""The negative control: after so many dummy passes, there are no steps after others."""


class InProcess(UniProcExecutor):
    """vLLM's executor with the worker in the engine core's process, under a name that is not replaced on CPUs."""


class ServedExperts(Experts, MixtureOfExperts):
    """What vLLM takes for a mixture of experts."""


@dataclass
class Counts:
    """What a rank did, by kind of pass: "real", "dummy" or "profile"."""

    passes: dict[str, int] = field(default_factory=dict)
    routed: dict[str, int] = field(default_factory=dict)
    wrong: int = 0
    """Tokens to which the experts gave another result than the whole model's."""

    def add(self, kind: str, num_choices: int) -> None:
        """Count a pass."""
        self.passes[kind] = self.passes.get(kind, 0) + 1
        self.routed[kind] = self.routed.get(kind, 0) + num_choices


class Runner:
    """What of the second model runner concerns the rebalance.

    Args:
        vllm_config: vLLM's configuration.
    """

    supports_mm_inputs = False

    def __init__(self, vllm_config: Any) -> None:
        self.model_config = vllm_config.model_config
        self.eplb = eplb_utils.EPLBController(vllm_config.parallel_config, torch.device("cpu"))
        self.counts = Counts()
        self._whole = Weights()
        self._sequences: dict[str, list[int]] = {}
        self._scheduled: list[tuple[str, int, int]] = []
        self._hidden = torch.empty(0)

    def load_model(self) -> None:
        """Load the experts and start what rebalances them, in the order of vLLM's runner."""
        self.eplb.prepare_load()
        group = get_ep_group()
        self.model = ServedExperts(self._whole, group.rank_in_group, group.world_size)
        for layer in self.model.moe_layers:
            layer.eplb_state = EplbLayerState()
        self.eplb.maybe_start_async_loop(self.eplb.maybe_register_model(self.model, self.model_config))

    def execute_model(self, scheduled: Any) -> ModelRunnerOutput | None:
        """Make the forward pass of a batch, unless it is empty."""
        for name in scheduled.finished_req_ids:
            self._sequences.pop(name, None)
        for request in scheduled.scheduled_new_reqs:
            self._sequences[request.req_id] = list(request.prefill_token_ids or request.prompt_token_ids)
        if not scheduled.total_num_scheduled_tokens:
            return EMPTY_MODEL_RUNNER_OUTPUT
        cached = scheduled.scheduled_cached_reqs
        starts = {request.req_id: request.num_computed_tokens for request in scheduled.scheduled_new_reqs}
        starts.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        self._scheduled = [
            (name, starts[name], starts[name] + count) for name, count in scheduled.num_scheduled_tokens.items()
        ]
        rows = [(self._sequences[name][at], at) for name, start, end in self._scheduled for at in range(start, end)]
        self._hidden = self._forward(torch.tensor(rows), "real")
        return None

    @eplb_utils.step_eplb_after()
    def sample_tokens(self, grammar_output: Any) -> ModelRunnerOutput:
        """Take the likeliest token of each sequence that has been computed to its end; then the step is made."""
        sampled: list[list[int]] = []
        row = -1
        for name, start, end in self._scheduled:
            row += end - start
            sequence = self._sequences[name]
            tokens = [int(self._whole.sample(self._hidden[row]))] if end == len(sequence) else []
            sequence.extend(tokens)
            sampled.append(tokens)
        names = [name for name, _, _ in self._scheduled]
        return ModelRunnerOutput(names, {name: index for index, name in enumerate(names)}, sampled)

    @eplb_utils.step_eplb_after(is_dummy=True)
    def _dummy_run(self, num_tokens: int, *, is_profile: bool = False) -> None:
        rows = torch.arange(num_tokens)[:, None].expand(-1, 2) % VOCABULARY
        self._forward(rows, "profile" if is_profile else "dummy")

    def _forward(self, rows: torch.Tensor, kind: str) -> torch.Tensor:
        self.eplb.prepare_forward(self.model_config, len(rows))
        hidden = wanted = self._whole.embed(rows[:, 0], rows[:, 1])
        for layer in range(NUM_LAYERS):
            hidden = hidden + self._run_layer(layer, self._whole.route(layer, hidden))
            wanted = wanted + self._whole.apply(layer, self._whole.route(layer, wanted))
        self.counts.add(kind, len(rows) * TOP_K * NUM_LAYERS)
        self.counts.wrong += int((~torch.isclose(hidden, wanted).all(-1)).sum())
        return hidden

    def _run_layer(self, layer: int, routed: Routed) -> torch.Tensor:
        """Take the tokens of all ranks through the local slots, and this rank's tokens through all slots."""
        module = self.model.moe_layers[layer]
        physical = map_and_record(routed.experts, **_tables(module.eplb_state))
        everyones = _gather(routed._replace(experts=physical))
        output = module.forward_modular(everyones.hidden, everyones.shares, everyones.experts)
        group = get_ep_group()
        dist.all_reduce(output, group=group.cpu_group)
        return output[group.rank_in_group * MAX_TOKENS :][: len(physical)]


def _tables(state: EplbLayerState) -> dict[str, Any]:
    return {
        "expert_load_view": state.expert_load_view,
        "logical_to_physical_map": state.logical_to_physical_map,
        "logical_replica_count": state.logical_replica_count,
        "record_enabled": state.should_record_tensor,
        "num_unpadded_tokens": state.num_unpadded_tokens_tensors[0],
    }


def _gather(routed: Routed) -> Routed:
    """The tokens of all ranks, `MAX_TOKENS` rows for each rank; a row without a token goes to no expert."""
    group = get_ep_group()
    mine = torch.zeros(MAX_TOKENS, HIDDEN + 2 * TOP_K, dtype=torch.float64)
    mine[:, HIDDEN : HIDDEN + TOP_K] = -1
    mine[: len(routed.hidden)] = torch.cat([routed.hidden, routed.experts.double(), routed.shares], dim=1)
    everyones = torch.empty(group.world_size * MAX_TOKENS, mine.shape[1], dtype=torch.float64)
    dist.all_gather_into_tensor(everyones, mine, group=group.cpu_group)
    hidden, experts, shares = everyones.split([HIDDEN, TOP_K, TOP_K], dim=1)
    return Routed(hidden.contiguous(), experts.long(), shares)


class Worker(WorkerBase):
    """The calls of vLLM's engine core that reach a worker in this test."""

    model_runner: Any

    def init_device(self) -> None:
        """Join the process groups that vLLM makes of all data-parallel ranks."""
        os.environ["VLLM_DIST_IDENT"] = os.path.basename(self.distributed_init_method)  # as vLLM's worker for CPUs
        init_worker_distributed_environment(
            self.vllm_config, self.rank, self.distributed_init_method, self.local_rank, "gloo"
        )
        self.model_runner = Runner(self.vllm_config)

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        """As vLLM's."""
        with set_current_vllm_config(self.vllm_config):
            self.model_runner.load_model()

    def get_kv_cache_spec(self) -> dict[str, FullAttentionSpec]:
        """One layer, so that the scheduler has blocks to hand out; nobody allocates them."""
        block_size = self.cache_config.block_size
        return {"layer": FullAttentionSpec(block_size=block_size, num_kv_heads=1, head_size=8, dtype=torch.float32)}

    def determine_available_memory(self) -> int:
        """Make the profiling pass that precedes serving."""
        self.model_runner._dummy_run(MAX_TOKENS, is_profile=True)
        return _MIB

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """There is no cache."""

    def compile_or_warm_up_model(self) -> CompilationTimes:
        """There is nothing to warm up."""
        return CompilationTimes(0.0, 0.0)

    def get_supported_tasks(self) -> tuple[str, ...]:
        """As vLLM's."""
        return ("generate",)

    def reset_encoder_cache(self) -> None:
        """There is none."""

    def execute_model(self, scheduler_output: Any) -> ModelRunnerOutput | None:
        """As vLLM's."""
        output: ModelRunnerOutput | None = self.model_runner.execute_model(scheduler_output)
        return output

    def sample_tokens(self, grammar_output: Any) -> ModelRunnerOutput:
        """As vLLM's."""
        output: ModelRunnerOutput = self.model_runner.sample_tokens(grammar_output)
        return output

    def execute_dummy_batch(self) -> None:
        """As vLLM's; the negative control leaves steps out."""
        if self.model_runner.counts.passes.get("dummy", 0) >= _STEPPED_DUMMIES:
            Runner._dummy_run.__wrapped__(self.model_runner, 1)  # type: ignore[attr-defined]
        else:
            self.model_runner._dummy_run(1)

    def look(self) -> dict[str, Any]:
        """What the test looks at."""
        runner = self.model_runner
        (state,) = runner.eplb.state.model_states.values()
        fsm = runner.eplb.state.session.fsm
        load = fsm._parts.load_source
        load._fold()
        health = fsm.health()
        return {
            **asdict(runner.counts),
            "counted": int(load._total.sum()) + int(state.expert_load_pass.sum()),
            "steps": health.step_idx,
            "state": health.state,
            "outcomes": dict(health.num_outcomes),
            "why_stopped": health.why_stopped,
            "is_worker_alive": health.is_worker_alive,
            "map": state.physical_to_logical_map.tolist(),
            "placement": fsm.placements[0].physical_to_logical_map.tolist(),
        }
