"""FLoRA: the stack is the mean of the products, exactly, and LoRA starts again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.random_rounds import (
    LAYERS,
    RANK,
    K,
    Products,
    an_adapter,
    assert_close,
    half_only,
    mean_products,
    products,
    projections,
    updates_of,
)
from tests.same_bits import assert_same_adapter

from fedflame.messages import NOTHING, Adapter
from fedflame.strategies import FLoRA
from fedflame.strategies.base import ServerState


def a_state(strategy: FLoRA, seed: int = 0) -> ServerState:
    """As a run starts: B is zero."""
    start = half_only(an_adapter(torch.Generator().manual_seed(seed)), "A")
    return strategy.initialize(start, (K,), LAYERS)


@pytest.mark.parametrize("ranks", [(3,), (3, 1), (1, 2, 3), (2, 3, 1, 1)])
def test_the_merged_factors_are_the_sum_over_rounds_of_the_mean_product(ranks: tuple[int, ...]) -> None:
    strategy = FLoRA(K)
    state = a_state(strategy)
    wanted: Products = {}
    for number in (1, 2):
        updates = updates_of(number, ranks)
        mean = mean_products(state.adapter, updates)
        wanted = {name: wanted.get(name, 0.0) + value for name, value in mean.items()}
        state = strategy.aggregate_train(state, updates)
        assert state.merged.rank == number * sum(ranks)
        assert_close(products(state.merged), wanted)


def test_after_a_round_b_is_zero_and_a_is_drawn_anew_from_the_seed() -> None:
    draws: dict[tuple[int, int], Adapter] = {}
    for seed in (0, 1):
        strategy = FLoRA(K, seed=seed)
        state = a_state(strategy)
        for number in (1, 2):
            state = strategy.aggregate_train(state, updates_of(number, (3, 1)))
            draws[seed, number] = state.adapter
            for b, a in projections(state.adapter).values():
                bound = a.shape[1] ** -0.5
                assert a.shape[0] == RANK
                assert not b.any() and np.abs(a).max() <= bound
    all_of = [torch.cat([value.flatten() for value in draw.tensors().values()]) for draw in draws.values()]
    for index, one in enumerate(all_of):
        assert (one != 0).double().mean() > 0.3
        assert all(not torch.equal(one, other) for other in all_of[:index])
    again = FLoRA(K, seed=1).aggregate_train(a_state(FLoRA(K, seed=1)), updates_of(1, (3, 1)))
    assert_same_adapter(again.adapter, draws[1, 1])


def test_draws_fill_their_range_and_differ_from_expert_to_expert_and_module_to_module() -> None:
    wide = an_adapter(torch.Generator(), rank=64)
    state = FLoRA(K).initialize(half_only(wide, "A"), (K,), LAYERS)
    new = FLoRA(K).aggregate_train(state, updates_of(0, (1,)))
    rows = [a for _, a in projections(new.adapter).values()]
    for a in rows:
        assert np.abs(a).max() > 0.9 * a.shape[1] ** -0.5
        assert abs(a.mean()) < 0.2 * a.shape[1] ** -0.5
    assert len({row[0, :4].tobytes() for row in rows}) == len(rows)


def test_an_adapter_that_is_something_already_becomes_part_of_the_base_in_full() -> None:
    start = an_adapter(torch.Generator().manual_seed(3))
    state = FLoRA(K).initialize(start, (K,), LAYERS)
    assert_close(products(state.merged), products(start))
    assert not any(b.any() for b, _ in projections(state.adapter).values())
    assert a_state(FLoRA(K)).merged is NOTHING
