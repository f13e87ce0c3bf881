"""Counting tokens per logical expert on the device, without a host sync.

All tensors are allocated once. Nothing here reads a value back, has a shape that depends on data or picks
elements by a mask, so every method may be captured in a CUDA graph or enqueued behind one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import numpy as np
import torch

from eplb_fsm.errors import ConfigError, LoadError

_ID_DTYPES = (torch.int64, torch.int32)
# Columns that no expert owns: before the first one for negative ids and masked tokens, behind the last
# one for ids that are too large.
_PADDING_COLUMNS = 2


class LoadSource(Protocol):
    """Where a rank's expert load comes from; an engine with counters of its own brings another one.

    `rotate` and `snapshot` are enqueued on the compute stream by the decode thread.
    """

    @property
    def num_buckets(self) -> int:
        """Closed buckets that the window holds; `rotate` is called that often per window."""
        ...

    @property
    def snapshots(self) -> Sequence[torch.Tensor]:
        """The tensors that `snapshot` fills: int64 (num_moe_layers, num_logical_experts) for each bank."""
        ...

    def record(self, bank: int, layer: int, topk_ids: torch.Tensor, valid: torch.Tensor | None = None) -> None:
        """Count the routing of one layer's forward pass; see :meth:`LoadRecorder.record`."""
        ...

    def rotate(self) -> None:
        """Close a bucket of the window."""
        ...

    def snapshot(self) -> torch.Tensor:
        """Copy the window's sum to `snapshots` and begin the window anew."""
        ...


