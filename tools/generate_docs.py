"""Write the parts of the README and the docs that say what the code says.

A part stands between `<!-- generated: NAME -->` and `<!-- end generated -->`; NAME is a key of `PARTS`. What
a part says comes from the code alone, so that a table in the docs cannot go its own way.

Usage: python tools/generate_docs.py [--check]

With `--check` nothing is written, and the exit status is 1 when a part is out of date.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Callable
from dataclasses import fields
from enum import Enum
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works in a checkout that is not installed

from eplb_fsm import errors
from eplb_fsm.cli import BROKEN_PROMISE, INTERRUPTED, OK, WRONG_USAGE, make_parser
from eplb_fsm.config import RebalanceConfig
from eplb_fsm.core.reasons import AbortReason, OutcomeKind, StopReason
from eplb_fsm.core.states import State
from eplb_fsm.runtime.failstop import EXIT_STATUS
from tools.diagram import render_mermaid, render_table

ROOT = Path(__file__).resolve().parent.parent
_PART = re.compile(r"(<!-- generated: (\S+) -->\n).*?(<!-- end generated -->)", re.DOTALL)


def attribute_docs(owner: type) -> dict[str, str]:
    """Return the string literals that stand below the attributes of a class, on one line each."""
    tree = ast.parse(inspect.getsource(owner)).body[0]
    assert isinstance(tree, ast.ClassDef)
    docs: dict[str, str] = {}
    for before, after in zip(tree.body, tree.body[1:], strict=False):
        target = before.targets[0] if isinstance(before, ast.Assign) else getattr(before, "target", None)
        if isinstance(target, ast.Name) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            docs[target.id] = markdown(str(after.value.value))
    return docs


def markdown(docstring: str) -> str:
    """Return a piece of a docstring as one line of Markdown that fits into a table."""
    text = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", " ".join(docstring.split()))
    return text.replace("``", "`").replace("|", "\\|")


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def options() -> str:
    """Return the table of all options with their defaults."""
    docs = attribute_docs(RebalanceConfig)
    rows = [[f"`{field.name}`", f"`{field.default!r}`", docs[field.name]] for field in fields(RebalanceConfig)]
    return table(["option", "default", "meaning"], rows)


def members(kind: type[Enum]) -> str:
    """Return the table of an enumeration."""
    docs = attribute_docs(kind)
    if issubclass(kind, int):
        return table(["name", "code", "meaning"], [[f"`{m.name}`", str(m.value), docs[m.name]] for m in kind])
    return table(["name", "meaning"], [[f"`{m.name}`", docs[m.name]] for m in kind])


def error_classes() -> str:
    """Return the table of all exceptions, in the order of their definition."""
    rows = []
    for name, kind in vars(errors).items():
        if inspect.isclass(kind) and issubclass(kind, errors.EplbError):
            first_line = (kind.__doc__ or "").splitlines()[0]
            bases = ", ".join(f"`{base.__name__}`" for base in kind.__bases__)
            rows.append([f"`{name}`", bases, markdown(first_line)])
    return table(["exception", "derives from", "raised when"], rows)


def example(file: str, part: str) -> str:
    """Return a marked part of an example, as a fenced block."""
    text = (ROOT / "examples" / file).read_text(encoding="utf-8")
    section = text.split(f"# --8<-- [start:{part}]\n")[1].split(f"# --8<-- [end:{part}]")[0]
    return f"```python\n{textwrap.dedent(section).strip()}\n```"


def compatibility() -> str:
    """Return what tests have shown of each engine, from the file that they write."""
    rows = json.loads((ROOT / "docs/reference/compatibility.json").read_text(encoding="utf-8"))
    shown = [[row["engine"], row["version"], row["what"], row["how"], f"`{row['test']}`"] for row in rows]
    return table(["engine", "version", "what", "how", "by"], shown)


def command(name: str) -> str:
    """Return the table of the flags of a command."""
    subparsers = next(a for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction))
    rows = []
    for action in subparsers.choices[name]._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        flags = " ".join(
            f"`{flag} {action.metavar}`" if action.metavar else f"`{flag}`" for flag in action.option_strings
        )
        rows.append([flags, markdown((action.help or "") % vars(action))])
    return table(["flag", "meaning"], rows)


def exit_status() -> str:
    """Return the table of the exit statuses of the command line and of a rank that fail-stops."""
    meanings = {
        OK: "all went as promised",
        BROKEN_PROMISE: "a promise was broken: runs differ, an epoch failed, nothing was committed, or a rank was lost",
        WRONG_USAGE: "wrong usage, or a configuration that cannot work; nothing was run",
        EXIT_STATUS: "of a rank: it must not run another forward pass (the default `fail_stop`)",
        INTERRUPTED: "interrupted; all ranks are ended",
    }
    return table(["status", "meaning"], [[str(status), meaning] for status, meaning in meanings.items()])


PARTS: dict[str, Callable[[], str]] = {
    "diagram": lambda: f"```mermaid\n{render_mermaid()}\n```",
    "transitions": render_table,
    "embedding": lambda: example("embed.py", "embedding"),
    "adapter": lambda: example("adapter.py", "adapter"),
    "compatibility": compatibility,
    "cli-demo": lambda: command("demo"),
    "cli-decode": lambda: command("decode"),
    "cli-plan": lambda: command("plan"),
    "cli-compare": lambda: command("compare"),
    "exit-status": exit_status,
    "states": lambda: members(State),
    "options": options,
    "abort-reasons": lambda: members(AbortReason),
    "stop-reasons": lambda: members(StopReason),
    "outcomes": lambda: members(OutcomeKind),
    "errors": error_classes,
}
"""What can be generated, by name."""


def regenerate(text: str) -> str:
    """Return a page with its generated parts made anew.

    Raises:
        KeyError: For a part that is not in `PARTS`.
    """
    return _PART.sub(lambda match: f"{match[1]}{PARTS[match[2]]()}\n{match[3]}", text)


def main() -> int:
    """Regenerate or check all pages; return the exit status."""
    parser = argparse.ArgumentParser(description="Write the generated parts of the docs.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail when a part is out of date")
    check = parser.parse_args().check
    stale = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        text = page.read_text(encoding="utf-8")
        wanted = regenerate(text)
        if wanted != text:
            stale.append(str(page.relative_to(ROOT)))
            if not check:
                page.write_text(wanted, encoding="utf-8")
    for name in stale:
        print(f"{name}: {'out of date: run make generate' if check else 'written'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
