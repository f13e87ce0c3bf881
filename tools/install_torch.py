"""Install a torch that fits this machine into the environment of the interpreter that runs this file.

The plain `torch` of the public index brings gigabytes of CUDA packages on Linux, which a machine
without a GPU has no use for. So the attempts, in this order, are:

1. A torch that is there already and satisfies the range in `pyproject.toml` is kept, whatever its build.
2. `TORCH` in the environment, if set, is handed to `pip install` as it stands (`TORCH=torch==2.9.1`,
   a wheel file, more options); nothing else is tried then. `TORCH=system` is the Makefile's word for
   "make the environment see the interpreter's own packages" and asks for case 1.
3. With an NVIDIA GPU (`nvidia-smi -L` answers), and outside Linux: plain pip.
4. Otherwise a CPU build by its exact name, which a local wheel folder may offer and which fails at once
   elsewhere; then `uv`, which knows where CPU builds are; then plain pip, with a warning.

Usage: python tools/install_torch.py
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from pip._vendor.packaging.requirements import (
    Requirement,
)  # every virtual environment has pip; none has packaging

CPU_BUILD = "torch==2.13.0+cpu"
"""The one CPU build that is asked for by name: the version the tests were first run with."""

PIP = (sys.executable, "-m", "pip", "install", "-q")
UV = (sys.executable, "-m", "uv", "pip", "install", "-q", "--python", sys.executable, "--torch-backend=cpu")


@dataclass(frozen=True)
class Attempt:
    """One way to get a torch: commands that all have to succeed, and what is printed before them."""

    says: str
    commands: tuple[tuple[str, ...], ...]


def torch_requirement(pyproject: Path) -> str:
    """Return the torch requirement of the project, as written in `pyproject`."""
    dependencies = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["dependencies"]
    return next(d for d in dependencies if Requirement(d).name == "torch")


def installed_torch() -> str | None:
    """Return the version of the torch that this interpreter would import, or None."""
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return None


def has_nvidia_gpu() -> bool:
    """Tell whether the NVIDIA driver lists a GPU on this machine."""
    if shutil.which("nvidia-smi") is None:
        return False
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return listing.returncode == 0 and "GPU" in listing.stdout


def attempts(requirement: str, chosen: str, system: str, gpu: bool) -> list[Attempt]:
    """List the ways to try, best first.

    Args:
        requirement: The project's torch requirement.
        chosen: The value of `TORCH`; empty when the user chose nothing.
        system: `platform.system()`.
        gpu: Whether there is an NVIDIA GPU.
    """
    if chosen and chosen != "system":
        return [Attempt(f"installing the torch you chose: {chosen}", ((*PIP, *shlex.split(chosen)),))]
    plain = (*PIP, requirement)
    if gpu or system != "Linux":
        return [Attempt("installing torch for this machine", (plain,))]
    return [
        Attempt(f"no GPU seen: trying {CPU_BUILD}", ((*PIP, CPU_BUILD),)),
        Attempt("trying a CPU build through uv", ((*PIP, "uv"), (*UV, requirement))),
        Attempt("no CPU build found: installing plain torch, which brings several GB of CUDA packages", (plain,)),
    ]


def main() -> int:
    """Install torch if need be; return the exit status."""
    requirement = torch_requirement(Path(__file__).resolve().parent.parent / "pyproject.toml")
    version = installed_torch()
    if version is not None and Requirement(requirement).specifier.contains(version, prereleases=True):
        print(f"torch: keeping {version}")
        return 0
    chosen = os.environ.get("TORCH", "")
    if chosen == "system":
        print(f"torch: the interpreter has none that fits {requirement} (found: {version})", flush=True)
    for attempt in attempts(requirement, chosen, platform.system(), has_nvidia_gpu()):
        print(f"torch: {attempt.says}", flush=True)
        if all(subprocess.run(command, check=False).returncode == 0 for command in attempt.commands):
            return 0
    print(
        f"torch: nothing worked; install one that satisfies {requirement} yourself, or set TORCH",
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
