"""Starts the ranks of the engine on this machine, and leaves none of them behind.

Each rank is a process in a session of its own. When one dies the others get a short time to end by themselves
and are then killed, with whatever they started; a launcher that is killed takes its ranks with it.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NoReturn

import torch.distributed as dist

from eplb_fsm.engines.reference.ranks import RankContext, joined
from eplb_fsm.errors import ConfigError, RankError

GRACE_S = 15.0
"""How long the other ranks may go on after one died, before they are killed."""

RankMain = Callable[..., Any]
"""`main(context, *arguments) -> result`; importable from a module, result picklable."""


@dataclass
class _Rank:
    number: int
    process: BaseProcess
    messages: Connection
    result: Any = None
    has_result: bool = False
    error: str = ""
    failed_at: float = 0.0
    done: bool = False
    open: bool = True
    was_stopped: bool = False

    @property
    def exit_status(self) -> int:
        return self.process.exitcode or 0

    def reason(self) -> str:
        status = self.exit_status
        if self.was_stopped:
            return "did not end by itself and was killed"
        if status < 0:
            return f"was killed by {signal.Signals(-status).name}"
        last = self.error.strip().splitlines()[-1:] or ["without a message"]
        return f"ended with exit status {status}: {last[0]}"


def _end_with_parent() -> None:
    """Ends this rank when the launcher is gone, also when it was killed and could not say so."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.killpg(0, signal.SIGKILL)  # this process leads its session, so also whatever it started


def _child(main: RankMain, arguments: Sequence[Any], environment: dict[str, str], messages: Connection) -> None:
    os.setsid()
    os.environ.update(environment)
    threading.Thread(target=_end_with_parent, daemon=True, name="end-with-launcher").start()
    try:
        with joined(lambda message: _send(messages, "message", message)) as context:
            _send(messages, "result", main(context, *arguments))
    except BaseException:
        _send(messages, "error", time.time(), traceback.format_exc())
        _leave(messages, 1)
    atexit._run_exitfuncs()  # what this process registered, such as named semaphores, is given back
    _leave(messages, 0)


def _leave(messages: Connection, status: int) -> NoReturn:
    """Ends the rank without taking the interpreter apart.

    Threads of a broken group must not keep a failed rank alive, and a daemon thread inside a C++ call when the
    interpreter is finalized ends the process with an abort.
    """
    messages.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _send(messages: Connection, *content: Any) -> None:
    """Sends by value: a connection's own pickling would leave tensors in memory that ends with this rank."""
    messages.send_bytes(pickle.dumps(content))


