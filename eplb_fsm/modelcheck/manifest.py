"""The manifest of the checks: what TLC is run on, and what must come out."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from eplb_fsm.errors import ConfigError

MANIFEST = "manifest.json"
TIERS = ("push", "nightly")
EXPECTED = ("holds", "violates")


@dataclass(frozen=True)
class Check:
    """One run of TLC and its expected result."""

    name: str
    """How `--only` and other checks call it."""
    module: str
    """The .tla file, in the folder of the manifest."""
    cfg: str
    """The model, in that folder or below."""
    expected: str
    """`holds`, or `violates` for a mutant, a twin, a claim of unreachability."""
    property: str | None
    """What TLC must name as violated; None where all must hold."""
    tier: str
    """`push` or `nightly`."""
    states: int | None
    """Distinct states, exactly, where all must hold; None until they were counted."""
    seconds: float | None
    """How long it took when it was last recorded."""
    twin: str | None
    """Of a check that holds: the check that shows that it reaches what it is about."""
    why: str
    """One sentence: what is shown, and the public report that a mutant stands for."""


_FIELDS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "name": ("a text without spaces", lambda value: isinstance(value, str) and bool(re.fullmatch(r"\S+", value))),
    "module": ("the name of a .tla file", lambda value: isinstance(value, str) and value.endswith(".tla")),
    "cfg": ("the path of a .cfg file", lambda value: isinstance(value, str) and value.endswith(".cfg")),
    "expected": (f"one of {', '.join(EXPECTED)}", lambda value: value in EXPECTED),
    "property": ("a name or null", lambda value: value is None or (isinstance(value, str) and value.isidentifier())),
    "tier": (f"one of {', '.join(TIERS)}", lambda value: value in TIERS),
    "states": ("a number from 1 or null", lambda value: value is None or (type(value) is int and value > 0)),
    "seconds": ("a number or null", lambda value: value is None or (type(value) in (int, float) and value >= 0)),
    "twin": ("the name of a check or null", lambda value: value is None or isinstance(value, str)),
    "why": ("a sentence", lambda value: isinstance(value, str) and value.endswith(".")),
}
"""What each field must be, in words and as a test."""

_SECTION = re.compile(
    r"\b(SPECIFICATION|INIT|NEXT|SYMMETRY|VIEW|ALIAS|CONSTANTS?|CONSTRAINTS?|ACTION_CONSTRAINTS?|INVARIANTS?"
    r"|PROPERTY|PROPERTIES)\b"
)
_COMMENT = re.compile(r"\\\*[^\n]*|\(\*.*?\*\)", re.DOTALL)
_ASSIGNMENT = re.compile(r"\w+\s*(?:=|<-)")
_CHECKED = ("INVARIANT", "PROPERTY")


@dataclass(frozen=True)
class Model:
    """A cfg as text: what is checked, and all the rest, in which it must be like its twin's."""

    checked: tuple[str, ...]
    """Names of invariants and properties, in the order of the cfg."""
    rest: frozenset[tuple[str, str]]
    """Section and content: each constant by itself, other sections name by name, white space made equal."""


def read_model(text: str) -> Model:
    """Return what a cfg says."""
    parts = _SECTION.split(_COMMENT.sub(" ", text))
    checked: list[str] = []
    rest: set[tuple[str, str]] = set()
    for keyword, content in zip(parts[1::2], parts[2::2], strict=True):
        section = keyword.replace("PROPERTIES", "PROPERTY").removesuffix("S")
        if section in _CHECKED:
            checked += content.split()
        elif section == "CONSTANT":
            rest |= {(section, assignment) for assignment in _assignments(content)}
        else:
            rest |= {(section, name) for name in content.split()}
    return Model(tuple(checked), frozenset(rest))


def _assignments(content: str) -> Iterator[str]:
    starts = [match.start() for match in _ASSIGNMENT.finditer(content)]
    for start, end in zip(starts, [*starts[1:], len(content)], strict=True):
        yield "".join(content[start:end].split())


def load_manifest(folder: Path) -> list[Check]:
    """Return the checks of the manifest in a folder.

    Raises:
        ConfigError: If there is none, or anything in it is not as it must be; names every such thing.
    """
    path = folder / MANIFEST
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}): name the folder of the spec") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(entries, list):
        raise ConfigError(f"{path} is not a list of checks")
    _refuse(path, (f"{_label(n, e)}: {problem}" for n, e in enumerate(entries) for problem in _misfits(e)))
    checks = [Check(**entry) for entry in entries]
    _refuse(path, _contradictions(checks, folder))
    return checks


def write_manifest(folder: Path, checks: Sequence[Check]) -> None:
    """Write the checks as the manifest of a folder."""
    names = [field.name for field in fields(Check)]
    entries = [{name: getattr(check, name) for name in names} for check in checks]
    (folder / MANIFEST).write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")


def _refuse(path: Path, problems: Iterable[str]) -> None:
    lines = list(problems)
    if lines:
        raise ConfigError("\n  ".join([f"{path} is broken:", *lines]))


def _label(number: int, entry: object) -> str:
    name = entry.get("name") if isinstance(entry, dict) else None
    return str(name) if name else f"check {number}"


def _misfits(entry: object) -> Iterator[str]:
    if not isinstance(entry, dict):
        yield "is not an object"
        return
    for name in entry.keys() - _FIELDS.keys():
        yield f"has a field {name!r} that no check has"
    for name, (words, fits) in _FIELDS.items():
        if name not in entry:
            yield f"has no {name!r}"
        elif not fits(entry[name]):
            yield f"{name} is {entry[name]!r}, not {words}"


def _contradictions(checks: Sequence[Check], folder: Path) -> Iterator[str]:
    by_name = {check.name: check for check in checks}
    for name, count in Counter(check.name for check in checks).items():
        if count > 1:
            yield f"{name}: is there {count} times"
    models = {}
    for check in checks:
        missing = [file for file in (check.module, check.cfg) if not (folder / file).is_file()]
        if missing:
            yield f"{check.name}: {' and '.join(missing)} missing"
        else:
            models[check.name] = read_model((folder / check.cfg).read_text(encoding="utf-8"))
    for check in checks:
        if check.name in models:
            holds = check.expected == "holds"
            problems = _of_holding(check, by_name, models) if holds else _of_violating(check, models)
            yield from (f"{check.name}: {problem}" for problem in problems)


def _of_violating(check: Check, models: Mapping[str, Model]) -> Iterator[str]:
    if check.property not in models[check.name].checked:
        yield f"must violate {check.property}, which its cfg does not check"
    if check.states is not None or check.twin is not None:
        yield "must be violated, so states and twin must be null"


def _of_holding(check: Check, by_name: Mapping[str, Check], models: Mapping[str, Model]) -> Iterator[str]:
    if check.property is not None:
        yield "must hold, so property must be null"
    if not models[check.name].checked:
        yield "its cfg checks nothing"
    twin = by_name.get(check.twin) if check.twin is not None else None
    if twin is None or twin.expected != "violates":
        yield f"must hold, so it needs a twin that must be violated; {check.twin!r} is none"
    elif twin.module != check.module:
        yield f"its twin is of another module, {twin.module}"
    elif twin.name in models:
        unlike = sorted(models[check.name].rest ^ models[twin.name].rest)
        if unlike:
            yield f"its twin {twin.name} differs in more than what is checked: {'; '.join(map(' '.join, unlike))}"
