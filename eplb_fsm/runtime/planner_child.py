"""The planner's child process: reads loads from a pipe, writes plans. Imports numpy, not torch."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from multiprocessing.connection import Connection

_NICENESS = 19
"""The decode loop comes first where cores are few."""


def main() -> None:
    """Serve until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, whose end closes the pipe
    os.nice(_NICENESS)
    pipe = Connection(int(sys.argv[1]))
    threading.Thread(target=_end_with_parent, args=(pipe.fileno(),), daemon=True).start()
    try:
        _serve(pipe)
    except (EOFError, OSError):
        return


def _end_with_parent(fileno: int) -> None:
    """End the process when the parent's end of the pipe closes, also in the middle of a policy that never returns."""
    poller = select.poll()
    poller.register(fileno, 0)  # a hang-up is always reported
    poller.poll()
    os._exit(0)


def _serve(pipe: Connection) -> None:
    task = pipe.recv()
    try:
        task.warm_up()
    except Exception as error:  # the parent turns it into one clear error
        pipe.send(str(error))
        return
    pipe.send(None)
    while True:
        request = pipe.recv()
        try:
            pipe.send(task.plan(request))
        except Exception as error:  # a policy may raise anything
            pipe.send(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
