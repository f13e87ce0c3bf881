"""Where experts are, where they should be, and the way there. Needs numpy, imports no torch."""

from eplb_fsm.placement.balancedness import balancedness, balancedness_summary, rank_loads
from eplb_fsm.placement.chunks import Chunk
from eplb_fsm.placement.placement import Placement
from eplb_fsm.placement.plan import Plan, live_digest
from eplb_fsm.placement.planning import make_plan
from eplb_fsm.placement.policies import RebalancePolicy, get_policy, policy_names, register_policy
from eplb_fsm.placement.shapes import BankShape, Budget
from eplb_fsm.placement.topology import Topology
from eplb_fsm.placement.worth import Costs, Thresholds

__all__ = [
    "BankShape",
    "Budget",
    "Chunk",
    "Costs",
    "Placement",
    "Plan",
    "RebalancePolicy",
    "Thresholds",
    "Topology",
    "balancedness",
    "balancedness_summary",
    "get_policy",
    "live_digest",
    "make_plan",
    "policy_names",
    "rank_loads",
    "register_policy",
]
