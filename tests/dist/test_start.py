"""Ranks that start differently, too late or not at all: one clear error on every rank, and nothing left behind."""

from __future__ import annotations

import time
import weakref
from typing import Any

import pytest
import torch

from eplb_fsm import Bank, Placement, RebalanceFSM
from eplb_fsm.errors import ConsensusTimeout, PeerFailed
from eplb_fsm.runtime.failstop import raise_error
from tests.dist.decode import SHAPE, DecodeLoop, config_of, num_sockets, own_children, own_threads
from tests.dist.harness import RankLink, run_ranks


def _initial(world_size: int) -> Placement:
    return Placement.initial(SHAPE.num_moe_layers, SHAPE.num_logical_experts, SHAPE.num_physical_experts, world_size)


def _bank(world_size: int, words: int = 4, name: str = "target", dtype: torch.dtype = torch.int64) -> Bank:
    local = SHAPE.num_physical_experts // world_size
    tensors = [{"w13": torch.zeros(local, words, dtype=dtype)} for _ in range(SHAPE.num_moe_layers)]
    return Bank(name, SHAPE.num_logical_experts, SHAPE.num_physical_experts, tensors)


def _connect(link: RankLink, **changes: Any) -> RebalanceFSM:
    world_size = changes.pop("world_size", link.world_size)
    placement = changes.pop("placement", _initial(link.world_size))
    bank = changes.pop("bank", None) or _bank(link.world_size)
    further = changes.pop("connect", {})
    return RebalanceFSM.connect(
        link.store(), link.rank, world_size, [bank], [placement], config_of(**changes), fail_stop=raise_error, **further
    )


_DIFFERENT: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "option": ({}, {"step_interval": 500}, ["step_interval is 0 on rank 0, 500 on rank 1"]),
    "options": (
        {"lag": 3},
        {"integrity": "slot"},
        ["lag is 3 on rank 0, 2 on rank 1", "integrity is 'wire' on rank 0"],
    ),
    "mode": ({}, {"mode": "sync"}, ["mode is 'async' on rank 0, 'sync' on rank 1"]),
}


def _start_differently(link: RankLink) -> list[tuple[str, str, bool]]:
    """Try every pair; return what was raised, and whether nothing was connected."""
    found = []
    store = link.store()
    shuffled = _initial(2).with_layer(1, [*range(7, -1, -1), 0, 1, 2, 3])
    rows = [_bank(2, 4), _bank(2, 5)]
    kinds = [torch.int64, torch.float64]
    cases = [
        *[changes[link.rank] for _, changes in sorted((k, v[:2]) for k, v in _DIFFERENT.items())],
        {"placement": shuffled if link.rank else _initial(2)},
        {"bank": rows[link.rank]},
        {"bank": _bank(2, dtype=kinds[link.rank])},
        {"bank": _bank(2, name=["target", "draft"][link.rank])},
        {"world_size": 2 + 2 * link.rank, "bank": _bank(2 + 2 * link.rank), "placement": _initial(2 + 2 * link.rank)},
    ]
    for number, case in enumerate(cases):
        store.add(f"test/{number}", 1)
        while store.add(f"test/{number}", 0) < 2:
            time.sleep(0.005)
        begun = time.monotonic()
        try:
            _connect(link, **case, connect={"generation": number}).close()
            found.append(("nothing", "", False))
        except Exception as error:
            is_quick = time.monotonic() - begun < 20
            made = store.check([f"eplb/{number}/vote/{link.rank}"])
            found.append((type(error).__name__, str(error), is_quick and not made and not own_threads()))
    return found


