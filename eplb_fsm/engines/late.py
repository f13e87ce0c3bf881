"""Changing a module once it has been imported, without importing it now."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


def on_import(name: str, change: Callable[[ModuleType], None]) -> None:
    """Call ``change(module)`` right after the module has been executed, or now if it has been already.

    Engines load their plugins in every process, and most of these never need what is to be replaced. A module may be
    changed more than once; changes come in the order in which they were asked for.

    Args:
        name: Of a module on ``sys.path``.
        change: Changes it; what it raises comes out of the import.
    """
    if name in sys.modules:
        change(sys.modules[name])
        return
    for finder in sys.meta_path:
        if isinstance(finder, _Finder) and finder.name == name:
            finder.changes.append(change)
            return
    sys.meta_path.insert(0, _Finder(name, change))


class _Finder(MetaPathFinder):
    """Finds one module as the path does, once."""

    def __init__(self, name: str, change: Callable[[ModuleType], None]) -> None:
        self.name = name
        self.changes = [change]

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a spec whose loader changes the module; None for every other module."""
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self.changes)
        return spec


class _Loader(Loader):
    def __init__(self, inner: Loader, changes: Sequence[Callable[[ModuleType], None]]) -> None:
        self._inner = inner
        self._changes = changes

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # What asks a module for its source asks its loader.
        module.__loader__ = self._inner
        if module.__spec__ is not None:
            module.__spec__.loader = self._inner
        self._inner.exec_module(module)
        for change in self._changes:
            change(module)
