"""The demo's table, as plain text that looks the same in a terminal, a file and the README."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from eplb_fsm.engines.demo.options import RUNS
from eplb_fsm.engines.reference.figures import OUTCOMES
from eplb_fsm.observe.table import render

Figures = dict[str, Any]


def _ms(value: float) -> str:
    return f"{value:.3f}" if value < 1 else f"{value:.1f}"


def _megabytes(value: int) -> str:
    return f"{value / 1e6:.1f} MB"


def _steps(value: int | None) -> str:
    return "-" if value is None else str(value)


Cell = Callable[[Figures], str]

LATENCY_ROWS: tuple[tuple[str, Cell], ...] = (
    ("inter-token latency p50, ms", lambda run: _ms(run["itl_ms"]["p50"])),
    ("inter-token latency p99, ms", lambda run: _ms(run["itl_ms"]["p99"])),
    ("inter-token latency max, ms", lambda run: _ms(run["itl_ms"]["max"])),
)
REBALANCE_ROWS: tuple[tuple[str, Cell], ...] = (
    ("longest step(), ms", lambda run: _ms(run["longest_step_ms"])),
    ("longest step(), ms of CPU", lambda run: _ms(run["longest_step_cpu_ms"])),
    ("steps in active states", lambda run: f"{100 * run['active_share']:.0f} %"),
    *((f"epochs {name}", lambda run, name=name: str(run["epochs"][name])) for name in OUTCOMES),
    ("weights moved", lambda run: _megabytes(run["moved_bytes"])),
    ("late rounds", lambda run: f"{run['late_rounds']} of {run['rounds']}"),
)


def balancedness_rows(change: bool) -> tuple[tuple[str, Cell], ...]:
    """Return the rows on balance; without a change of domain there is only one."""
    after: tuple[str, Cell] = ("balancedness at the end", lambda run: f"{run['balancedness']['after']:.3f}")
    if not change:
        return (after,)
    before: tuple[str, Cell] = ("balancedness before the change", lambda run: f"{run['balancedness']['before']:.3f}")
    return before, after


CHANGE_ROWS: tuple[tuple[str, Cell], ...] = (
    ("steps, change to balanced again", lambda run: _steps(run["steps_to_balance"])),
    ("steps, change to last commit", lambda run: _steps(run["steps_to_last_commit"])),
)


def demo_table(report: dict[str, Any]) -> str:
    """Return the table of a demo's report, with a line above and a line below it; no line feed at the end."""
    runs = [report["runs"][name] for name in RUNS]
    rows = [["", *RUNS]]
    for label, cell in (*LATENCY_ROWS, *balancedness_rows(change=True)):
        rows.append([label, *(cell(run) for run in runs)])
    for label, cell in (*CHANGE_ROWS, *REBALANCE_ROWS):
        rows.append([label, "-", *(cell(run) for run in runs[1:])])
    same = {name: report["first_different_step"][name] is None for name in RUNS[1:]}
    rows.append(["tokens and logits as in `none`", "-", *("yes" if same[name] else "NO" for name in RUNS[1:])])
    machine, versions = report["machine"], report["versions"]
    before, after = report["domains"]
    head = (
        f"{report['ranks']} ranks, {report['steps']} steps of {report['ranks'] * report['batch']} tokens, "
        f"{before} until step {report['change_step']}, then {after}"
    )
    foot = (
        f"{machine['processor'] or machine['architecture']}, {machine['cores']} cores; "
        f"Python {versions['python']}, torch {versions['torch']}"
    )
    return f"{head}\n\n{render(rows)}\n\n{foot}"


def decode_table(run: Figures, name: str, change: bool) -> str:
    """Return the table of a single run; no line feed at the end."""
    rows = [["", name], ["steps", str(run["steps"])], ["tokens a second", f"{run['tokens_per_second']:.0f}"]]
    parts = [*LATENCY_ROWS, *balancedness_rows(change)]
    if name != "none":
        parts += list(CHANGE_ROWS if change else ()) + list(REBALANCE_ROWS)
    rows += [[label, cell(run)] for label, cell in parts]
    rows += [["tokens sha256", run["tokens_sha256"][:16]], ["logits sha256", run["logits_sha256"][:16]]]
    return render(rows)
