"""FLAME's aggregation against a plain float64 computation, and its limits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.random_rounds import EXPERTS, LAYERS, RANK, K, an_adapter, an_update, filled
from tests.same_bits import bits

from fedflame.config.words import CountNormalization
from fedflame.messages import ClientUpdate
from fedflame.server.validation import believed
from fedflame.strategies import FedAvg, Flame
from fedflame.strategies.base import ClientProfile, ServerState
from fedflame.strategies.flame import expert_weights

TEMPERATURES = (0.0, 1.0, 2.0, 4.0)
seeds = st.integers(0, 2**32)


def a_round(seed: int, clients: int) -> tuple[ServerState, list[ClientUpdate]]:
    generator = torch.Generator().manual_seed(seed)
    tiers = (8, 4, 2, 1)
    state = Flame(K).initialize(an_adapter(generator), tiers, LAYERS)
    return state, [an_update(generator, client, tiers[client % 4]) for client in range(clients)]


def gamma_float64(updates: list[ClientUpdate], layer: int, expert: int, temperature: float) -> list[float]:
    """f^t |D| with f = c / T, in Python's floats."""
    return [
        (int(update.counts[layer, expert]) / update.tokens) ** temperature * update.num_examples
        for update in updates
    ]


# Activation-aware aggregation


@pytest.mark.parametrize("temperature", TEMPERATURES)
@settings(max_examples=25, deadline=None)
@given(seed=seeds, clients=st.integers(1, 5))
def test_experts_are_the_gamma_weighted_mean_computed_in_float64(
    temperature: float, seed: int, clients: int
) -> None:
    state, updates = a_round(seed, clients)
    new = Flame(K, temperature).aggregate_train(state, updates)
    for name, value in state.adapter.experts.items():
        layer = int(name[0])
        for expert in range(EXPERTS):
            weights = np.array(gamma_float64(updates, layer, expert, temperature))
            deltas = np.stack([update.delta.experts[name][expert].double().numpy() for update in updates])
            start = value[expert].double().numpy()
            got = new.adapter.experts[name][expert].double().numpy()
            total = weights.sum()
            mean = np.tensordot(weights, deltas, 1) / total if total > 0 else np.zeros_like(start)
            scale = np.tensordot(weights, np.abs(deltas), 1) / total if total > 0 else np.zeros_like(start)
            assert (np.abs(got - (start + mean)) <= 1e-6 * (scale + np.abs(start))).all(), (name, expert)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@settings(max_examples=25, deadline=None)
@given(seed=seeds, clients=st.integers(1, 5))
def test_attention_is_the_mean_weighted_by_rows_whatever_the_counts(
    temperature: float, seed: int, clients: int
) -> None:
    state, updates = a_round(seed, clients)
    new = Flame(K, temperature).aggregate_train(state, updates)
    rows = np.array([update.num_examples for update in updates], dtype=np.float64)
    for name, value in state.adapter.attention.items():
        deltas = np.stack([update.delta.attention[name].double().numpy() for update in updates])
        start, got = value.double().numpy(), new.adapter.attention[name].double().numpy()
        error = np.abs(got - (start + np.tensordot(rows, deltas, 1) / rows.sum()))
        scale = np.tensordot(rows, np.abs(deltas), 1) / rows.sum()
        assert (error <= 1e-6 * (scale + np.abs(start))).all(), name


@pytest.mark.parametrize("temperature", TEMPERATURES)
@settings(max_examples=25, deadline=None)
@given(seed=seeds, clients=st.integers(1, 5))
def test_per_slot_the_frequency_is_divided_by_the_clients_k(
    temperature: float, seed: int, clients: int
) -> None:
    state, updates = a_round(seed, clients)
    new = Flame(K, temperature, count_normalization="slot").aggregate_train(state, updates)
    for name, value in state.adapter.experts.items():
        for expert in range(EXPERTS):
            slots = [update.tokens * update.active_experts for update in updates]
            counts = [int(update.counts[int(name[0]), expert]) for update in updates]
            rows = [update.num_examples for update in updates]
            weights = [(c / n) ** temperature * d for c, n, d in zip(counts, slots, rows, strict=True)]
            if sum(weights) > 0:
                deltas = [update.delta.experts[name][expert].double().numpy() for update in updates]
                wanted = value[expert].double().numpy() + np.average(deltas, axis=0, weights=weights)
                np.testing.assert_allclose(new.adapter.experts[name][expert], wanted, rtol=0, atol=2e-6)


