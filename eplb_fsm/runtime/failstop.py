"""What a rank does that must not run another forward pass.

An exception is not a fail-stop: engines swallow exceptions of ranks that produce no output, and run the next
forward pass. So the contract is a callable that does not return.
"""

from __future__ import annotations

import logging
import os
from typing import NoReturn, Protocol

from eplb_fsm.errors import EplbError

logger = logging.getLogger(__name__)

EXIT_STATUS = 70
"""``EX_SOFTWARE`` of sysexits.h."""


class FailStopAction(Protocol):
    """Ends this rank's serving; must not return."""

    def __call__(self, error: EplbError) -> NoReturn:
        """End serving because of ``error``."""
        ...


def exit_process(error: EplbError) -> NoReturn:
    """Log the error and end the process at once, without clean-up that could block: the default."""
    logger.critical("fail-stop: %s", error)
    logging.shutdown()
    os._exit(EXIT_STATUS)


def raise_error(error: EplbError) -> NoReturn:
    """Raise the error: for engines that declare that an exception out of ``step()`` stops them."""
    raise error
