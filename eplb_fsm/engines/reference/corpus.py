"""The texts that the reference model is trained on and that the demo decodes, one byte per token."""

from __future__ import annotations

import lzma
import sysconfig
from functools import cache
from importlib.resources import files
from pathlib import Path

from eplb_fsm.engines.reference.generators import GENERATORS
from eplb_fsm.errors import ConfigError

DOMAINS: tuple[str, ...] = ("code", "english", "logs", "json", "russian", "chinese")
BOS_TOKEN = 256
EOS_TOKEN = 257
PAD_TOKEN = 258
VOCAB_SIZE = 272

_FOLDER = files("eplb_fsm.engines.reference") / "corpus"
_GENERATED_BYTES = 3_000_000


def check_domain(domain: str) -> str:
    """Returns `domain`.

    Raises:
        ConfigError: No text of that name is shipped.
    """
    if domain not in DOMAINS:
        raise ConfigError(f"unknown text domain {domain!r}; choose one of {', '.join(DOMAINS)}")
    return domain


@cache
def evaluation_text(domain: str) -> bytes:
    """Returns the shipped text of a domain, which the training never read: 20 to 50 KB of UTF-8.

    Raises:
        ConfigError: No text of that name is shipped.
    """
    return (_FOLDER / f"{check_domain(domain)}.txt").read_bytes()


def training_text(domain: str, seed: int) -> bytes:
    """Returns the training text of a domain.

    Prose and translations are shipped, logs and JSON are generated from `seed`, code is the standard library
    of the running Python (its packages' tests left out), so it varies with the Python version.

    Raises:
        ConfigError: No text of that name is known.
    """
    if check_domain(domain) in GENERATORS:
        return GENERATORS[domain](seed, _GENERATED_BYTES)
    if domain == "code":
        return _standard_library()
    return lzma.decompress((_FOLDER / "train" / f"{domain}.txt.xz").read_bytes())


def _standard_library() -> bytes:
    folder = Path(sysconfig.get_paths()["stdlib"])
    packages = (
        "asyncio",
        "collections",
        "concurrent",
        "email",
        "http",
        "importlib",
        "json",
        "logging",
        "multiprocessing",
        "unittest",
        "urllib",
        "xml",
    )
    paths = sorted(folder.glob("*.py")) + [p for name in packages for p in sorted((folder / name).rglob("*.py"))]
    return b"\n".join(path.read_bytes() for path in paths)