def test_ranks_started_differently_say_so_on_all_ranks() -> None:
    """Other options, placements, shapes, dtypes, banks, ranks: every rank names the difference, and none connects."""
    first, second = run_ranks(2, _start_differently)
    wanted = [words for _, (_, _, words) in sorted(_DIFFERENT.items())]
    wanted += [
        ["bank 0: digest of the placement is"],
        ["bank 0: layer 0 is 'w13 torch.int64 [6, 4]' on rank 0, 'w13 torch.int64 [6, 5]' on rank 1"],
        ["w13 torch.float64"],
        ["bank 0: name is 'target' on rank 0, 'draft' on rank 1"],
        ["world_size is 2 on rank 0, 4 on rank 1"],
    ]
    for (kind, said, is_clean), words in zip(first, wanted, strict=True):
        assert kind == "ConfigMismatch"
        assert is_clean, said
        assert all(word in said for word in words), said
    assert first[:-1] == second[:-1]
    kind, said, is_clean = second[-1]  # this rank waits for two more, and hears that rank 0 gave up
    assert kind == "PeerFailed"
    assert is_clean
    assert "rank 0 could not start: ConfigMismatch: " in said


def _one_cannot(link: RankLink, how: str) -> tuple[str, str, tuple[int, ...], list[str], list[str]]:
    changes: dict[str, Any] = {}
    if link.rank == 1:
        if how == "bank":
            changes["bank"] = Bank("target", 8, 12, [{"w13": torch.zeros(7, 4)}] * SHAPE.num_moe_layers)
        elif how == "commit_bytes":
            changes["commit_bytes"] = 32
        elif how == "policy":
            changes["policy"] = "tests.dist.policies:Broken"
    try:
        _connect(link, **changes).close()
    except Exception as error:
        time.sleep(0.1)
        return type(error).__name__, str(error), getattr(error, "ranks", ()), own_threads(), own_children()
    return "nothing", "", (), own_threads(), own_children()


@pytest.mark.parametrize(
    ("how", "kind", "words"),
    [
        ("bank", "BankError", "7 rows on each of 2 ranks are not num_physical_experts = 12"),
        ("commit_bytes", "ConfigError", "commit_bytes = 32: one expert takes 40 bytes"),
        ("policy", "ConfigError", "no licence for this policy"),
    ],
)
def test_a_rank_that_fails_its_checks_tells_the_others(how: str, kind: str, words: str) -> None:
    """The rank raises its own error, the others at once one that names it and its message; nothing is left."""
    results = run_ranks(2, _one_cannot, how)
    assert results[1][0] == kind
    assert words in results[1][1]
    assert results[0][0] == "PeerFailed"
    assert results[0][2] == (1,)
    assert f"rank 1 could not start: {kind}: " in results[0][1]
    assert words in results[0][1]
    assert all(not threads and not children for *_, threads, children in results)


def _planner_cannot(link: RankLink) -> tuple[str, str, list[str], list[str]]:
    """The check of the policy passes in this process, and the planner's process finds nothing under its name."""
    from eplb_fsm.placement.policies import register_policy
    from tests.dist.policies import Shuffled

    register_policy(Shuffled(), "only here")
    try:
        _connect(link, policy="only here", planner="process").close()
    except Exception as error:
        return type(error).__name__, str(error), own_threads(), own_children()
    return "nothing", "", [], []


def test_a_planner_process_that_cannot_start_is_an_error_on_all_ranks() -> None:
    """A policy that only the parent knows ends the start on the planning rank, and the others hear why."""
    planning, other = run_ranks(2, _planner_cannot)
    assert planning[0] == "ConfigError"
    assert "only here" in planning[1]
    assert other[0] == "PeerFailed"
    assert "rank 0 could not start: ConfigError: unknown policy 'only here'" in other[1]
    assert planning[2:] == other[2:] == ([], [])


def _absent(link: RankLink) -> tuple[str, tuple[int, ...], str]:
    if link.rank == 1:
        return "", (), ""
    try:
        _connect(link, start_timeout_s=4.0)
    except ConsensusTimeout as error:
        return "connect", error.ranks, str(error)
    return "nothing", (), ""


def test_ranks_that_do_not_come_are_named() -> None:
    """After start_timeout_s the ranks that came say which did not."""
    for rank, (where, ranks, said) in enumerate(run_ranks(4, _absent)):
        if rank != 1:
            assert where == "connect"
            assert ranks == (1,), said
            assert "raise start_timeout_s" in said


