"""Which methods of a core somebody calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import FunctionType
from typing import Any
from unittest.mock import patch

from eplb_fsm.core.rank import RankCore

METHODS = frozenset(
    name for name, value in vars(RankCore).items() if isinstance(value, FunctionType) and not name.startswith("_")
)
"""The public methods of a core."""


@contextmanager
def recorded_calls() -> Iterator[set[str]]:
    """Note the public methods of cores that are called in the block."""
    called: set[str] = set()
    with patch.multiple(RankCore, **{name: _noted(name, called) for name in METHODS}):
        yield called


def _noted(name: str, called: set[str]) -> Callable[..., Any]:
    method = getattr(RankCore, name)

    @wraps(method)
    def call(*args: Any, **options: Any) -> Any:
        called.add(name)
        return method(*args, **options)

    return call
