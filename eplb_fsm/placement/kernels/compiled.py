"""Kernels: plain functions over numpy arrays, compiled where numba is installed and interpreted where it is not.

What a kernel returns is the same either way: no fast-math, no parallel loop, every sum in one fixed order.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeVar

_Kernel = TypeVar("_Kernel", bound=Callable[..., Any])

_numba: Any
try:
    _numba = import_module("numba")
except ImportError as error:  # an extra: engines that bring their own pin it, each another one
    _numba = None
    if find_spec("numba") is not None:
        logging.getLogger(__name__).warning("numba cannot be imported (%s), so plans take far longer", error)

IS_COMPILED = _numba is not None
"""Whether kernels are machine code."""


def compiled(function: _Kernel) -> _Kernel:
    """Return a kernel that is compiled at its first call, and runs without the interpreter lock.

    The machine code is kept beside the source, or in the user's cache where that cannot be written.
    """
    if _numba is None:
        return function
    kernel: _Kernel
    try:
        kernel = _numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # no folder for the machine code can be written: compile in every process
        kernel = _numba.njit(nogil=True)(function)
    return kernel
