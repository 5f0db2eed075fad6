"""FedEx-LoRA: averages of A and B, and a residue that makes up for what they miss."""

from __future__ import annotations

import pytest
import torch
from tests.random_rounds import (
    LAYERS,
    RANK,
    K,
    Products,
    an_adapter,
    assert_close,
    mean_products,
    products,
    updates_of,
)
from tests.same_bits import assert_same_adapter

from fedflame.strategies import FedAvg, FedExLoRA


@pytest.mark.parametrize("clients", [1, 2, 5])
def test_means_and_residue_together_are_the_mean_of_the_products(clients: int) -> None:
    state = FedExLoRA(K).initialize(an_adapter(torch.Generator().manual_seed(1)), (K,), LAYERS)
    merged: Products = {}
    for number in (1, 2):
        updates = updates_of(number, (RANK,) * clients)
        new = FedExLoRA(K).aggregate_train(state, updates)
        assert_same_adapter(new.adapter, FedAvg(K).aggregate_train(state, updates).adapter)
        dense, averaged = mean_products(state.adapter, updates), products(new.adapter)
        residue = {name: value - averaged[name] for name, value in dense.items()}
        merged = {name: merged.get(name, 0.0) + value for name, value in residue.items()}
        assert_close(products(new.merged), merged)
        assert new.merged.rank == number * clients * RANK
        assert max(abs(value).max() for value in residue.values()) > 0.01 or clients == 1
        state = new


def test_the_residue_of_what_nobody_moved_is_exactly_zero() -> None:
    """Expert 3 has no delta: large values of A and B leave no rounding in the base."""
    start = an_adapter(torch.Generator().manual_seed(2), scale=1000.0)
    state, updates = FedExLoRA(K).initialize(start, (K,), LAYERS), updates_of(3, (RANK, RANK))
    for update in updates:
        for delta in update.delta.experts.values():
            delta[3] = 0.0
    new = products(FedExLoRA(K).aggregate_train(state, updates).merged)
    assert all(not value.any() for name, value in new.items() if ".3." in name)
    assert all(value.any() for name, value in new.items() if ".3." not in name)


def test_at_a_smaller_rank_the_ranks_that_nobody_trains_stay_out_of_the_residue() -> None:
    strategy = FedExLoRA(K, rank=2)
    state = strategy.initialize(an_adapter(torch.Generator().manual_seed(4)), (K,), LAYERS)
    updates = updates_of(5, (2, 2))
    new = strategy.aggregate_train(state, updates)
    assert new.merged.rank == 4
    tail = state.adapter.combine(state.adapter.with_rank(2).with_rank(RANK), torch.sub)
    wanted = {
        name: value + products(tail)[name] for name, value in mean_products(state.adapter, updates).items()
    }
    got = {name: value + products(new.merged)[name] for name, value in products(new.adapter).items()}
    assert_close(got, wanted)
