"""Packages that are not there: any name in them can be imported, and none can be called."""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from types import ModuleType
from typing import NoReturn


class _AbsentType(type):
    """The type of absent names: classes, so that others may inherit from them or mention them in annotations."""

    def __getattr__(cls, name: str) -> _AbsentType:
        return _absent(f"{cls.__qualname__}.{name}")

    def __call__(cls, *_: object, **__: object) -> NoReturn:
        raise NotImplementedError(f"{cls.__qualname__} is a stand-in: it can be imported, not called")


def _absent(name: str) -> _AbsentType:
    if name.rpartition(".")[2].startswith("__"):  # Python asks for those itself, to learn what an object can do
        raise AttributeError(name)
    return _AbsentType(name.rpartition(".")[2], (), {"__qualname__": name})


class _Submodules(MetaPathFinder, Loader):
    """Finds any submodule of a package, at any depth."""

    def __init__(self, package: str, without: tuple[str, ...]) -> None:
        self._package = package
        self._without = without

    def find_spec(self, fullname: str, _path: object, _target: object = None) -> importlib.machinery.ModuleSpec | None:
        package, _, rest = fullname.partition(".")
        if package != self._package or rest in self._without:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def exec_module(self, module: ModuleType) -> None:
        module.__getattr__ = _names_of(module.__name__)  # type: ignore[method-assign]


def _names_of(module: str) -> Callable[[str], _AbsentType]:
    return lambda name: _absent(f"{module}.{name}")


def stand_in(package: str, without: tuple[str, ...] = ()) -> Callable[[str], _AbsentType]:
    """Make every submodule of a package importable but those named; return the package's own `__getattr__`."""
    # Last, so that submodules that do exist are found first.
    sys.meta_path.append(_Submodules(package, without))

    def look_up(name: str) -> _AbsentType:
        if name in without:
            raise AttributeError(name)
        return _absent(f"{package}.{name}")

    return look_up
