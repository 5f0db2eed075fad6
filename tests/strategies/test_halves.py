"""FFA-LoRA and RoLoRA: one half moves, so that the product of the means is the mean of the products."""

from __future__ import annotations

import pytest
import torch
from tests.random_rounds import LAYERS, K, an_adapter, assert_close, mean_products, products, updates_of
from tests.same_bits import assert_same_adapter

from fedflame.messages import is_trained
from fedflame.strategies import FedAvg, FFALoRA, RoLoRA

TURNS = {"FFA": (FFALoRA(K), "BBBB"), "RoLoRA": (RoLoRA(K), "BABA")}


@pytest.mark.parametrize("method", TURNS)
def test_rounds_are_exact_and_move_the_half_whose_turn_it_is(method: str) -> None:
    strategy, turns = TURNS[method]
    state = strategy.initialize(an_adapter(torch.Generator().manual_seed(1)), (K,), LAYERS)
    for number, half in enumerate(turns):
        assert state.trainable == half
        updates = updates_of(number, (3, 3, 3), state.trainable)
        new = strategy.aggregate_train(state, updates)
        assert_close(products(new.adapter), mean_products(state.adapter, updates))
        for name, value in new.adapter.tensors().items():
            assert torch.equal(value, state.adapter.tensors()[name]) != is_trained(name, state.trainable)
        assert_same_adapter(new.adapter, FedAvg(K).aggregate_train(state, updates).adapter)
        state = new


def test_a_round_without_updates_leaves_the_turn() -> None:
    state = RoLoRA(K).initialize(an_adapter(torch.Generator()), (K,), LAYERS)
    assert RoLoRA(K).aggregate_train(state, []).trainable == "B"
