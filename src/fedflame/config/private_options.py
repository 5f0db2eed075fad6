"""What a configuration may ask for beside `privacy.unit = "row"`, and what is set for it."""

from __future__ import annotations

from typing import Any

from fedflame.config.run_config import RunConfig
from fedflame.errors import UserError


def set_private_defaults(values: dict[str, Any]) -> None:
    """Set in the values of a configuration what has another default where rows are private.

    Weights by activation counts would need the counts, which tell what rows are about.
    """
    privacy, strategy = values.get("privacy"), values.setdefault("strategy", {})
    if not isinstance(privacy, dict) or privacy.get("unit") != "row" or not isinstance(strategy, dict):
        return
    if strategy.get("name", "flame") == "flame":
        strategy.setdefault("temperature", 0.0)


def refuse_what_tells_of_rows(config: RunConfig) -> None:
    """Raise UserError for an option that would break the guarantee, with the reason and what to set."""
    if config.privacy.unit == "none":
        return
    training, strategy = config.training, config.strategy
    for key, value, allowed, reason in (
        (
            "strategy.temperature",
            strategy.temperature,
            strategy.name != "flame" or strategy.temperature == 0,
            "weights by activation counts tell what rows are about; set it to 0",
        ),
        (
            "strategy.rescaler",
            strategy.rescaler,
            strategy.rescaler != "mass",
            "it is measured on rows without noise; set 'learned'",
        ),
        (
            "strategy.k_rotation",
            strategy.k_rotation,
            config.k_rotation() != "all",
            "rounds would differ in their steps; set 'smaller'",
        ),
        (
            "training.budget",
            training.budget,
            training.budget == "steps",
            "rounds would differ in their steps; set 'steps'",
        ),
        (
            "training.tokens_per_step",
            training.tokens_per_step,
            not training.tokens_per_step,
            "batches would depend on each other's rows; set training.per_device_train_batch_size",
        ),
        (
            "training.packing",
            training.packing,
            not training.packing,
            "a row is clipped by itself; leave it out",
        ),
        (
            "training.padding_free",
            training.padding_free,
            not training.padding_free,
            "a row is clipped by itself; leave it out",
        ),
        (
            "training.gradient_accumulation_steps",
            training.gradient_accumulation_steps,
            training.gradient_accumulation_steps == 1,
            "a step takes its rows one by one anyway; set training.per_device_train_batch_size",
        ),
        (
            "training.router_aux_loss_coef",
            training.router_aux_loss_coef,
            training.router_aux_loss_coef == 0,
            "it is a loss of a batch, not of a row; set it to 0",
        ),
        (
            "adapter.lora_dropout",
            config.adapter.lora_dropout,
            config.adapter.lora_dropout == 0,
            "what is dropped depends on the other rows of a step; set it to 0",
        ),
        (
            "model.dtype",
            config.model.dtype,
            config.model.dtype != "float16",
            "steps that overflow are skipped, which tells of rows; set 'float32' or 'bfloat16'",
        ),
        (
            "server.fraction_evaluate",
            config.server.fraction_evaluate,
            config.server.fraction_evaluate == 0,
            "scores of clients have no noise; set it to 0",
        ),
    ):
        if not allowed:
            raise UserError(f"config: {key} = {value!r} with privacy.unit = 'row': {reason}")
