"""What a configuration may ask for beside `privacy.unit = "row"`, and what is set for it."""

from __future__ import annotations

from typing import Any

from fedflame.config.methods import METHODS
from fedflame.config.run_config import RunConfig
from fedflame.config.strategy_section import StrategyConfig
from fedflame.errors import UserError

_ALONE = "a row is clipped by itself"
_EQUAL = "rounds would differ in their steps"
_ONLY: dict[str, tuple[Any, str]] = {
    "strategy.temperature": (0, "weights by activation counts tell what rows are about"),
    "training.budget": ("steps", _EQUAL),
    "training.tokens_per_step": ((), "which rows share a batch would depend on the others"),
    "training.packing": (False, _ALONE),
    "training.padding_free": (False, _ALONE),
    "training.gradient_accumulation_steps": (1, "a step takes its rows one by one anyway"),
    "training.router_aux_loss_coef": (0, "it is a loss of a batch, not of a row"),
    "adapter.lora_dropout": (0, "what is dropped would depend on the other rows"),
    "server.fraction_evaluate": (0, "scores of clients have no noise"),
}
"""The only value that a key may have, and why."""
_NEVER = {
    "strategy.rescaler": ("mass", "it is measured on rows without noise"),
    "strategy.k_rotation": ("all", _EQUAL),
    "model.dtype": ("float16", "steps that overflow are skipped, which tells of rows"),
}
"""A value that a key may not have, and why."""
_SWITCHES = {
    "unit": ("'row'", "'none'", ("epsilon", "delta", "noise_multiplier", "clip_norm", "clipping")),
    "secure_aggregation": ("true", "false", ("min_group",)),
}
"""The keys that turn protection on: how, how not, and the keys that say nothing without it."""


def refuse_privacy_without_its_switch(values: dict[str, Any]) -> None:
    """Raise UserError if the values of a configuration say how to protect, and not whether.

    Nothing would be protected, and nothing would say so. A switch that is off is a word.
    """
    privacy = values.get("privacy")
    if not isinstance(privacy, dict):
        return
    for switch, (on, off, keys) in _SWITCHES.items():
        if switch not in privacy and (given := [key for key in keys if key in privacy]):
            raise UserError(
                f"config: privacy.{given[0]} is set without privacy.{switch}, so that nothing is protected; "
                f"set privacy.{switch} to {on}, or to {off} if that is meant"
            )


def set_private_defaults(values: dict[str, Any]) -> None:
    """Set in the values of a configuration what has another default where rows are private.

    Weights by activation counts would need the counts, which tell what rows are about.
    """
    privacy = values.get("privacy")
    if not isinstance(privacy, dict) or privacy.get("unit") != "row":
        return
    strategy = values.setdefault("strategy", {})
    if not isinstance(strategy, dict):
        return
    method = METHODS.get(str(strategy.get("name", StrategyConfig.model_fields["name"].default)))
    if method is not None and "temperature" in method.options:
        strategy.setdefault("temperature", 0.0)


def refuse_what_tells_of_rows(config: RunConfig) -> None:
    """Raise UserError for an option that would break the guarantee, with the reason and what to set."""
    if config.privacy.unit == "none":
        return
    for key, (value, why) in (_ONLY | _NEVER).items():
        section, name = key.split(".")
        got = getattr(getattr(config, section), name)
        if section == "strategy" and name not in config.method.options:
            continue  # whatever its default is, the method does not read it
        if key in _ONLY and got != value:
            raise _refusal(key, got, why, f"set it to {value!r}")
        if key in _NEVER and got == value:
            raise _refusal(key, got, why, "set another value")


def _refusal(key: str, got: Any, why: str, advice: str) -> UserError:
    return UserError(f"config: {key} = {got!r}: with privacy.unit = 'row', {why}; {advice}")
