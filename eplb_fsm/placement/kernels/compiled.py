"""Kernels: plain functions over numpy arrays, compiled where numba is installed and interpreted where it is not.

What a kernel returns is the same either way: no fast-math, no parallel loop, every sum in one fixed order.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from hashlib import blake2b
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

_Kernel = TypeVar("_Kernel", bound=Callable[..., Any])

_numba: Any
try:
    _numba = import_module("numba")
except ImportError as error:  # an extra: engines that bring their own pin it, each another one
    _numba = None
    if find_spec("numba") is not None:
        logging.getLogger(__name__).warning("numba cannot be imported (%s), so plans take far longer", error)

_SOURCES = blake2b(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))).hexdigest()
"""Digest of all kernels."""

IS_COMPILED = _numba is not None
"""Whether kernels are machine code."""


def compiled(function: _Kernel) -> _Kernel:
    """Return a kernel that is compiled at its first call, and runs without the interpreter lock.

    The machine code is kept beside the source, or in the user's cache where that cannot be written.
    """
    return _compile(function)


def borrowing(function: _Kernel) -> _Kernel:
    """Return a kernel as :func:`compiled` does that makes no array, and does not count those that it is given.

    Numba counts the references to an array with atomic instructions, each time that it comes out of a tuple or goes
    into a call. That was a fifth of the time of a plan. It refuses to compile such a kernel if it makes an array.
    """
    try:
        return _compile(function, _nrt=False)
    except KeyError:  # an option that numba's own library uses; another version may not have it
        return _compile(function)


def _compile(function: _Kernel, **options: bool) -> _Kernel:
    if _numba is None:
        return function
    kernel: _Kernel
    try:
        kernel = _numba.njit(nogil=True, cache=True, **options)(function)
        _mark(kernel)
    except (AttributeError, RuntimeError) as error:  # it cannot be marked, or not be written
        _say_once(f"machine code of plans cannot be kept ({error}), so every process compiles it anew, for seconds")
        kernel = _numba.njit(nogil=True, **options)(function)
    return kernel


@cache
def _say_once(warning: str) -> None:
    logging.getLogger(__name__).warning(warning)


def _mark(kernel: Any) -> None:
    """Have the machine code that is kept count only for these sources.

    Numba asks for the date of the kernel's own file, and compiles the kernels that it calls into it: after an upgrade
    that leaves the one file as it was, old code of the others would run.
    """
    kept = kernel._cache._cache_file  # numba has no public way; tested with the newest
    kept._source_stamp = (kept._source_stamp, _SOURCES)