def test_a_client_that_spreads_its_tokens_evenly_weighs_as_much_per_slot_whatever_its_k() -> None:
    """Of 5 experts each sees 4/5 of the tokens at k = 4 and a fifth at k = 1: per slot that is the same."""
    wide, narrow = zero_update(0, active_experts=4), zero_update(1, active_experts=1)
    wide.counts[:], narrow.counts[:] = 80, 40
    wide, narrow = replace(wide, tokens=100), replace(narrow, tokens=200)
    ratios = {
        normalization: expert_weights(wide, 10, 1.0, normalization)
        / expert_weights(narrow, 10, 1.0, normalization)
        for normalization in ("token", "slot")
    }
    torch.testing.assert_close(ratios["token"], torch.full((LAYERS, EXPERTS), 4.0))
    torch.testing.assert_close(ratios["slot"], torch.ones(LAYERS, EXPERTS))


@pytest.mark.parametrize("normalization", ["token", "slot"])
def test_a_client_that_lies_about_its_counts_weighs_as_eight_times_the_even_share_at_most(
    normalization: CountNormalization,
) -> None:
    """One of 64 experts for all tokens at k = 1: beside three others 8 parts of 11, and not 64 of 67."""
    honest = replace(zero_update(0), counts=torch.full((1, 64), 10), tokens=640, active_experts=1)
    liar = replace(honest, counts=torch.zeros(1, 64, dtype=torch.int64))
    liar.counts[0, 5] = 640
    one, other, lie = (
        float(expert_weights(update, 3, 1.0, normalization)[0, 5])
        for update in (believed(honest, 100), believed(liar, 100), liar)
    )
    assert other / (3 * one + other) == pytest.approx(8 / 11)
    assert lie / (3 * one + lie) == pytest.approx(64 / 67)


def test_two_clients_by_hand() -> None:
    """f = 1/2 and 1/4 with |D| = 10 and 80: gamma at t = 2 is 2.5 and 5, so a third and two thirds."""
    state = Flame(K).initialize(filled(0.0), (2,), LAYERS)
    one = replace(zero_update(0), delta=filled(1.0), tokens=8, num_examples=10)
    other = replace(zero_update(1), delta=filled(4.0), tokens=16, num_examples=80)
    one.counts[:], other.counts[:] = 4, 4
    new = Flame(K, temperature=2.0).aggregate_train(state, [one, other])
    for value in new.adapter.experts.values():
        torch.testing.assert_close(value, torch.full_like(value, 3.0), rtol=1e-6, atol=0)
    for value in new.adapter.attention.values():
        torch.testing.assert_close(value, torch.full_like(value, (10 + 320) / 90), rtol=1e-6, atol=0)


