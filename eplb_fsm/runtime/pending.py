"""Something that the worker waits for.

A worker job is a generator that yields these. The real thread blocks in :meth:`Pending.wait`; the simulation
asks :meth:`Pending.poll` and lets another rank run instead. So both execute the same job.
"""

from __future__ import annotations

from typing import Protocol


class Pending(Protocol):
    """One operation under way."""

    def poll(self) -> bool:
        """Return True once it is done. Never blocks; any thread.

        Raises:
            TransferError: If the operation failed.
        """
        ...

    def wait(self, timeout_s: float) -> None:
        """Block until it is done; worker thread only.

        Raises:
            TransferError: If the operation failed, or was not done in time.
        """
        ...


class Done:
    """A pending operation that was done at once."""

    def poll(self) -> bool:
        """Return True."""
        return True

    def wait(self, timeout_s: float) -> None:
        """Return at once."""
