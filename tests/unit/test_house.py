"""The rules of the house that no linter checks."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 70
MAY_READ_ENVIRONMENT = ("eplb_fsm/runtime/", "eplb_fsm/engines/", "eplb_fsm/cli.py")

SEEDED = ("random.Random", "np.random.default_rng")

# Paths of one machine, and whatever pins a package index: neither means anything to another reader. A path is
# one only at the start of a word, so that `a/tmp/b`, URLs and regular expressions such as these are not.
PRIVATE_PATH = re.compile(r"(?<![\w.:/~*)\]}>-])/(?:home|root|tmp|work|opt|mnt|srv|Users)/\w")
INDEX_HOST = re.compile(
    r"--(?:extra-)?index-url[ =]\S|--find-links[ =]\S|https?://\S*(?:/simple\b|/whl\b|pypi|pythonhosted|npmjs)"
)


@cache
def tracked_files() -> tuple[Path, ...]:
    """All files of the repository, tracked or about to be."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return tuple(path for path in (ROOT / name for name in listing.stdout.splitlines()) if path.is_file())


def sources(*folders: str) -> list[Path]:
    """The Python files below the given folders."""
    tops = [ROOT / folder for folder in folders]
    return [p for p in tracked_files() if p.suffix == ".py" and any(top in p.parents for top in tops)]


@cache
def parse(path: Path) -> ast.Module:
    """The syntax tree of a file, read once."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def named(path: Path, node: ast.AST | None = None) -> str:
    """Where something is, as an editor understands it."""
    line = f":{node.lineno}" if isinstance(node, ast.stmt | ast.expr) else ""
    return f"{path.relative_to(ROOT)}{line}"


def test_files_are_short() -> None:
    """No source file has more lines than a reader keeps in mind."""
    lengths = {named(p): len(p.read_text(encoding="utf-8").splitlines()) for p in sources(".")}
    assert not {name: n for name, n in lengths.items() if n > MAX_FILE_LINES}


def test_functions_fit_on_a_screen() -> None:
    """No function is longer than a screen."""
    long = [
        f"{named(path, node)} {node.name}: {node.end_lineno - node.lineno + 1} lines"
        for path in sources(".")
        for node in ast.walk(parse(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno >= MAX_FUNCTION_LINES
    ]
    assert not long


def undocumented(path: Path, body: list[ast.stmt]) -> Iterator[str]:
    """Public classes and functions of a body, and of the public classes in it, that have no docstring."""
    for node in body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if node.name.startswith("_") or _is_overload_or_setter(node):
            continue
        if ast.get_docstring(node) is None:
            yield f"{named(path, node)} {node.name}"
        if isinstance(node, ast.ClassDef):
            yield from undocumented(path, node.body)


def _is_overload_or_setter(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    names = {ast.unparse(decorator).rsplit(".", 1)[-1] for decorator in node.decorator_list}
    return bool(names & {"overload", "setter", "override"})


def test_public_names_are_documented() -> None:
    """Every module, public class, public function and public method of the library has a docstring."""
    missing = []
    for path in sources("eplb_fsm"):
        tree = parse(path)
        if ast.get_docstring(tree) is None:
            missing.append(named(path))
        missing += undocumented(path, tree.body)
    assert not missing


def test_tests_state_their_claim() -> None:
    """Every test has a docstring of at least one sentence."""
    mute = [
        f"{named(path, node)} {node.name}"
        for path in sources("tests")
        for node in ast.walk(parse(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.name.startswith("test_")
        and not (ast.get_docstring(node) or "").rstrip().endswith((".", "!", "?"))
    ]
    assert not mute


def test_environment_is_read_at_the_edges() -> None:
    """Only the runtime, the engines and the command line read the environment of the process."""
    readers = [
        named(path, node)
        for path in sources("eplb_fsm")
        if not named(path).startswith(MAY_READ_ENVIRONMENT)
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in {"os.environ", "os.getenv", "os.environb"}
    ]
    readers += [
        named(path, node)
        for path in sources("eplb_fsm")
        if not named(path).startswith(MAY_READ_ENVIRONMENT)
        for node in ast.walk(parse(path))
        if isinstance(node, ast.ImportFrom)
        and node.module == "os"
        and {alias.name for alias in node.names} & {"environ", "environb", "getenv"}
    ]
    assert not readers


def _unseeded(node: ast.AST) -> bool:
    """Whether a node draws from a generator that nobody seeded."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) in SEEDED:
        return not (node.args or node.keywords)
    if isinstance(node, ast.Attribute) and ast.unparse(node.value) in {"random", "np.random", "numpy.random"}:
        return ast.unparse(node) not in {*SEEDED, "np.random.Generator"}
    return isinstance(node, ast.ImportFrom) and node.module in {"random", "numpy.random"}


def test_chance_is_seeded() -> None:
    """The library draws from generators that were made with a seed, never from the interpreter's own."""
    places = [named(path, node) for path in sources("eplb_fsm") for node in ast.walk(parse(path)) if _unseeded(node)]
    assert not places


@pytest.mark.parametrize(
    ("code", "is_unseeded"),
    [
        ("random.Random(7).random()", False),
        ("rng: np.random.Generator = np.random.default_rng(seed=7)", False),
        ("random.Random()", True),
        ("random.random()", True),
        ("np.random.seed(7)", True),
        ("from random import choice", True),
    ],
)
def test_unseeded_is_recognised(code: str, is_unseeded: bool) -> None:
    """The rule of the test above tells a seeded generator from one that is not."""
    assert any(_unseeded(node) for node in ast.walk(ast.parse(code))) is is_unseeded


def test_nothing_names_one_machine() -> None:
    """No text of ours names a path of one machine or the address of a package index."""
    found = []
    for path in tracked_files():
        if "corpus" in path.parts or path.suffix not in {
            ".py",
            ".md",
            ".toml",
            ".yml",
            ".yaml",
            ".sh",
            ".json",
            "",
        }:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if PRIVATE_PATH.search(line) or INDEX_HOST.search(line):
                found.append(f"{named(path)}:{number}: {line.strip()[:100]}")
    assert not found


@pytest.mark.parametrize(
    ("text", "is_private"),
    [
        ("cd /ho" + "me/me/x", True),
        ('"/t' + 'mp/trace"', True),
        ("pip install --index-" + "url=x", True),
        ("https://py" + "pi.org/project/x", True),
        ("docs/work/x and https://example.org/home/x", False),
    ],
)
def test_private_patterns(text: str, is_private: bool) -> None:
    """The patterns of the test above see what they are for, and not what looks alike."""
    assert bool(PRIVATE_PATH.search(text) or INDEX_HOST.search(text)) is is_private


@pytest.mark.parametrize("module", ["eplb_fsm", "eplb_fsm.core.rank", "eplb_fsm.placement", "eplb_fsm.config"])
def test_imports_without_torch(module: str) -> None:
    """The core and the planner can be imported without importing torch."""
    program = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0
