"""A run's configuration from a TOML file or a dict, with overrides, checked as a whole."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedflame.config.client_files import client_files
from fedflame.config.lists import list_parts
from fedflame.config.methods import METHODS, OF_ALL_METHODS
from fedflame.config.private_options import (
    refuse_privacy_without_its_switch,
    refuse_what_tells_of_rows,
    set_private_defaults,
)
from fedflame.config.run_config import RunConfig
from fedflame.config.sections import SKILLS, ClientsConfig
from fedflame.config.settings import refuse_unknown_keys, validated
from fedflame.config.strategy_section import StrategyConfig
from fedflame.config.sum_options import refuse_what_no_sum_tells, set_defaults_of_sums
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
    _count_client_files(values)
    set_private_defaults(values)
    set_defaults_of_sums(values)
    refuse_unknown_keys(values, RunConfig, "config")
    loaded = validated(RunConfig, values, "config")
    refuse_privacy_without_its_switch(values)
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


def _count_client_files(values: dict[str, Any]) -> None:
    """Set the number of clients to that of their files, unless it is given."""
    data = values.get("data")
    patterns = list_parts(data.get("client_files", ())) if isinstance(data, dict) else []
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        return
    clients = values.setdefault("clients", {})
    if isinstance(clients, dict):
        set_num_clients(clients, len(client_files(patterns)), "data.client_files")


def set_num_clients(clients: dict[str, Any], count: int, whose: str) -> None:
    """Set `num_clients` in a section `clients`, and the k of as many unless they are given.

    Raises:
        UserError: another number is given.
    """
    if str(clients.setdefault("num_clients", count)) != str(count):
        raise UserError(
            f"clients.num_clients = {clients['num_clients']}: {whose} has the rows of {count} clients; leave "
            "clients.num_clients out, or give rows for each"
        )
    clients.setdefault("active_experts", list(ClientsConfig().active_experts[:count]))


def _refuse_contradictions(config: RunConfig) -> None:
    _refuse_two_sources(config)
    _refuse_tests_of_nobody(config)
    clients, strategy = config.clients.num_clients, config.strategy
    if config.data.trained_by.isdecimal() and int(config.data.trained_by) >= clients:
        raise UserError(
            f"config: data.trained_by = {config.data.trained_by}: must be below "
            f"clients.num_clients = {clients}"
        )
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
    _refuse_a_metric_that_is_not_taken(config)
    refuse_what_tells_of_rows(config)
    refuse_what_no_sum_tells(config)
    if config.server.min_clients > config.clients_per_round():
        raise UserError(
            f"config: server.min_clients = {config.server.min_clients}: server.fraction_train = "
            f"{config.server.fraction_train} samples only {config.clients_per_round()} of {clients} clients"
        )


def _refuse_two_sources(config: RunConfig) -> None:
    data, evaluation = config.data, config.evaluation
    for one, other, both in (
        ("data.client_files", "data.dataset_name", data.client_files and data.dataset_name != SKILLS),
        ("data.client_files", "data.client_field", data.client_files and data.client_field),
        (
            "evaluation.dataset_name",
            "evaluation.split",
            evaluation.dataset_name and evaluation.split != "test",
        ),
    ):
        if both:
            raise UserError(f"config: {one} and {other} exclude each other; leave one out")


def _refuse_tests_of_nobody(config: RunConfig) -> None:
    for needed, there in (
        ("data.client_files", config.data.client_files),
        ("server.fraction_evaluate", config.server.fraction_evaluate),
    ):
        if config.data.client_test_files and not there:
            raise UserError(f"config: data.client_test_files needs {needed}; set it, or leave the files out")


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


def _refuse_a_metric_that_is_not_taken(config: RunConfig) -> None:
    server, evaluation = config.server, config.evaluation
    generated = server.metric_for_best_model != "loss"
    if generated and evaluation.max_new_tokens == 0:
        raise UserError(
            f"config: server.metric_for_best_model = {server.metric_for_best_model!r}: answers must be "
            "generated for it; set evaluation.max_new_tokens"
        )
    every = {"evaluation.evaluate_every": evaluation.evaluate_every}
    every |= {"evaluation.generate_every": evaluation.generate_every} if generated else {}
    wanting = "server.load_best_model_at_end = true" if server.load_best_model_at_end else ""
    wanting = wanting or f"server.early_stopping_patience = {server.early_stopping_patience}"
    if server.looks_for_best and (never := [key for key, rounds in every.items() if rounds == 0]):
        raise UserError(f"config: {wanting}: {never[0]} = 0 measures no round between; set it to 1 or more")


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
