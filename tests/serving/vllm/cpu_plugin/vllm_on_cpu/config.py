"""The check of the configuration that refuses EPLB on CPUs."""

from __future__ import annotations

from typing import Any

from vllm.config import parallel


class _PassesForCuda:
    """The real platform, but for the question by which `ParallelConfig` decides about EPLB.

    Only that module sees it, and it asks `is_cuda_alike` nowhere else.
    """

    def __init__(self, platform: Any) -> None:
        self._platform = platform

    def __getattr__(self, name: str) -> Any:
        return getattr(self._platform, name)

    def is_cuda_alike(self) -> bool:
        """Claim what the check wants to hear."""
        return True


def apply() -> None:
    """Let `ParallelConfig(enable_eplb=True)` through."""
    parallel.current_platform = _PassesForCuda(parallel.current_platform)
