"""Federated methods, one per file: what each client trains, and how the server averages.

`flame` is the paper's method, `fedavg` its trivial baseline (everyone at the same k). `base` has the
three hooks that a method implements and the weighted mean they share. A new method is one file with
a frozen dataclass and one line in `build_strategy`.
"""

from __future__ import annotations

from collections.abc import Iterable

from fedflame.config import StrategyConfig
from fedflame.errors import UserError
from fedflame.strategies.base import Strategy
from fedflame.strategies.fedavg import FedAvg
from fedflame.strategies.flame import Flame

__all__ = ["FedAvg", "Flame", "Strategy", "build_strategy"]


def build_strategy(config: StrategyConfig, tiers: Iterable[int], num_experts_per_tok: int) -> Strategy:
    """The configured method for clients of these tiers on a model with K = `num_experts_per_tok`.

    Raises:
        UserError: FedAvg is to run more experts than the model does.
    """
    if config.name == "flame":
        return Flame(num_experts_per_tok, config.temperature, config.rescaler)
    k = config.trained_experts(list(tiers))[0]
    if k > num_experts_per_tok:
        raise UserError(
            f"strategy.active_experts {k}: must be 'min' or between 1 and {num_experts_per_tok} "
            "(the model's num_experts_per_tok)"
        )
    return FedAvg(k)
