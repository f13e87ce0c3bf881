"""What a test may ask the workers of a running engine; given to it as `worker_extension_cls`."""

from __future__ import annotations

from typing import Any


class Probe:
    """Becomes a base class of vLLM's worker."""

    model_runner: Any

    def probe_maps(self) -> list[list[list[int]]]:
        """The physical experts of each logical one, per MoE layer, as the router reads them; empty without EPLB."""
        layers = getattr(self.model_runner.model, "moe_layers", ())
        return [_replicas(layer.eplb_state) for layer in layers if layer.eplb_state is not None]


def _replicas(state: Any) -> list[list[int]]:
    counts = state.logical_replica_count.tolist()
    rows = state.logical_to_physical_map[:, : max(counts)].tolist()
    return [row[:count] for row, count in zip(rows, counts, strict=True)]
