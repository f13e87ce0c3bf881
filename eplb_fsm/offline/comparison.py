"""Planners side by side on the windows of a recording: how balanced, how many moves, how long."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from eplb_fsm.placement.balancedness import mean_over_max, rank_loads
from eplb_fsm.placement.moves import num_peer_moves
from eplb_fsm.placement.placement import Placement
from eplb_fsm.placement.split import entered_shares, table_width, turn_tables, weighted_shares
from eplb_fsm.placement.validate import Float64Array
from eplb_fsm.runtime.clock import monotonic

Planner = Callable[[Float64Array, Placement], Placement]
"""Called with the load of a window, (layers, experts), and the placement to start from."""


@dataclass
class Result:
    """What one planner did with one recording: a value for each plan that it made."""

    case: str
    planner: str
    now: list[float] = field(default_factory=list)
    """Mean balancedness over the layers, of the window that was planned for."""
    worst: list[float] = field(default_factory=list)
    """That of the worst layer."""
    ahead: list[float] = field(default_factory=list)
    """Mean balancedness of the next window, which nobody has seen; one less where the recording ends."""
    moves: list[int] = field(default_factory=list)
    """Experts that had to come from another rank."""
    duplicates: int = 0
    """Slots of the last placement whose expert has another slot on the same rank."""
    ms: list[float] = field(default_factory=list)


def run_windows(
    case: str,
    windows: Sequence[Float64Array],
    ahead: Float64Array | None,
    planners: Mapping[str, Planner],
    start: Placement,
    on_plan: Callable[[str, int], None] = lambda name, window: None,
    weighted: Collection[str] = (),
    speeds: Float64Array | None = None,
) -> list[Result]:
    """Have all planners plan for one window after the other, each going on from its own placement.

    Args:
        case: A name for the results.
        windows: The windows to plan for, each (layers, experts).
        ahead: The window after the last one; None: there is none.
        planners: By name. Each window goes to all of them before the next one, so that they share what disturbs.
        start: Where all of them start.
        on_plan: Told of each planner and window before it plans.
        weighted: Planners after whose plan each slot gets the share of its expert's tokens that balances the window
            planned for, as closely as a table says it; the next window is split by the same shares.
        speeds: By which balance is told, as for :func:`.balancedness.mean_over_max`.
    """
    results = {name: Result(case, name) for name in planners}
    current = dict.fromkeys(planners, start)
    following = [*windows[1:], *([] if ahead is None else [ahead])]
    for index, load in enumerate(windows):
        for name, plan in planners.items():
            on_plan(name, index)
            result = results[name]
            began = monotonic()
            planned = plan(load, current[name])
            result.ms.append((monotonic() - began) * 1e3)
            shares = _shares(load, planned, speeds) if name in weighted else None
            layers = mean_over_max(rank_loads(load, planned, shares), speeds)
            result.now.append(float(layers.mean()))
            result.worst.append(float(layers.min()))
            if index < len(following):
                result.ahead.append(float(mean_over_max(rank_loads(following[index], planned, shares), speeds).mean()))
            result.moves.append(num_peer_moves(current[name], planned))
            result.duplicates = num_duplicates(planned)
            current[name] = planned
    return list(results.values())


def _shares(load: Float64Array, placement: Placement, speeds: Float64Array | None) -> Float64Array:
    """The weighted shares as an engine gets them, rounded to the entries of its tables."""
    width = table_width(placement, is_weighted=True)
    shares = weighted_shares(load, placement, speeds=speeds)
    tables = turn_tables(placement, range(placement.num_moe_layers), shares, width)
    return entered_shares(tables, placement.num_physical_experts)


def num_duplicates(placement: Placement) -> int:
    """Slots whose expert has another slot on the same rank."""
    ranks = placement.physical_to_logical_map.reshape(-1, placement.num_local_physical_experts)
    return sum(len(held) - len(set(held)) for held in ([slot for slot in rank if slot >= 0] for rank in ranks.tolist()))


def summarize(results: Sequence[Result]) -> dict[str, dict[str, Any]]:
    """Return one row of figures for each planner, over all cases; `balance_next` is None where nothing came next."""
    rows = {}
    for name in dict.fromkeys(result.planner for result in results):
        mine = [result for result in results if result.planner == name]
        ahead = [value for result in mine for value in result.ahead]
        rows[name] = {
            "balance_now": statistics.fmean(value for result in mine for value in result.now),
            "balance_next": statistics.fmean(ahead) if ahead else None,
            "worst_layer": min(value for result in mine for value in result.worst),
            "moves": sum(sum(result.moves) for result in mine),
            "plans": sum(len(result.moves) for result in mine),
            "ms_median": statistics.median(value for result in mine for value in result.ms),
            "ms_max": max(value for result in mine for value in result.ms),
            "duplicates": sum(result.duplicates for result in mine),
        }
    return rows