@given(seeds, st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_temperature_zero_is_fedavg_to_the_last_bit(seed: int, clients: int) -> None:
    state, updates = a_round(seed, clients)
    flame = Flame(K, temperature=0.0).aggregate_train(state, updates).adapter.tensors()
    fedavg = FedAvg(2).aggregate_train(state, updates).adapter.tensors()
    assert flame.keys() == fedavg.keys()
    assert all(torch.equal(bits(flame[name]), bits(value)) for name, value in fedavg.items())


@given(seeds, st.integers(1, 5), st.sampled_from(TEMPERATURES))
@settings(max_examples=25, deadline=None)
def test_equal_counts_on_all_clients_give_fedavg_to_rounding(
    seed: int, clients: int, temperature: float
) -> None:
    state, updates = a_round(seed, clients)
    counts, tokens = updates[0].counts + 1, updates[0].tokens + 1
    alike = [replace(update, counts=counts, tokens=tokens) for update in updates]
    flame = Flame(K, temperature).aggregate_train(state, alike).adapter.tensors()
    fedavg = FedAvg(2).aggregate_train(state, alike).adapter.tensors()
    for name, value in fedavg.items():
        torch.testing.assert_close(flame[name], value, rtol=1e-6, atol=1e-6)


@given(seeds, st.integers(1, 5), st.sampled_from(TEMPERATURES))
@settings(max_examples=25, deadline=None)
def test_equal_deltas_in_give_the_same_delta_out(seed: int, clients: int, temperature: float) -> None:
    state, updates = a_round(seed, clients)
    delta = updates[0].delta
    alike = [
        replace(update, delta=delta, counts=update.counts + 1, tokens=update.tokens + 1) for update in updates
    ]
    new = Flame(K, temperature).aggregate_train(state, alike).adapter
    for name, wanted in state.adapter.combine(delta, torch.add).tensors().items():
        torch.testing.assert_close(new.tensors()[name], wanted, rtol=1e-6, atol=1e-7)


@given(seeds, st.integers(1, 4), st.sampled_from((1.0, 2.0, 4.0)))
@settings(max_examples=25, deadline=None)
def test_a_delta_of_a_client_that_did_not_activate_the_expert_has_no_weight(
    seed: int, clients: int, temperature: float
) -> None:
    state, updates = a_round(seed, clients + 1)
    silent = replace(updates[0], counts=torch.zeros_like(updates[0].counts))
    with_silent = Flame(K, temperature).aggregate_train(state, [silent, *updates[1:]]).adapter.experts
    without = Flame(K, temperature).aggregate_train(state, updates[1:]).adapter.experts
    assert all(torch.equal(bits(with_silent[name]), bits(value)) for name, value in without.items())


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_an_expert_that_nobody_activated_keeps_its_bits(temperature: float) -> None:
    """Also -0.0 and a denormal, which a sum with zero would change or could flush."""
    state, updates = a_round(3, 4)
    for name, value in state.adapter.experts.items():
        value[3].view(-1)[:3] = torch.tensor([-0.0, 0.0, 1e-45])
        for update in updates:
            update.delta.experts[name][3] = 0.0  # a count of zero means a delta of zero
    for update in updates:
        update.counts[:, 3] = 0
    new = Flame(K, temperature).aggregate_train(state, updates)
    for name, value in state.adapter.experts.items():
        assert bits(value[3]).view(-1)[:3].tolist() == [-(2**31), 0, 1]
        assert torch.equal(bits(new.adapter.experts[name][3]), bits(value[3])), name
        assert not torch.equal(new.adapter.experts[name][2], value[2]), name


def test_a_value_whose_mean_delta_is_zero_keeps_its_bits_on_an_activated_expert() -> None:
    state = Flame(K).initialize(filled(-0.0), (2,), LAYERS)
    update = zero_update(0)
    update.counts[:] = 1
    new = Flame(K).aggregate_train(state, [update])
    assert all((bits(value) == -(2**31)).all() for value in new.adapter.tensors().values())


# Rescalers


def test_each_tiers_rescaler_is_the_mean_of_its_clients_weighted_by_rows() -> None:
    state = Flame(K).initialize(filled(0.0), (4, 2, 1), LAYERS)
    state = replace(state, rescalers={**state.rescalers, 1: torch.tensor([1.5, 0.7])})
    updates = [
        replace(zero_update(0, 2), rescaler_values=torch.tensor([1.0, 2.0]), num_examples=30),
        replace(zero_update(1, 4), rescaler_values=torch.tensor([1.25, 1.75]), num_examples=1),
        replace(zero_update(2, 2), rescaler_values=torch.tensor([2.0, 4.0]), num_examples=10),
    ]
    rescalers = Flame(K).aggregate_train(state, updates).rescalers
    assert rescalers.keys() == {4, 2, 1}
    torch.testing.assert_close(rescalers[2], torch.tensor([1.25, 2.5]), rtol=1e-6, atol=0)
    assert rescalers[4].tolist() == [1.25, 1.75]
    assert torch.equal(rescalers[1], torch.tensor([1.5, 0.7])), "no client of tier 1 took part"


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=6))
@settings(max_examples=50, deadline=None)
def test_a_rescaler_of_one_stays_exactly_one(rows: list[int]) -> None:
    state = Flame(K).initialize(filled(0.0), (K,), LAYERS)
    updates = [replace(zero_update(client, K), num_examples=count) for client, count in enumerate(rows)]
    assert Flame(K).aggregate_train(state, updates).rescalers[K].tolist() == [1.0] * LAYERS


