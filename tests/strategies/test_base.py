"""The weighted mean that the methods share, against numpy; order, deltas and rescalers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedflame.messages import Adapter, ClientUpdate
from fedflame.strategies.base import ServerState, WeightedMean, apply_delta, in_client_order, mean_rescalers

EXPERTS, ROWS, COLUMNS = 5, 3, 4
weight = st.floats(0.0009765625, 1000, width=32)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), st.lists(weight, min_size=1, max_size=8))
def test_mean_with_a_number_as_weight_is_numpys_average(seed: int, weights: list[float]) -> None:
    values = torch.randn(len(weights), ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed))
    means = WeightedMean()
    for value, w in zip(values, weights, strict=True):
        means.add("x", value, w)
    wanted = np.average(values.double().numpy(), axis=0, weights=np.array(weights))
    np.testing.assert_allclose(means.mean("x").numpy(), wanted, rtol=0, atol=1e-6 * float(values.abs().max()))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 8))
def test_mean_with_a_weight_per_expert_is_numpys_average_of_each_expert(seed: int, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, EXPERTS, ROWS, COLUMNS, generator=generator)
    weights = torch.rand(count, EXPERTS, generator=generator) + 0.01
    means = WeightedMean()
    for value, w in zip(values, weights, strict=True):
        means.add("x", value, w)
    for expert in range(EXPERTS):
        wanted = np.average(
            values[:, expert].double().numpy(), axis=0, weights=weights[:, expert].double().numpy()
        )
        np.testing.assert_allclose(means.mean("x")[expert].numpy(), wanted, rtol=0, atol=1e-5)


def test_names_are_averaged_apart_and_keep_their_order() -> None:
    means = WeightedMean()
    means.add("b", torch.tensor([1.0]), 1)
    means.add("a", torch.tensor([[5.0, 7.0]]), 2)
    means.add("b", torch.tensor([4.0]), 2)
    assert means.names() == ["b", "a"]
    assert means.mean("b").tolist() == [3.0]
    assert means.mean("a").tolist() == [[5.0, 7.0]]


def test_where_the_weights_sum_to_zero_the_mean_is_zero() -> None:
    means = WeightedMean()
    means.add("x", torch.tensor([[3.0, -2.0], [5.0, 6.0]]), torch.tensor([0.0, 2.0]))
    assert means.mean("x").tolist() == [[0.0, 0.0], [5.0, 6.0]]


def test_sums_are_fp32_for_bfloat16_values() -> None:
    """In bfloat16 a sum of ones would stick at 256."""
    means = WeightedMean()
    for _ in range(257):
        means.add("x", torch.ones(2, dtype=torch.bfloat16), 1.0)
    assert means.mean("x").dtype == torch.float32
    assert means.mean("x").tolist() == [1.0, 1.0]


def test_a_delta_of_zero_leaves_the_bits_and_any_other_is_added() -> None:
    value = torch.tensor([-0.0, 0.0, 1e-45, 1.0, 2.0])
    result = apply_delta(value, torch.tensor([0.0, -0.0, 0.0, 0.5, -2.0]))
    assert torch.equal(result[:3].view(torch.int32), value[:3].view(torch.int32))
    assert result[3:].tolist() == [1.5, 0.0]


def test_a_stream_in_rising_order_passes_lazily() -> None:
    asked: list[int] = []

    def stream() -> Iterator[ClientUpdate]:
        for client in (0, 3, 4):
            asked.append(client)
            yield an_update(client)

    passed = in_client_order(stream())
    assert next(passed).client == 0
    assert asked == [0]
    assert [update.client for update in passed] == [3, 4]


def test_a_stream_that_falls_back_or_repeats_a_client_is_refused() -> None:
    for second in (2, 3):
        passed = in_client_order(an_update(client) for client in (3, second))
        next(passed)
        with pytest.raises(ValueError, match=f"rising client order: {second} after 3"):
            next(passed)


def test_rescalers_of_tiers_with_a_mean_are_replaced_and_others_kept() -> None:
    state = ServerState(Adapter({}, {}), {8: torch.ones(2), 1: torch.tensor([1.5, 2.5])})
    means = WeightedMean()
    means.add("8", torch.tensor([2.0, 3.0]), 4)
    new = mean_rescalers(state, means)
    assert {k: value.tolist() for k, value in new.rescalers.items()} == {8: [2.0, 3.0], 1: [1.5, 2.5]}
    assert state.rescalers[8].tolist() == [1.0, 1.0]
    assert new.adapter is state.adapter


def an_update(client: int) -> ClientUpdate:
    counts = torch.zeros(2, EXPERTS, dtype=torch.int64)
    return ClientUpdate(1, client, 1, Adapter({}, {}), torch.ones(2), counts, 1, 1, 1, 1, 1.0)
