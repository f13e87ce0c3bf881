"""Sizes that bound a plan: bytes of an expert in each bank, and bytes of a commit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from eplb_fsm.errors import BankError, ConfigError
from eplb_fsm.placement.placement import Placement


@dataclass(frozen=True, slots=True)
class BankShape:
    """Name of a bank and the size of its experts.

    Attributes:
        name: The bank's name, for messages.
        row_bytes: Bytes of one expert (all its tensors together), for each MoE layer.

    Raises:
        BankError: a layer's experts have no bytes, or there is no layer.
    """

    name: str
    row_bytes: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.row_bytes or min(self.row_bytes) < 1:
            raise BankError(
                f"bank {self.name!r} has row_bytes {self.row_bytes}; give the bytes of one expert, "
                "1 or more, for every MoE layer"
            )


@dataclass(frozen=True, slots=True)
class Budget:
    """What one commit may cost, and one epoch.

    Attributes:
        commit_bytes: Most bytes that one rank writes in one commit, and most that it sends for it.
        staging_buffers: Chunks that may be staged at the same time.
        epoch_bytes: Most bytes that come from other ranks in one epoch, all ranks together; 0: no limit.

    Raises:
        ConfigError: a number is not positive, or `epoch_bytes` is negative.
    """

    commit_bytes: int
    staging_buffers: int = 2
    epoch_bytes: int = 0

    def __post_init__(self) -> None:
        for name in ("commit_bytes", "staging_buffers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; set it to 1 or more")
        if self.epoch_bytes < 0:
            raise ConfigError(f"epoch_bytes is {self.epoch_bytes}; set it to 0, for no limit, or more")


def check_banks(placements: Sequence[Placement], shapes: Sequence[BankShape]) -> None:
    """Check that banks and their sizes go together.

    Raises:
        BankError: another number of banks or layers, or banks over different numbers of ranks.
    """
    if not placements or len(placements) != len(shapes):
        raise BankError(f"{len(placements)} placements for {len(shapes)} banks; give one placement for each")
    for placement, shape in zip(placements, shapes, strict=True):
        if len(shape.row_bytes) != placement.num_moe_layers:
            raise BankError(
                f"bank {shape.name!r} gives row_bytes of {len(shape.row_bytes)} layers, its placement has "
                f"{placement.num_moe_layers}; register every MoE layer"
            )
        if placement.num_ranks != placements[0].num_ranks:
            raise BankError(
                f"bank {shape.name!r} is spread over {placement.num_ranks} ranks, bank {shapes[0].name!r} "
                f"over {placements[0].num_ranks}; all banks of one state machine share their ranks"
            )


def missing_commit_bytes(shapes: Sequence[BankShape], budget: Budget) -> str:
    """Why no plan fits the budget, naming the bytes needed; "" when every plan can be cut to fit.

    One expert per rank is enough for every plan: see :mod:`eplb_fsm.placement.cut`.
    """
    needed, layer, name = max(
        (size, layer, shape.name) for shape in shapes for layer, size in enumerate(shape.row_bytes)
    )
    if needed <= budget.commit_bytes:
        return ""
    return (
        f"commit_bytes={budget.commit_bytes} is less than one expert of layer {layer} of bank {name!r}; "
        f"set commit_bytes to at least {needed}"
    )