@given(st.sampled_from((3, 5, 6, 7)), st.lists(st.integers(1, 1000), min_size=2, max_size=6))
@settings(max_examples=50, deadline=None)
def test_a_static_rescaler_stays_k_over_k_i_to_the_last_bit(k: int, rows: list[int]) -> None:
    strategy = Flame(K, rescaler="static")
    state = strategy.initialize(filled(0.0), (k,), LAYERS)
    updates = [
        replace(zero_update(client, k), rescaler_values=state.rescalers[k], num_examples=count)
        for client, count in enumerate(rows)
    ]
    assert torch.equal(strategy.aggregate_train(state, updates).rescalers[k], torch.full((LAYERS,), K / k))


@pytest.mark.parametrize(
    ("rescaler", "start"), [("learned", 1.0), ("none", 1.0), ("mass", 1.0), ("static", K / 2)]
)
def test_rescalers_start_at_one_or_for_static_at_k_over_k_i(rescaler: str, start: float) -> None:
    state = Flame(K, rescaler=rescaler).initialize(filled(0.0), (K, 2), LAYERS)  # type: ignore[arg-type]
    assert {k: value.tolist() for k, value in state.rescalers.items()} == {K: [1.0] * 2, 2: [start] * 2}


@pytest.mark.parametrize(
    ("rescaler", "mode"), [("learned", "learned"), ("none", "fixed"), ("mass", "mass"), ("static", "fixed")]
)
def test_a_client_gets_its_tiers_rescaler_the_global_adapter_and_its_own_k(rescaler: str, mode: str) -> None:
    strategy = Flame(K, rescaler=rescaler)  # type: ignore[arg-type]
    state = strategy.initialize(filled(0.5), (K, 2), LAYERS)
    told = strategy.configure_train(state, ClientProfile(4, 2, rank=1, num_examples=10))
    assert (told.active_experts, told.rescaler) == (2, mode)
    assert told.adapter is state.adapter
    assert told.rescaler_values is state.rescalers[2]


@pytest.mark.parametrize("rescaler", ["learned", "none", "mass", "static"])
def test_at_the_models_own_k_the_rescaler_is_one_and_fixed(rescaler: str) -> None:
    strategy = Flame(K, rescaler=rescaler)  # type: ignore[arg-type]
    state = strategy.initialize(filled(0.5), (K, 2), LAYERS)
    told = strategy.configure_train(state, ClientProfile(4, K, rank=RANK, num_examples=10))
    assert (told.rescaler, told.rescaler_values.tolist()) == ("fixed", [1.0, 1.0])


def zero_update(client: int, active_experts: int = 2) -> ClientUpdate:
    """An update that changes nothing: zero deltas, s = 1, no counts."""
    return ClientUpdate(
        round=1,
        client=client,
        active_experts=active_experts,
        delta=filled(0.0),
        rescaler_values=torch.ones(LAYERS),
        counts=torch.zeros(LAYERS, EXPERTS, dtype=torch.int64),
        tokens=8,
        num_examples=10,
        trained_examples=4,
        steps=1,
        loss=1.0,
    )
