"""The estimate: what is remembered, how a memory is chosen, and how predictable the load was."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from eplb_fsm.placement.digest import Int64Array
from eplb_fsm.placement.estimate import DECAYS, LoadEstimator


def _window(*rows: tuple[int, ...]) -> list[Int64Array]:
    return [np.array(rows, dtype=np.int64)]


def test_a_memory_counts_older_windows_less() -> None:
    """Each window counts half as much as the one after it; rounded to whole tokens."""
    estimator = LoadEstimator(0.5)
    assert estimator.update(_window((8, 0)))[0].tolist() == [[8, 0]]
    assert estimator.update(_window((0, 6)))[0].tolist() == [[4, 6]]
    (last,) = estimator.update(_window((1, 1)))
    assert last.tolist() == [[3, 4]]
    assert last.dtype == np.int64


def test_without_a_memory_the_last_window_is_the_estimate() -> None:
    """To the last token."""
    estimator = LoadEstimator(0.0)
    for window in (_window((8, 0), (3, 4)), _window((0, 6), (1, 9))):
        assert np.array_equal(estimator.update(window)[0], window[0])


def test_predictability_is_the_share_that_went_where_it_was_expected() -> None:
    """Of the layers with load in both; banks of other widths count alike. A window without load says nothing."""
    estimator = LoadEstimator(0.0)
    assert estimator.predictability is None
    one, other = np.array([[8, 2], [0, 0]]), np.array([[1, 1, 2]])
    estimator.update([one, other])
    assert estimator.predictability is None
    estimator.update([np.array([[3, 7], [5, 5]]), np.array([[2, 2, 4]])])
    assert estimator.predictability == pytest.approx((0.3 + 0.2 + 1.0) / 2)
    known = estimator.predictability
    estimator.update([np.zeros((2, 2), dtype=np.int64), np.zeros((1, 3), dtype=np.int64)])
    assert estimator.predictability == known


def _still(rng: np.random.Generator) -> Iterator[np.ndarray]:
    shares = rng.lognormal(0.0, 1.0, (4, 32))
    while True:
        yield shares


def _drifting(rng: np.random.Generator) -> Iterator[np.ndarray]:
    shares = rng.lognormal(0.0, 1.0, (4, 32))
    while True:
        yield shares
        shares = shares * rng.lognormal(0.0, 0.3, shares.shape)


def _switching(rng: np.random.Generator) -> Iterator[np.ndarray]:
    while True:
        shares = rng.lognormal(0.0, 1.0, (4, 32))
        yield from (shares, shares)


@pytest.mark.parametrize(
    ("load", "tokens", "decay"), [(_still, 300, 0.9), (_drifting, 100_000, 0.0), (_switching, 2000, 0.0)]
)
def test_the_memory_that_foretells_best_is_chosen(load: object, tokens: int, decay: float) -> None:
    """Few tokens of a load that stays need a long memory; one that drifts or switches needs none."""
    rng = np.random.default_rng(4)
    popularity = load(rng)  # type: ignore[operator]
    estimator = LoadEstimator("auto")
    fixed = {decay: LoadEstimator(decay) for decay in DECAYS}
    for _ in range(16):
        shares = next(popularity)
        window = [rng.poisson(tokens * shares / shares.sum(axis=1, keepdims=True))]
        estimate = estimator.update(window)
        others = {one: it.update(window) for one, it in fixed.items()}
    assert estimator.decay == decay
    assert np.array_equal(estimate[0], others[decay][0])


def test_of_equal_memories_the_shortest_is_chosen() -> None:
    """A load that repeats itself exactly is foretold by all of them."""
    estimator = LoadEstimator("auto")
    for _ in range(3):
        estimate = estimator.update(_window((6, 2)))
    assert estimator.decay == 0.0
    assert estimate[0].tolist() == [[6, 2]]
    assert estimator.predictability == 1.0
