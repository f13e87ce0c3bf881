"""Checks what an engine hands over, and builds the parts that it did not bring itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from eplb_fsm.config import MIB, RebalanceConfig
from eplb_fsm.errors import BankError, ConfigError, PlacementError
from eplb_fsm.placement.placement import Placement
from eplb_fsm.placement.plan import BankShape, Budget
from eplb_fsm.placement.policies import get_policy
from eplb_fsm.placement.task import PlanTask
from eplb_fsm.placement.topology import Topology
from eplb_fsm.placement.worth import Thresholds
from eplb_fsm.runtime.bank import Bank
from eplb_fsm.runtime.channel import PiggybackVoteChannel, VoteChannel
from eplb_fsm.runtime.domain import Domain
from eplb_fsm.runtime.planner import InlinePlanner, Planner, ProcessPlanner
from eplb_fsm.runtime.transport import GlooTransport, Transport

_AUTO_COMMIT_BYTES, _AUTO_COMMIT_BYTES_ON_DEVICE = 4 * MIB, 8 * MIB
"""A millisecond of a processor's time to copy, and some microseconds of an accelerator's. Chunks half as large make the
longest step half as long on a processor and no shorter on an accelerator, and an epoch that moves much twice as long
(``python -m tests.benchmarks.pause``)."""


def plan_task(config: RebalanceConfig, domain: Domain, banks: Sequence[Bank]) -> PlanTask:
    """Return what the planner needs to know for good.

    Raises:
        ConfigError: If policy, nodes, groups and ranks do not fit together.
    """
    policy = get_policy(config.policy, config.target_balancedness, config.replica_split)
    if config.plan_source == "every_rank" and not policy.deterministic:
        raise ConfigError(
            f"plan_source = 'every_rank': policy {config.policy!r} does not declare itself deterministic, so the ranks "
            "could compute different plans; choose plan_source = 'lowest_rank'"
        )
    shapes = tuple(BankShape(bank.name, (bank.layout.stride,) * bank.num_moe_layers) for bank in banks)
    return PlanTask(
        policy=config.policy,
        topology=Topology(domain.world_size, config.num_nodes, config.num_groups, config.cross_node_price),
        shapes=shapes,
        budget=Budget(_commit_bytes(config, banks), config.staging_buffers, config.max_epoch_bytes),
        thresholds=Thresholds(
            config.min_gain, config.trigger_balancedness, config.horizon_steps, config.moe_time_share
        ),
        target_balancedness=config.target_balancedness,
        replica_split=config.replica_split,
    )


def _commit_bytes(config: RebalanceConfig, banks: Sequence[Bank]) -> int:
    if config.commit_bytes != "auto":
        return config.commit_bytes
    usual = _AUTO_COMMIT_BYTES if banks[0].device.type == "cpu" else _AUTO_COMMIT_BYTES_ON_DEVICE
    return max(usual, *(bank.layout.stride for bank in banks))


def make_planner(config: RebalanceConfig, domain: Domain, task: PlanTask) -> Planner | None:
    """Return the planner of this rank; None where it receives its plans."""
    if config.plan_source == "lowest_rank" and domain.rank != 0:
        return None
    if config.planner == "thread" or config.mode == "sync":
        return InlinePlanner(task)
    return ProcessPlanner(task, start_timeout_s=config.start_timeout_s, plan_timeout_s=config.plan_timeout_s)


def check_banks(
    config: RebalanceConfig, domain: Domain, banks: Sequence[Bank], placements: Sequence[Placement]
) -> None:
    """Refuse banks and placements that do not fit each other and the ranks.

    Raises:
        BankError: A bank that does not fit the ranks.
        PlacementError: A placement that does not fit its bank.
        ConfigError: Options that do not fit the banks.
    """
    if not banks:
        raise BankError("no bank was registered; register the expert tensors of at least one model")
    if len(placements) != len(banks):
        raise PlacementError(f"{len(placements)} placements for {len(banks)} banks; give one placement for each bank")
    for bank, placement in zip(banks, placements, strict=True):
        bank.check_ranks(domain.world_size)
        _check_placement(bank, placement, config, domain)


def check_links(
    config: RebalanceConfig, banks: Sequence[Bank], transport: Transport | None, channel: VoteChannel | None
) -> None:
    """Refuse a transport or a channel that does not fit the banks or the mode; None stands for the default.

    Raises:
        BankError: A bank whose memory the transport cannot move.
        ConfigError: A transport or channel that does not fit the mode.
    """
    flags = GlooTransport.flags if transport is None else transport.flags
    if not flags.is_device_direct:
        _check_memory(banks)
    if flags.enqueues_on_decode_thread:
        raise ConfigError(
            "this transport must be driven from step(), which the worker cannot do; use one that the worker drives"
        )
    if config.mode == "sync" and isinstance(channel, PiggybackVoteChannel):
        raise ConfigError(
            "mode = 'sync' needs several rounds in one step, and a piggyback channel carries one in each forward pass; "
            "use the mesh or gloo channel or mode = 'async'"
        )


def _check_placement(bank: Bank, placement: Placement, config: RebalanceConfig, domain: Domain) -> None:
    wanted = (bank.num_moe_layers, bank.num_physical_experts, bank.num_logical_experts, domain.world_size)
    seen = (
        placement.num_moe_layers,
        placement.num_physical_experts,
        placement.num_logical_experts,
        placement.num_ranks,
    )
    if wanted != seen:
        raise PlacementError(
            f"bank {bank.name!r} has (layers, physical experts, logical experts, ranks) = {wanted}, its placement "
            f"{seen}; make the placement for this model and these ranks"
        )
    if placement.num_redundant_experts != config.num_redundant_experts:
        raise ConfigError(
            f"num_redundant_experts = {config.num_redundant_experts}: bank {bank.name!r} has "
            f"{placement.num_redundant_experts} redundant experts; set the option to that"
        )


def _check_memory(banks: Sequence[Bank]) -> None:
    """Rows are staged from and to one device: the host, or what this torch calls its accelerator."""
    device = banks[0].device
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device.type not in ("cpu", accelerator.type if accelerator else "cpu"):
        raise BankError(
            f"bank {banks[0].name!r} is on {device}, from which rows cannot be staged: it is neither host memory nor "
            f"this torch's accelerator ({accelerator or 'it has none'}); register the tensors that the kernels read"
        )
    for bank in banks:
        for layer in bank.tensors:
            for name, tensor in layer.items():
                if tensor.device != device:
                    raise BankError(
                        f"bank {bank.name!r}: tensor {name!r} is on {tensor.device} and others are on {device}; all "
                        "banks of a domain must be on one device of the rank"
                    )
