"""Rebalance policies: the protocol, the registry, and DeepSeek's published method."""

from eplb_fsm.placement.policies.deepseek import DeepseekPolicy
from eplb_fsm.placement.policies.protocol import RebalancePolicy
from eplb_fsm.placement.policies.registry import get_policy, policy_names, register_policy

__all__ = ["DeepseekPolicy", "RebalancePolicy", "get_policy", "policy_names", "register_policy"]
