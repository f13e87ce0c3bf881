"""Who plans: this library's policies, the two baselines, and the balancers of the engines from their own wheels."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np

from eplb_fsm.offline.comparison import Planner
from eplb_fsm.placement import Placement, Topology, get_policy
from eplb_fsm.placement.balancedness import rank_loads


def own(name: str, target: float, replica_split: str = "equal") -> Planner:
    """A policy of this library."""
    policy = get_policy(name, target, replica_split)
    return lambda load, current: policy.plan(load, current, Topology(current.num_ranks))


def greedy_swap(load: np.ndarray, current: Placement) -> Placement:
    """A baseline: swap the best pair of the heaviest and the lightest rank until nothing gets better."""
    rows = current.physical_to_logical_map.copy()
    num_local = current.num_local_physical_experts
    each = load / current.logical_replica_count
    for row, share, loads in zip(rows, each, rank_loads(load, current), strict=True):
        for _ in range(len(row)):
            heavy, light = int(loads.argmax()), int(loads.argmin())
            own_slots = np.arange(heavy * num_local, (heavy + 1) * num_local)
            other_slots = np.arange(light * num_local, (light + 1) * num_local)
            sinks = share[row[own_slots]][:, None] - share[row[other_slots]][None, :]
            heavier = np.maximum(loads[heavy] - sinks, loads[light] + sinks)
            one, other = divmod(int(heavier.argmin()), num_local)
            if heavier[one, other] >= loads[heavy] * (1.0 - 1e-9):
                break
            loads[heavy] -= sinks[one, other]
            loads[light] += sinks[one, other]
            first, second = own_slots[one], other_slots[other]
            row[first], row[second] = row[second], row[first]
    return Placement(rows, current.num_logical_experts, current.num_ranks)


def no_move(load: np.ndarray, current: Placement) -> Placement:
    """A baseline: leave everything as it is."""
    return current


def peers(site_packages: Path | None) -> dict[str, Planner]:
    """The balancers of vLLM and SGLang, where their wheels are unpacked; only the files of the algorithm are loaded."""
    if site_packages is None:
        return {}
    found: dict[str, Planner] = {}
    vllm = site_packages / "vllm/distributed/eplb/policy"
    if (vllm / "default.py").exists():
        _load("vllm.distributed.eplb.policy.abstract", vllm / "abstract.py")
        found["vllm"] = _vllm(_load("vllm.distributed.eplb.policy.default", vllm / "default.py"))
    sglang = site_packages / "sglang/srt/eplb/eplb_algorithms"
    for name in ("deepseek", "deepseek_vec"):
        if (sglang / f"{name}.py").exists():
            found[f"sglang {name}"] = _sglang(_load(f"sglang_{name}", sglang / f"{name}.py"), name)
    return found


def _load(name: str, path: Path) -> ModuleType:
    """Load one file as a module of that name, and make its packages known as empty ones."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        sys.modules.setdefault(".".join(parts[:end]), ModuleType(".".join(parts[:end])))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _vllm(module: ModuleType) -> Planner:
    import torch

    def plan(load: np.ndarray, current: Placement) -> Placement:
        rows = module.DefaultEplbPolicy.rebalance_experts(
            torch.from_numpy(load),
            current.num_physical_experts,
            1,
            1,
            current.num_ranks,
            torch.from_numpy(current.physical_to_logical_map.copy()),
        )
        return Placement(np.asarray(rows, dtype=np.int64), current.num_logical_experts, current.num_ranks)

    return plan


def _sglang(module: ModuleType, name: str) -> Planner:
    import torch

    def plan(load: np.ndarray, current: Placement) -> Placement:
        counts = torch.from_numpy(load)
        if name == "deepseek":
            result = module.rebalance_experts(counts, current.num_physical_experts, 1, 1, current.num_ranks, False)
        else:
            num_local = current.num_local_physical_experts
            one_step = counts.unsqueeze(0)
            result = module.rebalance_experts(one_step, current.num_physical_experts, num_local, 1, 1, False)
        rows = result[0]
        return Placement(np.asarray(rows, dtype=np.int64), current.num_logical_experts, current.num_ranks)

    return plan
