"""FedAvg by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from tests.random_rounds import LAYERS, projections, updates_of
from tests.random_rounds import an_adapter as random_adapter
from tests.same_bits import assert_same_adapter

from fedflame.messages import Adapter, ClientUpdate
from fedflame.strategies import FedAvg
from fedflame.strategies.base import ClientProfile


def an_adapter(bank: float, attention: float) -> Adapter:
    """Two experts, rank 1, hidden 3, width 5: the second expert at ten times the first, and one pair."""
    values = torch.tensor([1.0, 10.0])[:, None, None] * bank
    shapes = {"0.A1": (2, 3), "0.B1": (10, 1), "0.A2": (1, 5), "0.B2": (3, 1)}
    banks = {name: values.expand(2, *shape).contiguous() for name, shape in shapes.items()}
    pair = {"q_proj.A": torch.full((1, 2), attention), "q_proj.B": torch.full((4, 1), attention)}
    return Adapter(banks, pair)


def an_update(client: int, delta: Adapter, num_examples: int) -> ClientUpdate:
    return ClientUpdate(
        round=1,
        client=client,
        active_experts=1,
        delta=delta,
        rescaler_values=torch.full((1,), 9.0),
        counts=torch.tensor([[5 * client, 1]]),
        tokens=7,
        num_examples=num_examples,
        trained_examples=num_examples,
        steps=2,
        loss=1.0,
    )


def test_every_value_is_the_mean_weighted_by_rows_by_hand() -> None:
    """Weights 1/4 and 3/4: the bank's first expert goes from 2 to 2 + (1 + 3 * 5) / 4 = 6."""
    state = FedAvg(1).initialize(an_adapter(2.0, 1.0), (1,), num_layers=1)
    updates = [an_update(0, an_adapter(1.0, 8.0), 10), an_update(1, an_adapter(5.0, 4.0), 30)]
    new = FedAvg(1).aggregate_train(state, iter(updates)).adapter
    assert torch.equal(new.experts["0.A1"], torch.tensor([6.0, 60.0])[:, None, None].expand(2, 2, 3))
    assert torch.equal(new.attention["q_proj.B"], torch.full((4, 1), 1.0 + (8 + 3 * 4) / 4))


def test_or_by_the_rows_trained_on_by_hand() -> None:
    """Weights 2/3 and 1/3: the bank's first expert goes from 2 to 2 + (2 * 1 + 5) / 3 = 13/3."""
    state = FedAvg(1).initialize(an_adapter(2.0, 1.0), (1,), num_layers=1)
    first, second = an_update(0, an_adapter(1.0, 8.0), 10), an_update(1, an_adapter(5.0, 4.0), 30)
    updates = [replace(first, trained_examples=8), replace(second, trained_examples=4)]
    new = FedAvg(1, counted_rows="trained").aggregate_train(state, iter(updates)).adapter
    torch.testing.assert_close(new.experts["0.A1"][0], torch.full((2, 3), 13 / 3))
    torch.testing.assert_close(new.attention["q_proj.B"], torch.full((4, 1), 1.0 + (2 * 8 + 4) / 3))


def test_counts_and_frequencies_do_not_matter() -> None:
    state = FedAvg(1).initialize(an_adapter(2.0, 1.0), (1,), num_layers=1)
    updates = [an_update(0, an_adapter(1.0, 8.0), 10), an_update(1, an_adapter(5.0, 4.0), 30)]
    others = [replace(update, counts=update.counts.flip(1), tokens=1000) for update in updates]
    one = FedAvg(1).aggregate_train(state, updates).adapter.tensors()
    other = FedAvg(1).aggregate_train(state, others).adapter.tensors()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_rescalers_stay_one_for_every_tier() -> None:
    state = FedAvg(3).initialize(an_adapter(2.0, 1.0), (4, 2), num_layers=2)
    new = FedAvg(3).aggregate_train(state, [an_update(0, an_adapter(1.0, 1.0), 10)])
    assert {k: value.tolist() for k, value in new.rescalers.items()} == {k: [1.0, 1.0] for k in (4, 2, 3)}


def test_a_round_without_updates_changes_nothing() -> None:
    state = FedAvg(1).initialize(an_adapter(2.0, 1.0), (1,), num_layers=1)
    assert FedAvg(1).aggregate_train(state, iter([])) is state


def test_every_client_runs_the_same_k_with_a_fixed_rescaler_of_one() -> None:
    strategy = FedAvg(3)
    state = strategy.initialize(an_adapter(2.0, 1.0), (8, 3), num_layers=2)
    for k in (8, 3):
        told = strategy.configure_train(state, ClientProfile(0, k, rank=1, num_examples=10))
        assert (told.active_experts, told.rescaler) == (3, "fixed")
        assert told.rescaler_values.tolist() == [1.0, 1.0]
        assert told.adapter is state.adapter


def test_at_a_smaller_rank_clients_train_the_first_ranks_and_the_others_stay() -> None:
    generator = torch.Generator().manual_seed(4)
    strategy, wanted = FedAvg(2, rank=2), random_adapter(generator)
    state = strategy.initialize(wanted, (2,), LAYERS)
    told = strategy.configure_train(state, ClientProfile(0, 2, rank=1, num_examples=10))
    assert_same_adapter(told.adapter, wanted.with_rank(2))
    updates = updates_of(7, (2, 2))
    new = strategy.aggregate_train(state, updates).adapter
    rows = [update.num_examples for update in updates]
    for name, (b, a) in projections(wanted).items():
        deltas = [projections(update.delta)[name] for update in updates]
        got_b, got_a = projections(new)[name]
        np.testing.assert_array_equal(got_b[:, 2:], b[:, 2:])
        np.testing.assert_array_equal(got_a[2:], a[2:])
        for got, start, half in ((got_b[:, :2], b[:, :2], 0), (got_a[:2], a[:2], 1)):
            mean = np.average([delta[half] for delta in deltas], axis=0, weights=rows)
            np.testing.assert_allclose(got, start + mean, rtol=0, atol=1e-6)