class _Launch:
    """The ranks of one run, and what they reported."""

    def __init__(self, on_message: Callable[[int, Any], None] | None, grace_s: float) -> None:
        self._on_message = on_message
        self._grace_s = grace_s
        self.ranks: list[_Rank] = []

    def start(self, main: RankMain, num_ranks: int, arguments: Sequence[Any], port: int) -> None:
        context = multiprocessing.get_context("spawn")
        for number in range(num_ranks):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_child,
                args=(main, tuple(arguments), _environment(number, num_ranks, port), sender),
                name=f"eplb-rank-{number}",
            )
            process.start()
            sender.close()
            self.ranks.append(_Rank(number, process, receiver))

    def run(self, timeout_s: float | None) -> None:
        limit = None if timeout_s is None else time.monotonic() + timeout_s
        while not all(rank.done for rank in self.ranks):
            if limit is not None and time.monotonic() > limit:
                late = [rank.number for rank in self.ranks if not rank.done]
                raise RankError(f"ranks {late} did not end within {timeout_s} s and were killed", late)
            self._listen()
            failed_at = min((rank.failed_at for rank in self.ranks if rank.failed_at), default=0.0)
            if failed_at and time.time() > failed_at + self._grace_s:
                self.kill()

    def _listen(self) -> None:
        waited: list[Any] = [rank.messages for rank in self.ranks if rank.open]
        waited += [rank.process.sentinel for rank in self.ranks if not rank.done]
        ready = wait(waited, timeout=0.2)
        for rank in self.ranks:
            if rank.open and rank.messages in ready:
                self._receive(rank)
            elif not rank.done and _has_ended(rank.process):
                self._end(rank)

    def _receive(self, rank: _Rank) -> None:
        try:
            kind, *content = pickle.loads(rank.messages.recv_bytes())
        except (EOFError, OSError):
            rank.open = False
            return
        if kind == "result":
            rank.result, rank.has_result = content[0], True
        elif kind == "error":
            rank.failed_at, rank.error = content
        elif self._on_message is not None:
            self._on_message(rank.number, content[0])

    def _end(self, rank: _Rank) -> None:
        _kill_session(rank.process)
        rank.process.join()
        while rank.open and rank.messages.poll():
            self._receive(rank)
        rank.done = True
        if (rank.exit_status or not rank.has_result) and not rank.failed_at:
            rank.failed_at = time.time()

    def kill(self) -> None:
        """Kills what is left of every rank and reaps it."""
        for rank in self.ranks:
            if not rank.done:
                rank.was_stopped = True
                _kill_session(rank.process)
                rank.process.kill()

    def close(self) -> None:
        """Reaps all ranks; none is left when it returns."""
        self.kill()
        for rank in self.ranks:
            rank.process.join()
            rank.process.close()
            rank.messages.close()

    def failure(self) -> RankError | None:
        """Returns an error that names the rank that failed first, or None."""
        failed = [rank for rank in self.ranks if rank.failed_at]
        if not failed:
            return None
        first = min(failed, key=lambda rank: (rank.was_stopped, bool(rank.error), rank.failed_at))
        others = [f"rank {rank.number} {rank.reason()}" for rank in failed if rank is not first]
        details = "".join(f"\n  then {text}" for text in others)
        trace = f"\n{first.error}" if first.error else ""
        return RankError(f"rank {first.number} {first.reason()}{details}{trace}", [first.number])


def _environment(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    environment = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    if "GLOO_SOCKET_IFNAME" not in os.environ:  # a host name that does not resolve must not matter here
        environment["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    return environment


def _has_ended(process: BaseProcess) -> bool:
    """Whether a rank is dead, without reaping it; its sentinel may be held open by a process it started."""
    if process.pid is None or not hasattr(os, "waitid"):
        return process.exitcode is not None
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _kill_session(process: BaseProcess) -> None:
    """Kills the processes that a rank started; a dead rank's session exists until it is reaped."""
    with suppress(ProcessLookupError, PermissionError):
        if process.pid is not None and os.getpgid(process.pid) == process.pid:
            os.killpg(process.pid, signal.SIGKILL)


def launch(
    main: RankMain,
    num_ranks: int,
    arguments: Sequence[Any] = (),
    *,
    on_message: Callable[[int, Any], None] | None = None,
    timeout_s: float | None = None,
    grace_s: float = GRACE_S,
) -> list[Any]:
    """Runs `main(context, *arguments)` in `num_ranks` processes; blocks until all have ended and are reaped.

    Args:
        main: What every rank runs; importable, since processes are spawned.
        num_ranks: Number of processes, from 1.
        arguments: Picklable; the same for every rank.
        on_message: Called in this thread with the rank and what it sent with `context.send`.
        timeout_s: Limit for the whole run, seconds; None for no limit.
        grace_s: After one rank failed, how long the others may take to end by themselves.

    Returns:
        The result of every rank, by rank.

    Raises:
        ConfigError: `num_ranks` is not positive.
        RankError: A rank failed; names the first one, how it ended, and what the others did.
    """
    if num_ranks < 1:
        raise ConfigError(f"num_ranks is {num_ranks}: start at least one rank")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    run = _Launch(on_message, grace_s)
    try:
        run.start(main, num_ranks, arguments, store.port)
        run.run(timeout_s)
        failure = run.failure()
        if failure is not None:
            raise failure
        return [rank.result for rank in run.ranks]
    finally:
        run.close()


__all__ = ["GRACE_S", "RankContext", "RankMain", "launch"]
