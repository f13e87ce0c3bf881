"""An engine whose code has changed is refused, whatever its version says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from eplb_fsm.engines import fingerprints
from eplb_fsm.errors import ConfigError

SOURCE = '''
class Manager:
    """Manages."""

    @staticmethod
    def step():
        return 1


def plan():
    return Manager.step()
'''


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of an engine."""
    monkeypatch.syspath_prepend(tmp_path)
    fingerprints._source.cache_clear()
    fingerprints._syntax_tree.cache_clear()
    sys.modules.pop("some_engine", None)
    (tmp_path / "some_engine.py").write_text(SOURCE)
    return tmp_path / "some_engine.py"


SYMBOLS = ["some_engine:Manager", "some_engine:Manager.step", "some_engine:plan"]


def _rewrite(engine: Path, old: str, new: str) -> None:
    engine.write_text(engine.read_text().replace(old, new))
    fingerprints._source.cache_clear()
    fingerprints._syntax_tree.cache_clear()


def test_the_same_code_under_another_version_is_taken(engine: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A release that changes nothing of what counts is taken, with a warning that it was not tested."""
    tested = {"1.0": fingerprints.take_fingerprints(SYMBOLS)}
    assert fingerprints.check_fingerprints("Some", "1.0", tested) == "1.0"
    assert fingerprints.check_fingerprints("Some", "1.1", tested) == "1.0"
    assert "1.1 is not a tested version" in caplog.text


@pytest.mark.parametrize(
    ("old", "new", "changed"),
    [
        ("return 1", "return 2", "some_engine:Manager, some_engine:Manager.step differ"),
        ("@staticmethod", "@classmethod", "some_engine:Manager, some_engine:Manager.step differ"),
        ("def plan", "def plans", "some_engine:plan differ"),
    ],
)
def test_other_code_is_refused_and_named(engine: Path, old: str, new: str, changed: str) -> None:
    """A changed body, a changed decorator and a missing function are each named."""
    tested = {"1.0": fingerprints.take_fingerprints(SYMBOLS)}
    _rewrite(engine, old, new)
    with pytest.raises(ConfigError, match=changed):
        fingerprints.check_fingerprints("Some", "1.0", tested)


def test_an_engine_that_is_not_there_differs() -> None:
    """A module that cannot be found is missing, not an exception of its own."""
    assert fingerprints.fingerprint("no_such_engine.module:Manager") == "missing"
