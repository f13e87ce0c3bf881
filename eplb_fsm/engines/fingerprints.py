"""Whether an engine's code is still the code that an adapter was written for.

An adapter replaces some symbols of its engine and relies on others. What each of them was in a tested version is kept
as a fingerprint of its source, in the adapter's ``tested.json``, which ``tools/fingerprint_engine.py`` writes. Reading
one imports nothing of the engine but the packages above the module.
"""

from __future__ import annotations

import ast
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b
from importlib import import_module
from importlib.machinery import PathFinder
from pathlib import Path

from eplb_fsm.errors import ConfigError

logger = logging.getLogger(__name__)

_NUM_SHOWN = 5
_Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef

Fingerprints = Mapping[str, str]
"""``module:name.of.symbol`` -> fingerprint."""


def fingerprint(symbol: str) -> str:
    """Return the fingerprint of a class or function.

    Args:
        symbol: ``module:Class.method``.

    Returns:
        16 hexadecimal digits; "missing" if there is no such module or symbol.
    """
    module, _, path = symbol.partition(":")
    node: ast.AST | None = _syntax_tree(module)
    for name in path.split("."):
        node = _member(node, name)
    if not isinstance(node, _Definition):
        return "missing"
    return blake2b(_text(node, _source(module)).encode(), digest_size=8).hexdigest()


def take_fingerprints(symbols: Iterable[str]) -> dict[str, str]:
    """Return the fingerprints of some symbols of the installed engine."""
    return {symbol: fingerprint(symbol) for symbol in symbols}


def read_tested(engine: str) -> dict[str, dict[str, str]]:
    """Return the fingerprints of each tested version of an engine ("sglang", "vllm")."""
    tested: dict[str, dict[str, str]] = json.loads(tested_file(engine).read_text(encoding="utf-8"))
    return tested


def tested_file(engine: str) -> Path:
    """Return where an adapter keeps them."""
    return Path(__file__).with_name(engine) / "tested.json"


def check_fingerprints(engine: str, version: str, tested: Mapping[str, Fingerprints]) -> str:
    """Refuse an engine whose code is not that of a tested version.

    Args:
        engine: Its name, for messages.
        version: The installed version.
        tested: Fingerprints of each tested version.

    Returns:
        The tested version whose code this is; not `version` where only other code has changed since.

    Raises:
        ConfigError: Naming the symbols that differ.
    """
    differences = {known: _differences(prints) for known, prints in tested.items()}
    for known in sorted(differences, key=lambda known: known != version):
        if not differences[known]:
            if known != version:
                logger.warning(
                    "%s %s is not a tested version; what is replaced and relied on is as in %s", engine, version, known
                )
            return known
    nearest = version if version in differences else min(differences, key=lambda known: len(differences[known]))
    changed = differences[nearest]
    shown = ", ".join(changed[:_NUM_SHOWN]) + (f" and {len(changed) - _NUM_SHOWN} more" if changed[_NUM_SHOWN:] else "")
    raise ConfigError(
        f"{engine} {version} is not supported: {shown} differ from {engine} {nearest}; install a tested version "
        f"({', '.join(tested)}), or start without --enable-eplb-rebalance-async"
    )


def _differences(prints: Fingerprints) -> Sequence[str]:
    return [symbol for symbol, wanted in prints.items() if fingerprint(symbol) != wanted]


@lru_cache(maxsize=64)
def _source(module: str) -> str:
    package = module.rpartition(".")[0]
    try:
        where = import_module(package).__path__ if package else None
    except ImportError:
        return ""
    spec = PathFinder.find_spec(module, where)
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        return ""
    return Path(spec.origin).read_text(encoding="utf-8")


@lru_cache(maxsize=64)
def _syntax_tree(module: str) -> ast.Module:
    return ast.parse(_source(module))


def _member(node: ast.AST | None, name: str) -> _Definition | None:
    body = getattr(node, "body", ())
    found = [child for child in body if isinstance(child, _Definition) and child.name == name]
    return found[-1] if found else None


def _text(node: _Definition, source: str) -> str:
    """The lines of a definition, with its decorators; not what the parser makes of them, which changes with Python."""
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return "\n".join(line.rstrip() for line in source.splitlines()[first - 1 : node.end_lineno])
