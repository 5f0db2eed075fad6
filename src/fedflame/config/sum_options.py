"""What a configuration may ask for beside `privacy.secure_aggregation`, and what is set for it."""

from __future__ import annotations

from typing import Any

from fedflame.config.methods import METHODS
from fedflame.config.run_config import RunConfig
from fedflame.config.strategy_section import StrategyConfig
from fedflame.errors import UserError

_ONLY: dict[str, tuple[Any, str]] = {
    "strategy.clip": ("none", "no update is seen by itself; a site clips its own (limits.max_update_norm)"),
    "strategy.robust": ("none", "no update is seen by itself"),
    "server.fraction_evaluate": (0, "the scores of a client would be seen by themselves"),
}
"""The only value that a key may have, and why."""


def set_defaults_of_sums(values: dict[str, Any]) -> None:
    """Set in the values of a configuration what has another default where updates are seen in sums alone."""
    privacy = values.get("privacy")
    if not isinstance(privacy, dict) or str(privacy.get("secure_aggregation", "")).lower() != "true":
        return
    strategy = values.setdefault("strategy", {})
    if not isinstance(strategy, dict):
        return
    strategy.setdefault("clip", "none")
    method = METHODS.get(str(strategy.get("name", StrategyConfig.model_fields["name"].default)))
    if method is not None and "k_rotation" in method.options:
        strategy.setdefault("k_rotation", "none")  # turns would leave groups too small


def refuse_what_no_sum_tells(config: RunConfig) -> None:
    """Raise UserError for an option that needs single updates, or for a method that is no weighted mean."""
    if not config.privacy.secure_aggregation:
        return
    if "robust" not in config.method.options:
        raise UserError(
            f"config: strategy.name = {config.strategy.name!r} with privacy.secure_aggregation: this method "
            "is no weighted mean of updates, so that no sum is enough for it; take another one"
        )
    for key, (value, why) in _ONLY.items():
        section, name = key.split(".")
        if (got := getattr(getattr(config, section), name)) != value:
            raise UserError(
                f"config: {key} = {got!r}: with privacy.secure_aggregation, {why}; set it to {value!r}"
            )


def require_groups(config: RunConfig, num_experts_per_tok: int) -> None:
    """Raise UserError if clients would never be in a sum: too few of a k, or too few in every round."""
    if not config.privacy.secure_aggregation:
        return
    rounds = range(1, config.server.num_server_rounds + 1)
    of_rounds = [config.trained_experts(num_experts_per_tok, number) for number in rounds]
    for k in sorted({k for ks in of_rounds for k in ks}, reverse=True):
        most = max(ks.count(k) for ks in of_rounds)
        if most < config.privacy.min_group:
            raise UserError(
                f"config: clients that train with k = {k}: {most}; with privacy.secure_aggregation, there "
                f"must be at least privacy.min_group = {config.privacy.min_group}. Let more clients train "
                "with this k, or none"
            )
    if (sampled := config.clients_per_round()) < config.privacy.min_group:
        raise UserError(
            f"config: server.fraction_train = {config.server.fraction_train} samples {sampled} clients for a "
            f"round; with privacy.secure_aggregation, there must be at least privacy.min_group = "
            f"{config.privacy.min_group}. Sample more"
        )
