"""Running the command line as a person does, and finding what it left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def start_cli(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Start `eplb-fsm` with pipes for both outputs, in a session of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "eplb_fsm", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=restore_sigint,
    )


def restore_sigint() -> None:
    """Undo in a new process what a shell does to the jobs it starts in the background: they ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run_cli(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `eplb-fsm` to its end."""
    process = start_cli(*arguments, **environment)
    stdout, stderr = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def read_until(process: subprocess.Popen[str], pattern: str) -> tuple[str, dict[int, int]]:
    """Read lines of progress up to one that matches; return them and the process of each rank."""
    assert process.stderr is not None
    text = ""
    for line in process.stderr:
        text += line
        if re.search(pattern, line):
            return text, {int(rank): int(pid) for rank, pid in re.findall(r"rank (\d+) is process (\d+)", text)}
    raise AssertionError(f"{pattern!r} never came:\n{text}")


def descendants(pid: int) -> set[int]:
    """All living processes below a process, from Linux' table of processes."""
    found: set[int] = set()
    waiting = [pid]
    while waiting:
        parent = waiting.pop()
        for children in Path("/proc").glob(f"{parent}/task/*/children"):
            new = {int(child) for child in children.read_text().split()} - found
            found |= new
            waiting += new
    return found


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def left_behind(pids: set[int], within_s: float = 10) -> set[int]:
    """Those of the processes that still live after a while."""
    deadline = time.monotonic() + within_s
    while (alive := set(filter(is_alive, pids))) and time.monotonic() < deadline:
        time.sleep(0.1)
    return alive
