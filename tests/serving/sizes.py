"""How large the random models are that the engines serve here."""

from __future__ import annotations

from typing import NamedTuple


class ModelSize(NamedTuple):
    """Layers of a model, all with experts, and what an expert is: two matrices hidden to intermediate, one back."""

    layers: int
    experts: int
    hidden: int
    intermediate: int


SERVING_WORK = ModelSize(layers=8, experts=64, hidden=512, intermediate=256)
"""Experts of 1.5 MB in float32: the work of ``tests.benchmarks.serving``."""
