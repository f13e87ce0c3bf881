"""Several faults of any kind at any rank and step: no invariant breaks, whatever they do to each other."""

from __future__ import annotations

from collections.abc import Callable

from clusters import Recorded, config
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from eplb_fsm.simulate.cluster import SimulatedRank

MUST_GO_ON = 150
"""Steps that every rank makes that still runs."""


def faults(run: Recorded) -> dict[str, Callable[[SimulatedRank], object]]:
    """What can happen to a rank, by name."""
    return {
        "crash": lambda it: run.cluster.crash(it.rank),
        "close": lambda it: run.cluster.close(it.rank),
        "lose the channel": lambda it: setattr(it.channel, "is_lost", True),
        "hold its rounds": lambda it: setattr(it.channel, "held_from", it.fsm._core.round_idx),
        "deliver its rounds": lambda it: setattr(it.channel, "held_from", 1 << 62),
        "damage parcels": lambda it: setattr(it.faults, "damages_parcels", True),
        "stop the worker": lambda it: setattr(it.faults, "is_worker_stuck", True),
        "let the worker go on": lambda it: setattr(it.faults, "is_worker_stuck", False),
        "fail the policy": lambda it: setattr(it.faults, "policy_error", "no"),
        "fail to prepare maps": lambda it: it.faults.map_error.append("prepare"),
        "fail to write maps": lambda it: it.faults.map_error.append("write"),
        "fail the exchange": lambda it: it.faults.failing.append("begin"),
        "ask to abort": lambda it: it.fsm.request_abort(),
        "ask to freeze": lambda it: it.fsm.request_freeze(),
        "ask to stop": lambda it: it.fsm.request_stop(),
    }


KINDS = tuple(faults(None))  # type: ignore[arg-type]
PLANS = st.lists(st.tuples(st.integers(0, 3), st.integers(25, 80), st.sampled_from(KINDS)), min_size=1, max_size=4)


@given(
    seed=st.integers(0, 2**32),
    num_ranks=st.integers(2, 4),
    lag=st.integers(1, 3),
    buffers=st.integers(1, 3),
    ahead=st.integers(0, 2),
    worker_share=st.sampled_from([0.2, 0.5, 0.8]),
    plan=PLANS,
)
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
def test_any_faults_at_any_time(
    seed: int,
    num_ranks: int,
    lag: int,
    buffers: int,
    ahead: int,
    worker_share: float,
    plan: list[tuple[int, int, str]],
) -> None:
    """After up to four faults all invariants hold, no pass is torn, and whoever still runs goes on stepping."""
    run = Recorded(
        num_ranks,
        seed=seed,
        lag=lag,
        is_lockstep=False,
        max_passes_ahead=ahead,
        options=config(staging_buffers=buffers, drain_deadline_steps=40, transfer_slack_steps=40),
    )
    run.cluster.worker_share = worker_share
    for rank, step, kind in plan:
        run.cluster.at(rank % num_ranks, step, faults(run)[kind])
    run.cluster.run_steps(MUST_GO_ON, max_actions=200_000)
    run.check(same_outcomes=False)
