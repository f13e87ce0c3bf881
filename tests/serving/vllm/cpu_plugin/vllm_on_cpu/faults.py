"""Faults in the rebalance of `eplb_fsm`: one rank is struck once, in the first chance from some epoch on.

VLLM_ON_CPU_FAULT=place,rank,epoch raises there, and VLLM_ON_CPU_FAULT=place,rank,epoch,seconds stops the whole process
there, as SIGSTOP does, and lets it go on after that time. The places:

    begin     the worker thread is about to exchange rows with other ranks
    arrived   it has exchanged them, and the other ranks know nothing of the fault
    pass      a forward pass begins while rows are moving
    commit    promised rows have been copied over live ones, the tables that point to them have not been written

With VLLM_ON_CPU_FAIL_STOP=raise, a negative control, a rank that must not go on only raises, and does not end.
"""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NoReturn

from vllm_on_cpu import passes

logger = logging.getLogger("vllm.on_cpu.faults")

Strike = Callable[[int], None]
"""Called with the epoch wherever the fault could strike."""


class InjectedError(Exception):
    """No code of the engine or of the library raises this."""


class _Fault:
    def __init__(self, place: str, rank: str, epoch: str, seconds: str = "0") -> None:
        self.place = place
        self._rank = int(rank)
        self._first_epoch = int(epoch)
        self._seconds = float(seconds)
        self._is_over = False

    def strike(self, epoch: int) -> None:
        """Do it, unless this is another rank, or too early, or it has been done."""
        if self._is_over or epoch < self._first_epoch or passes.rank() != self._rank:
            return
        self._is_over = True
        passes.note("fault")
        logger.info("fault at %s in epoch %d begins", self.place, epoch)
        if not self._seconds:
            raise InjectedError(f"injected at {self.place} in epoch {epoch}")
        _stop_this_process(self._seconds)
        logger.info("fault at %s in epoch %d is over", self.place, epoch)


def apply() -> None:
    """Do nothing, unless a fault is asked for."""
    words = os.environ.get("VLLM_ON_CPU_FAULT")
    if not words:
        return
    fault = _Fault(*words.split(","))
    _PLACES[fault.place](fault.strike)
    if os.environ.get("VLLM_ON_CPU_FAIL_STOP") == "raise":
        _survive_fail_stops()


def _stop_this_process(seconds: float) -> None:
    """Stop all threads, this one until it is over: a stop that it sent by itself would reach it a little later."""
    process = os.getpid()
    subprocess.run(["sh", "-c", f"kill -STOP {process}; sleep {seconds}; kill -CONT {process}"], check=True)


# -- the worker's side ------------------------------------------------------------------------------------


class _Transport:
    """The real one, but for its exchanges; not for those of chunks that stay on their rank."""

    def __init__(self, transport: Any, *, at_begin: Callable[[], None], at_end: Callable[[], None]) -> None:
        self._transport = transport
        self._at_begin = at_begin
        self._at_end = at_end

    def begin(self, sends: Sequence[Any], receives: Sequence[Any], tag: int) -> Any:
        """Strike before or after the exchange."""
        if not sends and not receives:
            return self._transport.begin(sends, receives, tag)
        self._at_begin()
        return _Exchange(self._transport.begin(sends, receives, tag), self._at_end)


class _Exchange:
    def __init__(self, exchange: Any, at_end: Callable[[], None]) -> None:
        self._exchange = exchange
        self._at_end = at_end

    def wait(self, timeout_s: float) -> None:
        self._exchange.wait(timeout_s)
        self._at_end()


def _strike_exchanges(strike: Strike, *, has_begun: bool) -> None:
    from eplb_fsm.runtime.jobs import Jobs

    stage = Jobs._stage

    def stage_with_fault(self: Any, epoch: int, *args: Any) -> Any:
        def strike_now() -> None:
            strike(epoch)

        at_begin, at_end = (_nothing, strike_now) if has_begun else (strike_now, _nothing)
        transport = _Transport(self.transport, at_begin=at_begin, at_end=at_end)
        return stage(replace(self, transport=transport), epoch, *args)

    Jobs._stage = stage_with_fault


def _nothing() -> None:
    pass


# -- the decode thread ------------------------------------------------------------------------------------


def _strike_passes(strike: Strike) -> None:
    def strike_while_rows_move(runner: Any) -> None:
        session = getattr(runner.eplb_state, "session", None)
        if session is not None:
            health = session.fsm.health()
            if health.state == "TRANSFERRING":
                strike(health.epoch)

    passes.before_each_pass(strike_while_rows_move)


class _Tables:
    """The real ones, but for their writing."""

    def __init__(self, tables: Any, at_write: Callable[[], None]) -> None:
        self._tables = tables
        self._at_write = at_write

    def write(self, prepared: object) -> None:
        """Strike first."""
        self._at_write()
        self._tables.write(prepared)


def _strike_commits(strike: Strike) -> None:
    from eplb_fsm.runtime.epoch import EpochRunner

    commit = EpochRunner.commit

    def commit_with_fault(self: Any) -> None:
        program = self._programs[self._num_committed]
        program.tables = _Tables(program.tables, lambda: strike(self._epoch))
        commit(self)

    EpochRunner.commit = commit_with_fault


def _survive_fail_stops() -> None:
    from eplb_fsm.engines.vllm.engine import VllmEngine

    make_side = VllmEngine.side

    def side(self: Any) -> Any:
        made = make_side(self)
        made.fail_stop = _raise_anew
        return made

    VllmEngine.side = side


def _raise_anew(error: Exception) -> NoReturn:
    """Not the same object twice: vLLM adds the traceback to it as a note each time, and notes are printed in those."""
    raise InjectedError(f"only raised: {error}")


_PLACES: dict[str, Callable[[Strike], None]] = {
    "begin": lambda strike: _strike_exchanges(strike, has_begun=False),
    "arrived": lambda strike: _strike_exchanges(strike, has_begun=True),
    "pass": _strike_passes,
    "commit": _strike_commits,
}
