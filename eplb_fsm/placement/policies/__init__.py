"""Rebalance policies: the protocol, the registry, the movement-aware policy, and DeepSeek's published method."""

from eplb_fsm.placement.policies.deepseek import DeepseekPolicy
from eplb_fsm.placement.policies.movement_aware import MovementAwarePolicy
from eplb_fsm.placement.policies.protocol import RebalancePolicy, minds_speeds
from eplb_fsm.placement.policies.refined import RefinedPolicy
from eplb_fsm.placement.policies.registry import get_policy, policy_names, register_policy

__all__ = [
    "DeepseekPolicy",
    "MovementAwarePolicy",
    "RebalancePolicy",
    "RefinedPolicy",
    "get_policy",
    "minds_speeds",
    "policy_names",
    "register_policy",
]
