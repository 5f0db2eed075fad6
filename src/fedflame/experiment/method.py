"""The strategy object of a configured method, by its row in the table of methods."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

from fedflame.config.run_config import RunConfig
from fedflame.errors import UserError
from fedflame.strategies.base import Strategy


def build_strategy(config: RunConfig, num_experts_per_tok: int) -> Strategy:
    """The configured method on a model with K = `num_experts_per_tok`.

    A field of the strategy's class that is named like an option takes the option's value.

    Raises:
        UserError: the method is an object that only a program can hand over.
    """
    method, full = config.method, num_experts_per_tok
    if not method.strategy:
        raise UserError(
            f"strategy.name = {config.strategy.name!r}: only a program can hand over such a method, by "
            "fedflame.run(config, strategy=...)"
        )
    values: dict[str, Any] = {name: getattr(config.strategy, name) for name in method.options}
    values |= {"num_experts_per_tok": full, "seed": config.seed}
    if method.experts == "full":
        values["active_experts"] = full
    elif method.experts == "chosen":
        values["active_experts"] = config.trained_experts(full, 1)[0]
        values["rank"] = config.trained_ranks(full)[0]
    module, _, name = method.strategy.partition(":")
    of_class = getattr(importlib.import_module(module), name)
    fields = {field.name for field in dataclasses.fields(of_class)}
    strategy: Strategy = of_class(**{key: value for key, value in values.items() if key in fields})
    return strategy
