"""FedAvg by hand, and how a configured method is built."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedflame.config import StrategyConfig
from fedflame.messages import Adapter, ClientUpdate
from fedflame.strategies import FedAvg, Flame, build_strategy
from fedflame.strategies.base import ClientProfile


def an_adapter(bank: float, attention: float) -> Adapter:
    """Two experts, rank 1, hidden 3: one bank with the second expert at ten times the first, and one pair."""
    values = torch.tensor([1.0, 10.0])[:, None, None] * bank
    return Adapter({"0.A1": values.expand(2, 2, 3).contiguous()}, {"q_proj.B": torch.full((4, 1), attention)})


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
        told = strategy.configure_train(state, ClientProfile(client=0, active_experts=k, num_examples=10))
        assert (told.active_experts, told.rescaler) == (3, "fixed")
        assert told.rescaler_values.tolist() == [1.0, 1.0]
        assert told.adapter is state.adapter


def test_min_is_the_smallest_tier_and_a_number_is_itself() -> None:
    assert build_strategy(StrategyConfig(name="fedavg"), (8, 2, 4), 8) == FedAvg(2)
    assert build_strategy(
        StrategyConfig(name="fedavg", active_experts="min"), iter([8, 4, 2, 4]), 8
    ) == FedAvg(2)
    assert build_strategy(StrategyConfig(name="fedavg", active_experts="5"), (8, 2, 4), 8) == FedAvg(5)


@pytest.mark.parametrize("rescaler", ["learned", "none", "static", "mass"])
def test_flame_is_built_with_its_temperature_and_rescaler(rescaler: str) -> None:
    config = StrategyConfig(temperature=3.5, rescaler=rescaler)  # type: ignore[arg-type]
    wanted = Flame(num_experts_per_tok=6, temperature=3.5, rescaler=rescaler)  # type: ignore[arg-type]
    assert build_strategy(config, (6, 2), 6) == wanted