def _closed_before_arm(link: RankLink) -> list[str]:
    said = []
    fsm = _connect(link)
    if link.rank == 1:
        fsm.close()
        fsm.close()
        return said
    try:
        fsm.arm()
    except PeerFailed as error:
        said.append(str(error))
    fsm.close()
    try:
        _connect(link)
    except Exception as error:
        said.append(f"{type(error).__name__}: {error}")
    return said


def test_arm_does_not_wait_for_a_rank_that_was_closed() -> None:
    """A rank closed before arm() ends the others' arm(); and a name and generation are used only once."""
    first, _ = run_ranks(2, _closed_before_arm)
    assert "rank 1 could not start: UsageError: closed before arm()" in first[0]
    assert first[1].startswith("ConfigError: ")
    assert "give every new connection a generation" in first[1]


def _lifecycle(link: RankLink) -> list[Any]:
    """Open and close machines; return what is left of each."""
    import gc

    left: list[Any] = []
    for generation, mode in enumerate(("async", "sync", "async", "async")):
        loop = DecodeLoop(link, lockstep=False, mode=mode, planner="process", connect={"generation": generation})
        with loop.fsm as fsm:
            loop.run_steps(3)  # before arm() nothing counts
            fsm.arm()
            fsm.arm()
            before = fsm.step_idx
            loop.run_epochs(1)
            staging = fsm._parts.runner._jobs.staging
            buffers = [weakref.ref(buffer) for buffer in staging._receive + staging._send]
            gc.disable()
        assert all(buffer() is None for buffer in buffers), "the memory of the staging buffers waits for a collector"
        gc.enable()
        del staging
        fsm.close()
        loop.run_steps(2)
        assert before == 0
        del loop, fsm
        gc.collect()
        left.append((own_threads(), own_children(), num_sockets()))
    return left


def test_nothing_is_left_after_close() -> None:
    """After close(), also twice, no thread, no process and no socket of the library is left; open again and again."""
    for left in run_ranks(2, _lifecycle):
        assert all(threads == [] and children == [] for threads, children, _ in left)
        assert left[1][2] == left[2][2] == left[3][2]


def _every_rank(link: RankLink, policy: str, planner: str) -> tuple[str, list[str]]:
    try:
        loop = DecodeLoop(link, policy=policy, plan_source="every_rank", planner=planner)
    except Exception as error:
        return f"{type(error).__name__}: {error}", []
    with loop.fsm as fsm:
        fsm.arm()
        loop.run_epochs(1)
        return "", loop.outcome_names


def test_every_rank_may_plan_with_a_deterministic_policy_only() -> None:
    """Ranks plan for themselves where the policy is deterministic; one that only says so is found out by its digest."""
    for _, outcomes in run_ranks(2, _every_rank, "tests.dist.policies:Shuffled", "process"):
        assert outcomes == ["COMMITTED"]
    for error, _ in run_ranks(2, _every_rank, "tests.dist.policies:Chancy", "thread"):
        assert "does not declare itself deterministic" in error
    for _, outcomes in run_ranks(2, _every_rank, "tests.dist.policies:Differing", "thread"):
        assert outcomes == ["ABORTED(PLAN_MISMATCH)"]


def _sync_piggyback(link: RankLink) -> str:
    from eplb_fsm.runtime.channel import PiggybackVoteChannel
    from eplb_fsm.runtime.domain import Domain

    channel = PiggybackVoteChannel(Domain(link.rank, link.world_size))
    try:
        _connect(link, mode="sync", connect={"channel": channel})
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_sync_mode_refuses_a_piggyback_channel() -> None:
    """Several rounds in one step cannot ride on one collective per pass, and that is said at the start."""
    for said in run_ranks(2, _sync_piggyback):
        assert said.startswith(("ConfigError: mode = 'sync' needs several rounds", "PeerFailed: rank "))
        assert "use the mesh or gloo channel" in said
