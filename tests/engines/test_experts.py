"""The parts of the expert-parallel block that need no second rank."""

from __future__ import annotations

import itertools

import pytest
import torch

from eplb_fsm.engines.reference import experts
from eplb_fsm.engines.reference.cache import SlotCache
from eplb_fsm.engines.reference.experts import check_row_bits
from eplb_fsm.errors import ConfigError


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(128, 128), (64, 128), (256, 512)])
def test_padded_products_are_stable_on_this_machine(threads: int, shape: tuple[int, int]) -> None:
    """A row's bits are the same in every padded batch, with one thread and with two."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check_row_bits(*shape, most_rows=96)
    finally:
        torch.set_num_threads(before)


def test_unstable_products_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the product of a row depends on its batch, the engine says so instead of starting."""
    product = torch.mm

    def unstable(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return product(rows, weight) + (1e-6 if len(rows) > 16 else 0.0)

    monkeypatch.setattr(experts.torch, "mm", unstable)
    with pytest.raises(ConfigError, match="other bits"):
        check_row_bits(8, 8, most_rows=64)


def test_contributions_are_added_in_top_k_order() -> None:
    """The sum over the chosen experts is the one that goes through them in the router's order, to the bit."""
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(64, 4, 32, generator=generator)
    weights = torch.rand(64, 4, generator=generator)
    total = experts._combine(outputs, weights)
    torch.testing.assert_close(total, (outputs * weights[..., None]).sum(1))
    shuffled = [experts._combine(outputs[:, list(p)], weights[:, list(p)]) for p in itertools.permutations(range(4))]
    assert any(not torch.equal(total, other) for other in shuffled)
    assert torch.equal(total, shuffled[0])


def test_a_slot_sees_its_own_past_only() -> None:
    """The mask ends at each slot's own position, and a pass over some slots writes only theirs."""
    cache = SlotCache(num_layers=1, slots=3, key_value_heads=2, length=4, head_dim=2)
    mask = cache.begin(torch.tensor([2, 0]), torch.tensor([1, 3]))
    assert mask.squeeze().tolist() == [[True, True, False, False], [True, True, True, True]]
    new = torch.arange(8.0).view(2, 2, 1, 2) + 1
    keys, values = cache.update(new, -new, 0)
    assert keys.shape == (2, 2, 4, 2)
    assert torch.equal(keys[0, :, 1], new[0, :, 0])
    assert torch.equal(values[1, :, 3], -new[1, :, 0])
    assert keys.count_nonzero() == new.numel()
    cache.begin(None, torch.tensor([3, 0, 1]))
    keys, _ = cache.update(torch.zeros(3, 2, 1, 2), torch.zeros(3, 2, 1, 2), 0)
    assert keys.count_nonzero() == 0


def test_the_attention_looks_no_further_than_the_longest_sequence() -> None:
    """Keys, values and mask end at the block of positions that holds the longest sequence's last token."""
    cache = SlotCache(num_layers=1, slots=2, key_value_heads=1, length=80, head_dim=2)
    new = torch.ones(2, 1, 1, 2)
    for position, seen in ((0, 32), (31, 32), (32, 64), (79, 80)):
        mask = cache.begin(None, torch.tensor([0, position]))
        keys, values = cache.update(new, new, 0)
        assert mask.shape == (2, 1, 1, seen)
        assert keys.shape == values.shape == (2, 1, seen, 2)
