"""The compiled path of DeepSeek's method gives what the numpy path gives."""

from __future__ import annotations

import numpy as np
import pytest

from eplb_fsm.placement.kernels.deepseek import place_layers
from eplb_fsm.placement.policies.deepseek import place_layers_numpy

# (logical, physical, ranks, nodes, groups)
SIZES = [
    (12, 16, 8, 2, 4),
    (12, 16, 8, 1, 1),
    (8, 8, 8, 1, 1),
    (8, 40, 4, 1, 1),
    (16, 24, 8, 4, 8),
    (64, 72, 4, 2, 8),
    (24, 32, 16, 2, 2),
    (5, 6, 1, 1, 1),
    (1, 4, 2, 1, 1),
]


def loads(num_logical: int) -> dict[str, np.ndarray]:
    """Loads of four layers: spread, with ties, with zeros, and as large and as small as floats get."""
    rng = np.random.default_rng(num_logical)
    spread = rng.lognormal(0.0, 2.0, (4, num_logical))
    return {
        "spread": spread,
        "ties": rng.integers(0, 3, (4, num_logical)).astype(np.float64),
        "equal": np.full((4, num_logical), 7.0),
        "zeros": np.zeros((4, num_logical)),
        "one": np.eye(4, num_logical) * 5.0,
        "huge": spread * 1e300,
        "tiny": spread * 1e-320,
        "close": 1.0 + rng.integers(0, 4, (4, num_logical)) * np.finfo(np.float64).eps,
    }


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", list(loads(1)))
def test_equals_the_numpy_path(size: tuple[int, int, int, int, int], kind: str) -> None:
    """Both paths give the same map to the last slot, whatever the load looks like."""
    num_logical, *rest = size
    load = loads(num_logical)[kind]
    assert place_layers(load, *rest).tolist() == place_layers_numpy(load, *rest).tolist()
