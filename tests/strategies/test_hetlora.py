"""HetLoRA against its definition on dense matrices in numpy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.random_rounds import (
    RANK,
    K,
    a_round,
    an_adapter,
    assert_close,
    cut_values,
    products,
    projections,
)
from tests.same_bits import assert_same_adapter

from fedflame.messages import Adapter, ClientUpdate
from fedflame.strategies import FedAvg, HetLoRA
from fedflame.strategies.base import ClientProfile, ServerState
from fedflame.strategies.hetlora import product_norm


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 5))
def test_the_norm_is_that_of_all_dense_products(seed: int, rank: int) -> None:
    adapter = an_adapter(torch.Generator().manual_seed(seed), rank=rank)
    dense = np.concatenate([value.ravel() for value in products(adapter).values()])
    assert product_norm(adapter) == pytest.approx(np.linalg.norm(dense), rel=1e-9)


def test_the_norm_of_nothing_is_zero() -> None:
    adapter = an_adapter(torch.Generator(), rank=2)
    assert product_norm(adapter.combine(adapter, torch.sub)) == 0.0


@pytest.mark.parametrize("ranks", [(3,), (3, 1), (1, 2, 3), (2, 3, 1, 1)])
def test_values_padded_with_zeros_are_averaged_by_the_norm_of_the_product(ranks: tuple[int, ...]) -> None:
    state, updates = a_round(HetLoRA(K), 5, ranks)
    new = projections(HetLoRA(K).aggregate_train(state, updates).adapter)
    clients = [cut_values(state.adapter, update) for update in updates]
    norms = [np.sqrt(sum(((b @ a) ** 2).sum() for b, a in client.values())) for client in clients]
    for name, (b, a) in new.items():
        pairs, spare = [client[name] for client in clients], [RANK - rank for rank in ranks]
        padded_b = [np.pad(b, ((0, 0), (0, n))) for (b, _), n in zip(pairs, spare, strict=True)]
        padded_a = [np.pad(a, ((0, n), (0, 0))) for (_, a), n in zip(pairs, spare, strict=True)]
        np.testing.assert_allclose(b, np.average(padded_b, axis=0, weights=norms), rtol=0, atol=2e-6)
        np.testing.assert_allclose(a, np.average(padded_a, axis=0, weights=norms), rtol=0, atol=2e-6)


def test_ranks_beyond_those_of_every_client_of_the_round_keep_their_bits() -> None:
    state, updates = a_round(HetLoRA(K), 6, (1, 2))
    new = HetLoRA(K).aggregate_train(state, updates).adapter
    for name, (b, a) in projections(new).items():
        start_b, start_a = projections(state.adapter)[name]
        np.testing.assert_array_equal(b[:, 2:], start_b[:, 2:])
        np.testing.assert_array_equal(a[2:], start_a[2:])
        assert (b[:, :2] != start_b[:, :2]).all()


def test_a_client_whose_product_is_zero_has_no_weight() -> None:
    state, (one, other) = a_round(HetLoRA(K), 7, (3, 3))
    still = Adapter.from_factors({name: (-b, 0 * a) for name, (b, a) in state.adapter.factors().items()})
    silent = replace(other, delta=still)
    new = HetLoRA(K).aggregate_train(state, [one, silent])
    assert_close(products(new.adapter), {n: b @ a for n, (b, a) in cut_values(state.adapter, one).items()})
    assert HetLoRA(K).aggregate_train(state, [silent]) is state


def test_full_ranks_of_equal_norm_and_rows_give_fedavg() -> None:
    """Rank r of one client with its sign turned in A and B has the same product, so the same norm."""
    state, (one,) = a_round(HetLoRA(K), 8, (3,))
    sign = torch.tensor([1.0, -1.0, 1.0])
    mirrored = {
        name: (sign * (b + db) - b, sign[:, None] * (a + da) - a)
        for (name, (b, a)), (db, da) in zip(
            state.adapter.factors().items(), one.delta.factors().values(), strict=True
        )
    }
    twin = replace(one, client=1, delta=Adapter.from_factors(mirrored))
    new = HetLoRA(K).aggregate_train(state, [one, twin]).adapter.tensors()
    for name, value in FedAvg(K).aggregate_train(state, [one, twin]).adapter.tensors().items():
        torch.testing.assert_close(new[name], value, rtol=0, atol=2e-6)


def test_rows_and_counts_do_not_matter() -> None:
    state, updates = a_round(HetLoRA(K), 9, (3, 2))
    others = [replace(u, num_examples=5 + u.client, counts=u.counts.flip(1)) for u in updates]
    one, other = (HetLoRA(K).aggregate_train(state, given) for given in (updates, others))
    assert_same_adapter(one.adapter, other.adapter)


# Rank self-pruning


def with_last_rank(state: ServerState, update: ClientUpdate, factor: float) -> ClientUpdate:
    """The update, but B's last rank is the factor times what the client was given, and A's the same."""
    first = torch.tensor([*[1.0] * (update.delta.rank - 1), 0.0])
    given = state.adapter.with_rank(update.delta.rank).factors()
    deltas = {
        name: (first * db + (1 - first) * (factor - 1) * given[name][0], first.unsqueeze(1) * da)
        for name, (db, da) in update.delta.factors().items()
    }
    return replace(update, delta=Adapter.from_factors(deltas))


def test_a_client_whose_last_ranks_shrank_goes_on_without_them_and_counts_without_them() -> None:
    strategy = HetLoRA(K, rank_decay=0.7, rank_penalty=0.2)
    state, (one, other) = a_round(HetLoRA(K), 10, (3, 3))
    smaller, larger = with_last_rank(state, one, 0.9), with_last_rank(state, other, 1.1)
    new = strategy.aggregate_train(state, [smaller, larger])
    assert new.ranks == {0: 2}
    cut = replace(smaller, delta=smaller.delta.with_rank(2))
    assert_same_adapter(new.adapter, HetLoRA(K).aggregate_train(state, [cut, larger]).adapter)


def test_a_pruned_rank_stays_and_is_the_clients_from_then_on() -> None:
    strategy = HetLoRA(K, rank_decay=0.7, rank_penalty=0.2)
    state, updates = a_round(HetLoRA(K), 11, (3, 3))
    state = replace(state, ranks={0: 2, 5: 1})
    asked = [strategy.configure_train(state, ClientProfile(client, K, 3, 10)) for client in (0, 1, 5)]
    assert [told.adapter.rank for told in asked] == [2, 3, 1]
    assert [(told.kept_rank, told.rank_penalty) for told in asked] == [(1, 0.2), (2, 0.2), (0, 0.0)]
    assert strategy.aggregate_train(state, updates[1:]).ranks.items() >= {0: 2, 5: 1}.items()


def test_without_decay_nothing_is_penalised_or_pruned() -> None:
    state, updates = a_round(HetLoRA(K), 12, (3,))
    told = HetLoRA(K, rank_penalty=0.2).configure_train(state, ClientProfile(0, K, 3, 10))
    assert (told.kept_rank, told.rank_penalty) == (0, 0.0)
    assert HetLoRA(K).aggregate_train(state, [with_last_rank(state, updates[0], 0.9)]).ranks == {}


def test_an_adapter_at_its_start_is_not_pruned() -> None:
    """B is zero before the first round: nothing can be smaller."""
    state, updates = a_round(HetLoRA(K), 13, (3, 2))
    start = {name: (torch.zeros_like(b), a) for name, (b, a) in state.adapter.factors().items()}
    state = replace(state, adapter=Adapter.from_factors(start))
    assert HetLoRA(K, rank_decay=0.9).aggregate_train(state, updates).ranks == {}
