"""Every exception that the library raises on purpose.

Each message names what is wrong, the value that was seen, and what to change. Any other exception
that comes out of a public call is a bug in the library.
"""

from __future__ import annotations

from collections.abc import Sequence


class EplbError(Exception):
    """Base of all errors of the library; never raised itself."""


class ConfigError(EplbError, ValueError):
    """An option of the configuration cannot work."""


class ConfigMismatch(ConfigError):
    """The ranks of one domain were started with different configurations."""


class PlacementError(EplbError, ValueError):
    """A placement, or a placement file, is not valid."""


class PlanError(EplbError, ValueError):
    """A plan does not lead from the live placement to its target by valid steps."""


class BankError(EplbError, ValueError):
    """The expert tensors of a bank cannot be moved as they were registered."""


class LoadError(EplbError, ValueError):
    """Recorded load does not have the shape or type that the bank needs."""


class UsageError(EplbError, RuntimeError):
    """A method was called where its contract forbids it."""


class TransferError(EplbError, RuntimeError):
    """A background transfer failed; the epoch it belonged to is aborted."""


class TransportLost(TransferError):
    """The transfer group is broken for good; rebalancing stops and serving goes on."""


class ChannelError(EplbError, RuntimeError):
    """The vote channel is lost; rebalancing stops and serving goes on."""


class RankError(EplbError, RuntimeError):
    """An error that concerns particular ranks.

    Attributes:
        ranks: The ranks that the error names, ascending.
    """

    def __init__(self, message: str, ranks: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.ranks: tuple[int, ...] = tuple(sorted(ranks))


class ConsensusTimeout(RankError):
    """A decision did not arrive in time where going on without it could tear the expert map."""


class PeerFailed(RankError):
    """Another rank could not start; its own error is in the message."""


class PeerLost(RankError):
    """Ranks whose liveness mark stopped; their forward passes will not come back."""


class FailStop(RankError):
    """This rank must not run another forward pass: a promised commit could not be kept."""
