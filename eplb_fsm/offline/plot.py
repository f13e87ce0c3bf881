"""A picture of a comparison: balance against moves."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from eplb_fsm.errors import ConfigError

_SUFFIXES = (".svg", ".png", ".pdf")
_NUM_COLORS = 10
"""Of matplotlib's default cycle; after it another marker tells points of one colour apart."""
_MARKERS = "oD^s"


def check_plot(path: Path) -> None:
    """Find out before the work that its picture could not be drawn.

    Raises:
        ConfigError: A suffix that is no picture's, no such folder, or matplotlib is missing.
    """
    if path.suffix not in _SUFFIXES:
        raise ConfigError(f"--plot {path}: must end in {', '.join(_SUFFIXES)}")
    if not path.resolve().parent.is_dir():
        raise ConfigError(f"--plot {path}: the folder {path.parent} does not exist; make it first")
    if find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install 'eplb-fsm[plot]'")


def plot_balance(rows: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw a point for each planner: its moves a plan, and how balanced the next window was.

    Where no window came next, it is the one that was planned for.

    Args:
        rows: Of :func:`~eplb_fsm.offline.comparison.summarize`.
        path: The file, as :func:`check_plot` accepts it.
    """
    from matplotlib.figure import Figure  # here: an extra

    is_next = all(row["balance_next"] is not None for row in rows.values())
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    names: dict[tuple[float, float], list[str]] = {}  # policies that do the same are one point
    for name, row in rows.items():
        point = row["moves"] / row["plans"], row["balance_next" if is_next else "balance_now"]
        names.setdefault(point, []).append(name)
    for index, (point, same) in enumerate(names.items()):
        axes.plot(*point, _MARKERS[index // _NUM_COLORS % len(_MARKERS)], label=", ".join(same))
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlim(left=-0.2)
    axes.set_xlabel("experts that come from another rank, a plan")
    axes.set_ylabel("balancedness of the next window" if is_next else "balancedness of the window planned for")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="lower right")
    figure.savefig(path)
