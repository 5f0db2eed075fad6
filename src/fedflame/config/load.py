"""A run's configuration from a TOML file or a dict, with overrides, checked as a whole."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedflame.config.methods import METHODS, OF_ALL_METHODS
from fedflame.config.run_config import RunConfig
from fedflame.config.sections import StrategyConfig
from fedflame.config.settings import refuse_unknown_keys, validated
from fedflame.errors import UserError
from fedflame.reading import read_toml


def load_config(
    config: str | Path | Mapping[str, Any] | RunConfig | None = None, overrides: Sequence[str] = ()
) -> RunConfig:
    """The checked configuration of a run.

    Args:
        config: a TOML file, a dict with the same sections, a configuration, or None for the defaults: the
            embedded model and generated data.
        overrides: `section.key=value`, over what `config` says.

    Raises:
        UserError: a missing or broken file, an unknown key (the message names the nearest valid one), a value
            that is not allowed, or values that contradict each other.
    """
    values = given_values(config)
    for override in overrides:
        _apply_override(values, override)
    refuse_unknown_keys(values, RunConfig, "config")
    loaded = validated(RunConfig, values, "config")
    _refuse_contradictions(loaded)
    return loaded


def given_values(config: str | Path | Mapping[str, Any] | RunConfig | None) -> dict[str, Any]:
    """What a configuration says itself, by section, unchecked. Raises UserError as `load_config` does."""
    if config is None:
        return {}
    if isinstance(config, RunConfig):
        return config.model_dump(exclude_unset=True)
    if isinstance(config, str | Path):
        return read_toml(Path(config))
    if not isinstance(config, Mapping):
        raise UserError(
            f"config: got {type(config).__name__}; it must be the path of a TOML file, a dict or a RunConfig"
        )
    return copy.deepcopy(dict(config))


def _refuse_contradictions(config: RunConfig) -> None:
    clients, strategy = config.clients.num_clients, config.strategy
    in_turn = {
        "clients.active_experts": config.clients.active_experts,
        "clients.ranks": config.clients.ranks,
        "training.tokens_per_step": config.training.tokens_per_step,
    }
    for key, entries in in_turn.items():
        if len(entries) > clients:
            raise UserError(
                f"config: {key} has {len(entries)} entries for clients.num_clients = {clients}; "
                "it must have at most one per client"
            )
    ranks = [("clients.ranks", rank) for rank in config.clients.ranks]
    ranks += [("strategy.rank", int(strategy.rank))] if strategy.rank.isdecimal() else []
    for key, rank in ranks:
        if rank > config.adapter.r:
            raise UserError(f"config: {key} = {rank}: must be at most adapter.r = {config.adapter.r}")
    _refuse_options_of_other_methods(strategy)
    _refuse_a_warmup_without_end(config)
    if config.server.min_clients > config.clients_per_round():
        raise UserError(
            f"config: server.min_clients = {config.server.min_clients}: server.fraction_train = "
            f"{config.server.fraction_train} samples only {config.clients_per_round()} of {clients} clients"
        )


def _refuse_a_warmup_without_end(config: RunConfig) -> None:
    training, rounds = config.training, config.server.num_server_rounds
    if training.warmup_steps and training.num_train_epochs:
        raise UserError(
            f"config: training.warmup_steps = {training.warmup_steps}: with training.num_train_epochs, "
            "clients differ in their steps; set training.warmup_ratio instead"
        )
    if config.warmup_rounds() >= rounds:
        raise UserError(
            f"config: training.warmup_steps = {training.warmup_steps}: must be fewer than the "
            f"{training.max_steps * rounds} steps of all rounds"
        )


def _refuse_options_of_other_methods(strategy: StrategyConfig) -> None:
    options = METHODS[strategy.name].options
    for key in sorted(set(StrategyConfig.model_fields) - options - OF_ALL_METHODS):
        value, default = getattr(strategy, key), StrategyConfig.model_fields[key].default
        if value != default:
            methods = ", ".join(name for name, method in METHODS.items() if key in method.options)
            why = METHODS[strategy.name].lacks.get(key)
            raise UserError(
                f"config: strategy.{key} = {value!r}: {strategy.name} has no such option"
                f"{f', because {why}' if why else ''}; {methods} "
                f"{'have' if ',' in methods else 'has'} it (leave it at {default!r})"
            )


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"--set {override!r}: must be section.key=value, such as data.alpha=0.1")
    section, dot, name = key.strip().partition(".")
    if not dot:
        values[section] = text.strip()
        return
    target = values.setdefault(section, {})
    if not isinstance(target, dict):
        raise UserError(f"config: unknown key {key.strip()!r}; {section} is a value, not a section")
    target[name] = text.strip()
