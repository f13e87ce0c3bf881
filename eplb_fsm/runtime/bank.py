"""Banks: the tensors that belong to the experts of a model, and the rows that move.

Which tensors belong to an expert cannot be read off shapes (fused shared experts, transposed scales, scales
collapsed to one per rank), so the engine names them. A scan of shapes stands beside it as a lint: it finds a
tensor that nobody named, which would otherwise be a wrong answer later.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from eplb_fsm.errors import BankError
from eplb_fsm.runtime.rowlayout import RowLayout


class Bank:
    """The experts of one model (or of its draft model) on one rank.

    Args:
        name: What messages call it, for example ``"target"``.
        num_logical_experts: Logical experts in each MoE layer.
        num_physical_experts: Physical experts in each MoE layer, over all ranks.
        tensors: One mapping for each MoE layer: name of the tensor -> tensor of shape
            ``(num_local_physical_experts, ...)``, contiguous, any dtype. They are the engine's live tensors:
            kept, and written in place at a commit. All tensors of an expert move as one unit.
        layer_ids: The model's own numbers of these layers, for messages; counted from 0 if not given.

    Raises:
        BankError: If the tensors cannot be moved as registered; says which and what to change.
    """

    def __init__(
        self,
        name: str,
        num_logical_experts: int,
        num_physical_experts: int,
        tensors: Sequence[Mapping[str, torch.Tensor]],
        layer_ids: Sequence[int] | None = None,
    ) -> None:
        self.name = name
        self.num_logical_experts = num_logical_experts
        self.num_physical_experts = num_physical_experts
        self.tensors = [dict(layer) for layer in tensors]
        self.layer_ids = tuple(layer_ids) if layer_ids is not None else tuple(range(len(self.tensors)))
        self.num_local_physical_experts = self._check()
        self._views = [[_byte_rows(t, name) for t in layer.values()] for layer in self.tensors]
        self.layout = self._common_layout()
        self._rows = [
            [[view[slot] for view in layer] for slot in range(self.num_local_physical_experts)] for layer in self._views
        ]

    def _common_layout(self) -> RowLayout:
        layouts = {RowLayout.of([view.shape[1] for view in layer]) for layer in self._views}
        if len(layouts) != 1:
            raise BankError(
                f"bank {self.name!r}: an expert has other sizes in other layers; "
                "register the layers of each size as a bank of their own"
            )
        return layouts.pop()

    @property
    def device(self) -> torch.device:
        """Where the experts are."""
        return self._rows[0][0][0].device

    @property
    def num_moe_layers(self) -> int:
        """MoE layers of the bank."""
        return len(self.tensors)

    @property
    def signature(self) -> list[list[tuple[str, list[int], str]]]:
        """Names, shapes and dtypes of all tensors: what must be equal on all ranks."""
        return [[(k, list(t.shape), str(t.dtype)) for k, t in layer.items()] for layer in self.tensors]

    def live_row(self, layer: int, local_slot: int) -> list[torch.Tensor]:
        """Return views on the bytes of one expert: one ``(n,)`` uint8 tensor for each registered tensor."""
        return self._rows[layer][local_slot]

    def _check(self) -> int:
        if not self.tensors or not all(self.tensors):
            raise BankError(f"bank {self.name!r}: register at least one layer, each with at least one tensor")
        if len(self.layer_ids) != len(self.tensors):
            raise BankError(
                f"bank {self.name!r}: {len(self.layer_ids)} layer_ids for {len(self.tensors)} layers of tensors"
            )
        sizes = {t.shape[0] if t.ndim else 0 for layer in self.tensors for t in layer.values()}
        if len(sizes) != 1 or 0 in sizes:
            raise BankError(
                f"bank {self.name!r}: the first dimension of every tensor must be the rank's local physical "
                f"experts, but {sorted(sizes)} were seen; register row views of one length"
            )
        names = [tuple(layer) for layer in self.tensors]
        if any(n != names[0] for n in names):
            raise BankError(f"bank {self.name!r}: every layer must register the same tensors, seen {set(names)}")
        return sizes.pop()

    def check_ranks(self, world_size: int) -> None:
        """Check the number of local experts against the number of ranks.

        Raises:
            BankError: If they do not multiply to ``num_physical_experts``.
        """
        if self.num_local_physical_experts * world_size != self.num_physical_experts:
            raise BankError(
                f"bank {self.name!r}: {self.num_local_physical_experts} rows on each of {world_size} ranks are "
                f"not num_physical_experts = {self.num_physical_experts}; register all local physical experts "
                "and choose num_redundant_experts so that the ranks hold equally many"
            )


def _byte_rows(tensor: torch.Tensor, bank: str) -> torch.Tensor:
    if not tensor.is_contiguous():
        raise BankError(
            f"bank {bank!r}: a tensor of shape {tuple(tensor.shape)} is not contiguous, so the rows of an "
            "expert cannot be moved in place; register a contiguous tensor or row views"
        )
    if tensor.numel() == 0:
        raise BankError(f"bank {bank!r}: a tensor of shape {tuple(tensor.shape)} is empty; leave it out")
    return tensor.detach().view(tensor.shape[0], -1).view(torch.uint8)


def find_unregistered_tensors(
    named_tensors: Iterable[tuple[str, torch.Tensor]], bank: Bank, *, ignore: Iterable[str] = ()
) -> None:
    """Refuse a tensor that looks like it has the expert dimension but that no bank names.

    Args:
        named_tensors: Parameters and buffers of the experts' modules, such as ``module.named_parameters()``.
        bank: The bank that should name them.
        ignore: Names that are known to be something else.

    Raises:
        BankError: Naming the tensors, with what to do about them.
    """
    registered = {t.untyped_storage().data_ptr() for layer in bank.tensors for t in layer.values()}
    skipped = set(ignore)
    missing = [
        f"{name} {tuple(tensor.shape)}"
        for name, tensor in named_tensors
        if name not in skipped
        and tensor.ndim >= 1
        and tensor.shape[0] == bank.num_local_physical_experts
        and tensor.untyped_storage().data_ptr() not in registered
    ]
    if missing:
        raise BankError(
            f"bank {bank.name!r}: these tensors have the dimension of the local physical experts "
            f"({bank.num_local_physical_experts}) and would not move with them: {', '.join(missing)}; "
            "register them, or name them in `ignore` if they do not belong to experts"
        )
