"""Changing modules that are imported later."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from eplb_fsm.engines.late import on_import


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module that nobody has imported."""
    (tmp_path / "changed_later.py").write_text("value = 'its own'\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "changed_later", raising=False)
    return "changed_later"


def _adds(word: str) -> object:
    def change(module: ModuleType) -> None:
        module.value = f"{module.value}, {word}"  # type: ignore[attr-defined]

    return change


def test_every_change_is_made_once_and_in_order(module: str) -> None:
    """Two changes of one module are both made, at its import, and no finder is left behind."""
    finders = list(sys.meta_path)
    on_import(module, _adds("first"))  # type: ignore[arg-type]
    on_import(module, _adds("second"))  # type: ignore[arg-type]
    assert module not in sys.modules
    imported = import_module(module)
    assert imported.value == "its own, first, second"
    assert sys.meta_path == finders
    on_import(module, _adds("now"))  # type: ignore[arg-type]
    assert imported.value == "its own, first, second, now"
