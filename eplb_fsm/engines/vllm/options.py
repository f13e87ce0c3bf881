"""From vLLM's configuration to this library's options, and what of vLLM cannot be rebalanced by it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from eplb_fsm.config import ENV_PREFIX, RebalanceConfig
from eplb_fsm.engines.contract import refuse_weighted_shares
from eplb_fsm.errors import ConfigError


class Layout(NamedTuple):
    """What only the running engine knows.

    Attributes:
        num_nodes: Nodes of the expert-parallel group.
        num_groups: Expert groups of the model.
        num_redundant_experts: Of each MoE layer.
    """

    num_nodes: int
    num_groups: int
    num_redundant_experts: int


def make_config(eplb_config: Any, layout: Layout, environ: Mapping[str, str]) -> RebalanceConfig:
    """Translate ``--eplb-config``, field by field; variables ``EPLB_FSM_<OPTION>`` win over it.

    ``use_async=False`` is our synchronous mode. ``communicator`` and ``enable_migration_batching`` say how vLLM's own
    transfer works; ours has a group of its own and needs neither. Balancedness is logged as vLLM logs it.

    Args:
        eplb_config: vLLM's ``EPLBConfig``.
        layout: What only the running engine knows.
        environ: Usually ``os.environ``.

    Raises:
        ConfigError: An option that cannot work.
    """
    options = {
        "mode": "async" if eplb_config.use_async else "sync",
        "step_interval": eplb_config.step_interval,
        "window_size": eplb_config.window_size,
        **layout._asdict(),
    }
    ours = {name: value for name, value in options.items() if ENV_PREFIX + name.upper() not in environ}
    config = RebalanceConfig.from_env(environ, **ours)
    refuse_weighted_shares(config, "ranks of vLLM that share a batch compute the same tokens")
    return config


def check_supported(vllm_config: Any, *, is_v2_runner: bool) -> None:
    """Refuse engines whose ranks do not step alike, or whose choices would be dropped.

    Args:
        vllm_config: vLLM's configuration.
        is_v2_runner: Whether its second model runner drives the ranks.

    Raises:
        ConfigError: Naming what to change.
    """
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    is_pooling = getattr(model, "runner_type", "generate") == "pooling"
    refused = {
        f"--pipeline-parallel-size {parallel.pipeline_parallel_size} with the V1 model runner, where only the last "
        "stage steps after a pass": parallel.pipeline_parallel_size > 1 and not is_v2_runner,
        "--weight-transfer-config, since vLLM loads each expert into the slot that it had at the start": (
            getattr(vllm_config, "weight_transfer_config", None) is not None
        ),
        "--enable-sleep-mode, since experts may be in transfer when their memory goes": getattr(
            model, "enable_sleep_mode", False
        ),
        "a pooling model with the V1 model runner, which does not step after a pass": is_pooling and not is_v2_runner,
        f"--eplb-config policy={parallel.eplb_config.policy!r}; choose a policy of eplb_fsm in {ENV_PREFIX}POLICY, and "
        "leave this one at 'default'": parallel.eplb_config.policy != "default",
    }
    reasons = [reason for reason, is_so in refused.items() if is_so]
    if reasons:
        raise ConfigError("vLLM cannot rebalance with eplb_fsm: " + "; ".join(reasons))
