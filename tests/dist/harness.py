"""Ranks as real processes: started, watched, killed where a test wants it, and never left behind.

The test process hosts the store, so that it outlives any rank. Processes come from a fork server that has imported
torch once; each is the leader of a process group of its own, so that whatever it starts ends with it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "torch.distributed", "eplb_fsm.fsm", "eplb_fsm.simulate.engine"])
_LOG_TAIL = 6000
_POLL_S = 0.02


class RankFailedError(AssertionError):
    """A rank raised, died or did not end; the message holds its log."""


@dataclass(frozen=True)
class RankLink:
    """What the body of a rank gets.

    Attributes:
        rank: This rank.
        world_size: Number of ranks.
        port: Port of the store.
    """

    rank: int
    world_size: int
    port: int
    pipe: Connection

    def store(self) -> dist.TCPStore:
        """Connect to the store."""
        return dist.TCPStore("127.0.0.1", self.port, None, False, timedelta(seconds=30), wait_for_workers=False)

    def tell(self, word: str, value: Any = None) -> None:
        """Tell the test something while the body runs."""
        self.pipe.send(("tell", (word, value)))

    def heard(self) -> bool:
        """True once, after the test has said :meth:`Ranks.say` to this rank; never blocks."""
        if self.pipe.poll(0):
            self.pipe.recv()
            return True
        return False

    def listen(self, timeout_s: float = 30.0) -> None:
        """Block until the test says something."""
        if not self.pipe.poll(timeout_s):
            raise TimeoutError("the test said nothing")
        self.pipe.recv()


class Ranks:
    """The processes of one test.

    Args:
        world_size: Number of ranks.
        body: A module-level function, called in each process as ``body(link, *args)``; what it returns is pickled.
        args: Further arguments.
        port: Port of a store that somebody else hosts; 0: the test process hosts one.
    """

    def __init__(self, world_size: int, body: Callable[..., Any], args: Sequence[Any] = (), *, port: int = 0) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self._server = None
        if not port:
            self._server = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=30), wait_for_workers=False)
            port = self._server.port
        self._logs = [Path(self._folder.name) / f"rank{rank}.log" for rank in range(world_size)]
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        self._told: list[list[tuple[str, Any]]] = [[] for _ in range(world_size)]
        self._results: dict[int, tuple[str, Any]] = {}
        self._ended_by_test: set[int] = set()
        for rank in range(world_size):
            mine, theirs = _CONTEXT.Pipe()
            link = RankLink(rank, world_size, port, theirs)
            process = _CONTEXT.Process(target=_main, args=(link, body, tuple(args), str(self._logs[rank])))
            process.start()
            theirs.close()
            self._pipes.append(mine)
            self._processes.append(process)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            left = self._end_all()
        finally:
            self._folder.cleanup()
            self._server = None
        if exc[0] is None and left:
            raise RankFailedError(f"processes were left behind: {left}")

    @property
    def pids(self) -> list[int]:
        """Process ids, by rank."""
        return [process.pid for process in self._processes]

    def expect(self, rank: int, word: str, timeout_s: float = 30.0) -> Any:
        """Block until a rank tells ``word``; return the value told with it."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            for entry in self._told[rank]:
                if entry[0] == word:
                    self._told[rank].remove(entry)
                    return entry[1]
            if rank in self._results:
                break
            self._receive(_POLL_S)
        raise self._failure(rank, f"did not tell {word!r} in {timeout_s} s; result {self._results.get(rank)}")

    def say(self, rank: int) -> None:
        """Let ``link.heard()`` or ``link.listen()`` of a rank return."""
        self._pipes[rank].send("go")

    def kill(self, rank: int) -> None:
        """End one process with SIGKILL; what it has started is left to itself."""
        self._ended_by_test.add(rank)
        os.kill(self._processes[rank].pid, signal.SIGKILL)

    def will_die(self, rank: int) -> None:
        """Expect no result of a rank that ends itself."""
        self._ended_by_test.add(rank)

    def stop(self, rank: int) -> None:
        """Stop a process, and see that it has stopped."""
        pid = self._processes[rank].pid
        os.kill(pid, signal.SIGSTOP)
        deadline = time.monotonic() + 5
        while _process_state(pid) != "T" and time.monotonic() < deadline:
            time.sleep(0.005)

    def go_on(self, rank: int) -> None:
        """Let a stopped process go on."""
        os.kill(self._processes[rank].pid, signal.SIGCONT)

    def join(self, timeout_s: float = 60.0, *, ranks: Sequence[int] | None = None) -> list[Any]:
        """Wait for all bodies that were not killed; return what they returned, None for a killed one.

        Raises:
            RankFailedError: A body raised, or a process died or did not end; with its log.
        """
        wanted = [r for r in (ranks or range(len(self._processes))) if r not in self._ended_by_test]
        deadline = time.monotonic() + timeout_s
        while any(rank not in self._results for rank in wanted):
            self._receive(_POLL_S)
            for rank in wanted:
                if rank in self._results and self._results[rank][0] == "error":
                    raise self._failure(rank, self._results[rank][1])
            if time.monotonic() > deadline:
                rank = next(rank for rank in wanted if rank not in self._results)
                raise self._failure(rank, f"did not end in {timeout_s} s")
        return [self._results[r][1] if r in wanted else None for r in range(len(self._processes))]

    def exit_code(self, rank: int, timeout_s: float = 10.0) -> int | None:
        """Wait for the process of a rank; return its exit code."""
        self._processes[rank].join(timeout_s)
        return self._processes[rank].exitcode

    def log(self, rank: int) -> str:
        """Return what a rank has logged and printed."""
        return self._logs[rank].read_text(errors="replace") if self._logs[rank].exists() else ""

    def _receive(self, timeout_s: float) -> None:
        open_pipes = [p for rank, p in enumerate(self._pipes) if rank not in self._results and not p.closed]
        for pipe in wait(open_pipes, timeout_s) if open_pipes else ():
            assert isinstance(pipe, Connection)
            rank = self._pipes.index(pipe)
            try:
                kind, value = pipe.recv()
            except (EOFError, OSError):
                self._processes[rank].join(5)
                self._results[rank] = ("error", f"ended with exit code {self._processes[rank].exitcode}")
                continue
            if kind == "tell":
                self._told[rank].append(value)
            else:
                self._results[rank] = (kind, value)

    def _failure(self, rank: int, what: str) -> RankFailedError:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._processes[rank].pid, signal.SIGUSR1)  # writes the stacks of all its threads
            time.sleep(0.2)
        logs = "".join(f"\n--- rank {r} ---\n{self.log(r)[-_LOG_TAIL:]}" for r in range(len(self._processes)))
        return RankFailedError(f"rank {rank}: {what}{logs}")

    def _end_all(self) -> list[str]:
        """End every process group; return what was still there although its rank had ended."""
        for process in self._processes:
            if any(result[0] == "result" for result in self._results.values()):
                process.join(5)
        left = [line for p in self._processes if not p.is_alive() for line in _wait_until_gone(p.pid)]
        for process in self._processes:
            for number in (signal.SIGCONT, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, number)
        for process in self._processes:
            process.join(10)
        for pipe in self._pipes:
            pipe.close()
        return left


