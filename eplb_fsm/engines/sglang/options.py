"""From SGLang's server arguments to this library's options, and what cannot be rebalanced in the background."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eplb_fsm.config import ENV_PREFIX, RebalanceConfig
from eplb_fsm.engines.contract import refuse_weighted_shares
from eplb_fsm.errors import ConfigError

_POLICIES = {
    "auto": "movement_aware",
    "deepseek": "deepseek_global",
    "deepseek_hierarchical": "deepseek_hierarchical",
    # With elastic EP SGLang allows no others; they matter to its own recovery, which goes on using them.
    "elasticity_aware": "movement_aware",
    "elasticity_aware_hierarchical": "movement_aware",
}
"""SGLang's ``--eplb-algorithm`` -> our policy."""


def make_config(moe: Any, parallel: Any, num_groups: int | None, environ: Mapping[str, str]) -> RebalanceConfig:
    """Translate SGLang's arguments; variables ``EPLB_FSM_<OPTION>`` win over them.

    Args:
        moe: SGLang's published arguments of MoE layers, ``get_exec().moe``.
        parallel: Its widths and ranks, ``get_parallel()``.
        num_groups: Expert groups of the model; None: it has none.
        environ: Usually ``os.environ``.

    Raises:
        ConfigError: An option that cannot work, or an algorithm that only SGLang has.
    """
    options = {
        "step_interval": moe.eplb_rebalance_num_iterations,
        "window_size": _window_size(moe),
        "num_redundant_experts": moe.ep_num_redundant_experts,
        "num_nodes": parallel.nnodes,
        "num_groups": num_groups or 1,
        "trigger_balancedness": moe.eplb_min_rebalancing_utilization_threshold,
        "policy": _POLICIES.get(moe.eplb_algorithm, ""),
    }
    ours = {name: value for name, value in options.items() if ENV_PREFIX + name.upper() not in environ}
    if ours.get("policy") == "":
        raise ConfigError(
            f"--eplb-algorithm {moe.eplb_algorithm}: in the background there are {', '.join(_POLICIES)}; choose one of "
            f"them, or name a policy of eplb_fsm in {ENV_PREFIX}POLICY"
        )
    config = RebalanceConfig.from_env(environ, **ours)
    if moe.moe_a2a_backend == "none":
        refuse_weighted_shares(config, "without --moe-a2a-backend all ranks of SGLang compute the same tokens")
    return config


def check_supported(moe: Any, parallel: Any) -> None:
    """Refuse what would not be moved, or not be moved well.

    Args:
        moe: As for :func:`make_config`.
        parallel: As for :func:`make_config`.

    Raises:
        ConfigError: Naming the argument and what to change.
    """
    refused = {
        "start with --enable-eplb, which makes SGLang count the load of experts": not moe.enable_eplb,
        f"--expert-distribution-recorder-mode {moe.expert_distribution_recorder_mode} does not count each expert's "
        "tokens in every pass; leave it out": moe.expert_distribution_recorder_mode not in ("stat", "stat_approx"),
        "--expert-distribution-recorder-buffer-size -1 keeps every pass for good; leave it out": (
            (moe.expert_distribution_recorder_buffer_size or 0) < 0
        ),
        "--ep-dispatch-algorithm lp keeps solvers of its own for the map; use static or dynamic": (
            moe.ep_dispatch_algorithm == "lp"
        ),
        f"--ep-size {parallel.ep_size} with --tp-size {parallel.tp_size} divides each expert among ranks; use the same "
        "number for both": parallel.ep_size != parallel.tp_size,
        "a rank that joins an expert-parallel group that serves (--ep-join-mode) cannot agree with the others": (
            bool(moe.ep_join_mode)
        ),
    }
    reasons = [reason for reason, is_so in refused.items() if is_so]
    if reasons:
        raise ConfigError("SGLang cannot rebalance in the background: " + "; ".join(reasons))


def _window_size(moe: Any) -> int:
    """Passes that SGLang's recorder keeps, by default those between two rebalances."""
    return int(moe.expert_distribution_recorder_buffer_size or moe.eplb_rebalance_num_iterations)
