"""From configuration to method."""

from __future__ import annotations

import pytest

from fedflame.config.load import load_config
from fedflame.experiment.method import build_strategy
from fedflame.strategies import FedAvg, FedExLoRA, Flame, FlexLoRA, FLoRA, HetLoRA, Strategy

CLIENTS = ("clients.num_clients=3", "clients.active_experts=6,2,4", "adapter.r=9")


def built(*overrides: str) -> Strategy:
    return build_strategy(load_config(None, [*CLIENTS, *overrides]), 6)


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (("strategy.name=fedavg",), FedAvg(2, 9, "trained")),
        (("strategy.name=fedavg", "strategy.counted_rows=held"), FedAvg(2, 9, "held")),
        (("strategy.name=fedavg", "strategy.active_experts=full"), FedAvg(6, 9, "trained")),
        (("strategy.name=fedavg", "strategy.active_experts=5", "strategy.rank=4"), FedAvg(5, 4, "trained")),
        (
            ("strategy.name=fedavg", "strategy.active_experts=full", "strategy.rank=min"),
            FedAvg(6, 3, "trained"),
        ),
        (("strategy.name=fedavg", "strategy.rank=min", "clients.ranks=7,8"), FedAvg(2, 7, "trained")),
        (("strategy.name=fedex_lora", "strategy.rank=min"), FedExLoRA(2, 3, "trained")),
        (("strategy.name=fedex_lora", "strategy.counted_rows=held"), FedExLoRA(2, 9, "held")),
        (
            ("strategy.name=hetlora", "strategy.rank_decay=0.5"),
            HetLoRA(6, rank_decay=0.5, rank_penalty=0.01),
        ),
        (("strategy.name=flexlora",), FlexLoRA(6, counted_rows="trained")),
        (("strategy.name=flexlora", "strategy.counted_rows=held"), FlexLoRA(6, counted_rows="held")),
        (("strategy.name=flora", "seed=5"), FLoRA(6, counted_rows="trained", seed=5)),
        (("strategy.name=flora", "strategy.counted_rows=held"), FLoRA(6, counted_rows="held")),
        (
            ("strategy.temperature=3.5", "strategy.rescaler=mass", "strategy.count_normalization=token"),
            Flame(6, 3.5, "mass", "token", 0.7, 0.0, "trained"),
        ),
        (
            ("strategy.tier_affinity=1", "strategy.learning_rate_exponent=0.5", "strategy.counted_rows=held"),
            Flame(6, 1.0, "learned", "slot", 1.0, 0.5, "held"),
        ),
    ],
)
def test_options_reach_the_method(overrides: tuple[str, ...], wanted: Strategy) -> None:
    assert built(*overrides) == wanted
