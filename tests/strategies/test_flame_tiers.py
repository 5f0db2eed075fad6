"""FLAME with an adapter for every tier: against a plain float64 computation, and its two limits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.random_rounds import EXPERTS, LAYERS, RANK, K, an_adapter, an_update, filled
from tests.same_bits import assert_same_adapter

from fedflame.messages import Adapter, ClientUpdate
from fedflame.strategies import Flame
from fedflame.strategies.base import ClientProfile, ServerState

TIERS = (8, 4, 1)
DOUBLINGS = {
    (8, 8): 0,
    (8, 4): 1,
    (8, 1): 3,
    (4, 8): 1,
    (4, 4): 0,
    (4, 1): 2,
    (1, 8): 3,
    (1, 4): 2,
    (1, 1): 0,
}
seeds = st.integers(0, 2**32)


def tiers_of(state: ServerState) -> dict[int, Adapter]:
    return {k: state.adapter_at(k) for k in TIERS}


def a_round(seed: int, affinity: float, clients: int) -> tuple[ServerState, list[ClientUpdate]]:
    """A state whose tiers differ, and updates of clients that trained with k = 8, 4, 1 in turn."""
    generator = torch.Generator().manual_seed(seed)
    state = Flame(K, tier_affinity=affinity).initialize(an_adapter(generator), TIERS, LAYERS)
    state = replace(state, tier_adapters={k: an_adapter(generator) for k in state.tier_adapters})
    return state, [an_update(generator, client, TIERS[client % 3]) for client in range(clients)]


@pytest.mark.parametrize("affinity", [0.0, 0.25, 0.6])
@settings(max_examples=20, deadline=None)
@given(seed=seeds, clients=st.integers(1, 5))
def test_every_tiers_adapter_moves_by_its_own_mean_computed_in_float64(
    affinity: float, seed: int, clients: int
) -> None:
    state, updates = a_round(seed, affinity, clients)
    strategy = Flame(K, temperature=2.0, count_normalization="slot", tier_affinity=affinity)
    after = tiers_of(strategy.aggregate_train(state, updates))
    for k, before in tiers_of(state).items():
        nearness = [affinity ** DOUBLINGS[k, update.active_experts] for update in updates]
        for name, value in before.experts.items():
            for expert in range(EXPERTS):
                frequency = [
                    int(u.counts[int(name[0]), expert]) / (u.tokens * u.active_experts) for u in updates
                ]
                weights = [
                    near * f**2 * u.num_examples
                    for near, f, u in zip(nearness, frequency, updates, strict=True)
                ]
                deltas = [update.delta.experts[name][expert].double().numpy() for update in updates]
                moved = np.average(deltas, axis=0, weights=weights) if sum(weights) > 0 else 0.0
                wanted = value[expert].double().numpy() + moved
                np.testing.assert_allclose(after[k].experts[name][expert], wanted, rtol=0, atol=2e-6)
        rows = [near * u.num_examples for near, u in zip(nearness, updates, strict=True)]
        for name, value in before.attention.items():
            deltas = [update.delta.attention[name].double().numpy() for update in updates]
            moved = np.average(deltas, axis=0, weights=rows) if sum(rows) > 0 else 0.0
            np.testing.assert_allclose(
                after[k].attention[name], value.double().numpy() + moved, rtol=0, atol=2e-6
            )


def test_two_clients_by_hand() -> None:
    """Equal counts per slot and rows, k = 4 and 1, beta = 1/2: two doublings apart, so 4 to 1."""
    strategy = Flame(K, count_normalization="slot", tier_affinity=0.5)
    state = strategy.initialize(filled(0.0), (4, 1), LAYERS)
    generator = torch.Generator().manual_seed(0)
    wide, narrow = an_update(generator, 0, 4), an_update(generator, 1, 1)
    wide = replace(wide, delta=filled(10.0), tokens=100, num_examples=7)
    narrow = replace(narrow, delta=filled(20.0), tokens=100, num_examples=7)
    wide.counts[:], narrow.counts[:] = 80, 20
    new = strategy.aggregate_train(state, [wide, narrow])
    for k, wanted in ((4, 12.0), (1, 18.0)):
        for value in new.adapter_at(k).tensors().values():
            torch.testing.assert_close(value, torch.full_like(value, wanted), rtol=1e-6, atol=0)


@given(seed=seeds, clients=st.integers(1, 5))
@settings(max_examples=15, deadline=None)
def test_affinity_zero_is_a_federation_for_each_tier(seed: int, clients: int) -> None:
    state, updates = a_round(seed, 0.0, clients)
    new = Flame(K, tier_affinity=0.0).aggregate_train(state, updates)
    for k in TIERS:
        alone = ServerState(state.adapter_at(k), {k: state.rescalers[k]})
        of_tier = [update for update in updates if update.active_experts == k]
        wanted = Flame(K).aggregate_train(alone, of_tier)
        assert_same_adapter(new.adapter_at(k), wanted.adapter)
        assert torch.equal(new.rescalers[k], wanted.rescalers[k])


def test_affinity_one_keeps_one_adapter_and_any_other_one_for_each_smaller_tier() -> None:
    adapter = an_adapter(torch.Generator().manual_seed(0))
    assert Flame(K).initialize(adapter, TIERS, LAYERS).tier_adapters == {}
    state = Flame(K, tier_affinity=0.5).initialize(adapter, TIERS, LAYERS)
    assert list(state.tier_adapters) == [4, 1]
    for k in TIERS:
        assert_same_adapter(state.adapter_at(k), adapter)
    assert state.adapter_at(2) is state.adapter, "a k that nobody has"


def test_without_updates_the_state_is_the_same() -> None:
    state, _ = a_round(0, 0.5, 0)
    assert Flame(K, tier_affinity=0.5).aggregate_train(state, []) is state


def test_a_client_is_given_the_adapter_of_the_k_that_it_trains_with() -> None:
    state, _ = a_round(0, 0.5, 0)
    strategy = Flame(K, tier_affinity=0.5)
    for k in TIERS:
        told = strategy.configure_train(state, ClientProfile(5, k, RANK, 10))
        assert told.active_experts == k
        assert told.adapter is state.adapter_at(k)


def test_the_learning_rate_grows_with_a_power_of_the_experts_that_are_left_out() -> None:
    state, _ = a_round(0, 0.5, 0)
    factors = {
        exponent: [
            Flame(K, learning_rate_exponent=exponent)
            .configure_train(state, ClientProfile(0, k, RANK, 10))
            .learning_rate_factor
            for k in (8, 4, 1)
        ]
        for exponent in (0.0, 0.5, 1.0)
    }
    assert factors == {0.0: [1, 1, 1], 0.5: [1, 2**0.5, 8**0.5], 1.0: [1, 2, 8]}