def run_ranks(world_size: int, body: Callable[..., Any], *args: Any, timeout_s: float = 60.0) -> list[Any]:
    """Run ``body(link, *args)`` on every rank; return what the ranks returned."""
    with Ranks(world_size, body, args) as ranks:
        return ranks.join(timeout_s)


@contextlib.contextmanager
def store_in_a_process() -> Iterator[tuple[int, int]]:
    """Host a store in a process of its own; yields its port and its pid, so that a test can end it."""
    mine, theirs = _CONTEXT.Pipe()
    process = _CONTEXT.Process(target=_serve, args=(theirs,))
    process.start()
    assert process.pid is not None
    try:
        yield mine.recv(), process.pid
    finally:
        os.kill(process.pid, signal.SIGCONT) if process.is_alive() else None
        process.kill()
        process.join(10)
        mine.close()


def group_members(group: int) -> list[str]:
    """Return the processes of a process group that are not zombies, as ``pid command``."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            if int(fields[2]) == group and fields[0] not in "ZX":
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found.append(f"{entry.name} {command}")
    return found


def _wait_until_gone(group: int, timeout_s: float = 3.0) -> list[str]:
    deadline = time.monotonic() + timeout_s
    while (left := group_members(group)) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return left


def _process_state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def _serve(pipe: Connection) -> None:
    server = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=30), wait_for_workers=False)
    pipe.send(server.port)
    with contextlib.suppress(EOFError):
        pipe.recv()


def _main(link: RankLink, body: Callable[..., Any], args: tuple[Any, ...], log: str) -> None:
    os.setsid()
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = io.TextIOWrapper(os.fdopen(os.dup(1), "wb"), line_buffering=True)
    sys.stderr = io.TextIOWrapper(os.fdopen(os.dup(2), "wb"), line_buffering=True)
    faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(threadName)s %(message)s")
    torch.set_num_threads(1)
    try:
        result = ("result", body(link, *args))
    except BaseException as error:
        traceback.print_exc()
        result = ("error", f"{type(error).__name__}: {error}")
    sys.stderr.flush()
    link.pipe.send(result)
    link.pipe.close()
