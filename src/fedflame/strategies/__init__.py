"""Federated methods, one per file: what each client trains, and how the server averages.

`flame` is the paper's method: clients differ in experts per token. `hetlora`, `flexlora` and `flora` let
them differ in rank. `fedavg` treats all alike, and with it `ffa_lora` and `rolora`, which send one half of
the adapter, and `fedex_lora`, which averages products exactly. `base` has the three hooks that a method
implements and what several share. A new method is one file with a frozen dataclass and a line in
`build_strategy`; docs/strategies.md has all of them side by side.
"""

from __future__ import annotations

from fedflame.config import RunConfig
from fedflame.errors import UserError
from fedflame.strategies.base import Strategy
from fedflame.strategies.fedavg import FedAvg
from fedflame.strategies.fedex_lora import FedExLoRA
from fedflame.strategies.ffa_lora import FFALoRA
from fedflame.strategies.flame import Flame
from fedflame.strategies.flexlora import FlexLoRA
from fedflame.strategies.flora import FLoRA
from fedflame.strategies.hetlora import HetLoRA
from fedflame.strategies.rolora import RoLoRA

__all__ = [
    "FFALoRA",
    "FLoRA",
    "FedAvg",
    "FedExLoRA",
    "Flame",
    "FlexLoRA",
    "HetLoRA",
    "RoLoRA",
    "Strategy",
    "build_strategy",
]


def build_strategy(config: RunConfig, num_experts_per_tok: int) -> Strategy:
    """The configured method on a model with K = `num_experts_per_tok`.

    Raises:
        UserError: all clients are to run more experts than the model does.
    """
    options, full = config.strategy, num_experts_per_tok
    if options.name == "flame":
        return Flame(
            full,
            options.temperature,
            options.rescaler,
            options.count_normalization,
            options.tier_affinity,
            options.learning_rate_exponent,
            options.counted_rows,
        )
    if options.name == "hetlora":
        return HetLoRA(full, rank_decay=options.rank_decay, rank_penalty=options.rank_penalty)
    if options.name == "flexlora":
        return FlexLoRA(full, counted_rows=options.counted_rows)
    if options.name == "flora":
        return FLoRA(full, counted_rows=options.counted_rows, seed=config.seed)
    alike = {"fedavg": FedAvg, "ffa_lora": FFALoRA, "rolora": RoLoRA, "fedex_lora": FedExLoRA}
    k, rank = config.trained_experts(full, 1)[0], config.trained_ranks(full)[0]
    if k > full:
        raise UserError(
            f"strategy.active_experts {k}: must be 'min', 'full' or between 1 and {full} "
            "(the model's num_experts_per_tok)"
        )
    return alike[options.name](k, rank, options.counted_rows)