class LoadRecorder:
    """Tokens per logical expert and layer of the last `num_buckets` buckets and the open one.

    The counters only ever grow (int64 holds a million tokens a second for 290,000 years).

    All methods only enqueue on the current stream of the calling thread, which must be the decode
    thread's compute stream; none blocks.

    Args:
        shapes: (num_moe_layers, num_logical_experts) of each bank.
        device: Where the routing happens.
        num_buckets: Closed buckets in the window; more of them forget old load more smoothly, and closing one is a
            good part of what an idle round costs.

    Raises:
        ConfigError: no bank, or a number that is not positive.
    """

    def __init__(
        self, shapes: Sequence[tuple[int, int]], device: torch.device | str = "cpu", num_buckets: int = 4
    ) -> None:
        if num_buckets < 1:
            raise ConfigError(f"num_buckets is {num_buckets}; set it to 1 or more")
        if not shapes or min(min(shape) for shape in shapes) < 1:
            raise ConfigError(
                f"shapes {list(shapes)}: give (num_moe_layers, num_logical_experts), 1 or more, for every bank"
            )
        # One flat run of int64 for all banks, so that rotate and snapshot are the same few operations
        # however many banks there are.
        size = sum(layers * (experts + _PADDING_COLUMNS) for layers, experts in shapes)
        self._total = torch.zeros(size, dtype=torch.int64, device=device)
        # What the total was where each bucket of the window begins, the open one included: then closing a bucket is
        # one copy, and the window's sum one subtraction.
        self._starts = torch.zeros((num_buckets + 1, size), dtype=torch.int64, device=device)
        self._buckets = tuple(self._starts)
        self._closers = tuple(_copier(bucket, self._total) for bucket in self._buckets)
        self._open_bucket = 0
        self._sum = torch.zeros(size, dtype=torch.int64, device=device)
        self._one = torch.ones(1, dtype=torch.int64, device=device)
        self._ones = self._one
        self._nobody = torch.full((), -1, dtype=torch.int64, device=device)
        self._rows = _rows(self._total, shapes)
        self._shapes = tuple(shapes)
        self._edges = {
            (bank, dtype): torch.arange(experts + 1, dtype=dtype, device=device)
            for bank, (_, experts) in enumerate(shapes)
            for dtype in _ID_DTYPES
        }
        counts = [_bank(self._sum, shapes, bank)[:, 1:-1] for bank in range(len(shapes))]
        self._snapshot = torch.zeros(sum(c.numel() for c in counts), dtype=torch.int64, device=device)
        self.snapshots = _as_banks(self._snapshot, shapes)
        self._copies = tuple(zip(self.snapshots, counts, strict=True))

    @property
    def num_buckets(self) -> int:
        """Closed buckets that the window holds."""
        return len(self._buckets) - 1

    def record(self, bank: int, layer: int, topk_ids: torch.Tensor, valid: torch.Tensor | None = None) -> None:
        """Count the routing of one layer's forward pass.

        Args:
            bank: Number of the bank.
            layer: MoE layer of the bank, from 0.
            topk_ids: (num_tokens, top_k) int64 or int32 on the recorder's device: logical experts that each
                token goes to. An id outside 0..num_logical_experts-1 (-1, say) counts for no expert.
            valid: (num_tokens,) bool: False for padding, which counts for no expert. None: all are valid.

        Raises:
            LoadError: there is no such bank or layer, or the ids are not int64 or int32.
        """
        row = self._rows.get((bank, layer))
        edges = self._edges.get((bank, topk_ids.dtype))
        if row is None or edges is None:
            raise self._refused(bank, layer, topk_ids)
        if valid is not None:
            topk_ids = torch.where(valid.unsqueeze(-1), topk_ids, self._nobody)
        # Bucketing maps every id to its column and everything else to a padding column in one operation:
        # id + 1, cut off at 0 below and at the last column above.
        columns = torch.bucketize(topk_ids.reshape(-1), edges, right=True)
        num_ids = columns.shape[0]
        if num_ids != self._ones.shape[0]:
            self._ones = self._one.expand(num_ids)
        row.index_add_(0, columns, self._ones)

    def rotate(self) -> None:
        """Close the open bucket; the oldest closed one leaves the window."""
        self._open_bucket = self._next_bucket
        self._closers[self._open_bucket]()

    def _bank_total(self, bank: int) -> torch.Tensor:
        """A bank's part of the running total, (num_moe_layers, num_logical_experts + 2): expert e in column e + 1."""
        return _bank(self._total, self._shapes, bank)

    @property
    def _next_bucket(self) -> int:
        """Also the oldest one."""
        return (self._open_bucket + 1) % len(self._buckets)

    def snapshot(self) -> torch.Tensor:
        """Copy the window's sum to the snapshot tensors, then set the window to zero.

        Returns:
            int64 (sum over banks of num_moe_layers * num_logical_experts,), of which `snapshots` are
            views: always the same tensor, overwritten by the next call.
        """
        torch.sub(self._total, self._buckets[self._next_bucket], out=self._sum)
        for snapshot, counts in self._copies:
            snapshot.copy_(counts)
        self._starts.copy_(self._total)
        return self._snapshot

    def _refused(self, bank: int, layer: int, topk_ids: torch.Tensor) -> LoadError:
        if (bank, layer) not in self._rows:
            known = [f"bank {i} has layers 0..{len(view) - 1}" for i, view in enumerate(self.snapshots)]
            return LoadError(f"there is no layer {layer} in bank {bank}; {', '.join(known)}")
        return LoadError(f"topk_ids are {topk_ids.dtype}; give int64 or int32 ids of logical experts")


def _copier(to: torch.Tensor, source: torch.Tensor) -> Callable[[], object]:
    """What copies; in host memory without torch, whose call costs more than the copy in every other idle round."""
    if to.device.type == "cpu":
        return partial(np.copyto, to.numpy(), source.numpy())
    return partial(to.copy_, source)


def _bank(flat: torch.Tensor, shapes: Sequence[tuple[int, int]], bank: int) -> torch.Tensor:
    """A bank's part of a flat tensor as (num_moe_layers, num_logical_experts + padding columns)."""
    sizes = [layers * (experts + _PADDING_COLUMNS) for layers, experts in shapes]
    start = sum(sizes[:bank])
    return flat[start : start + sizes[bank]].view(shapes[bank][0], -1)


def _rows(flat: torch.Tensor, shapes: Sequence[tuple[int, int]]) -> dict[tuple[int, int], torch.Tensor]:
    """Views of the rows by (bank, layer), made once: making one costs as much as counting."""
    return {(bank, layer): row for bank in range(len(shapes)) for layer, row in enumerate(_bank(flat, shapes, bank))}


def _as_banks(flat: torch.Tensor, shapes: Sequence[tuple[int, int]]) -> tuple[torch.Tensor, ...]:
    parts = torch.split(flat, [layers * experts for layers, experts in shapes])
    return tuple(part.view(shape) for part, shape in zip(parts, shapes, strict=True))
