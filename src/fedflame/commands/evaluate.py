"""`fedflame evaluate`: score a run, an adapter or a base model on held-out rows at any k."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fedflame.base_model import model_config_path
from fedflame.commands.run import Workbench, assemble, saved_config, saved_dtype
from fedflame.commands.tables import score_table
from fedflame.config import RunConfig, parse_tiers, with_overrides
from fedflame.errors import UserError
from fedflame.evaluation import Scores, evaluate, total
from fedflame.export import (
    load_adapter,
    load_rescalers,
    load_tier_adapters,
    read_settings,
    rescaler_tiers,
)
from fedflame.model_shape import read_model_shape
from fedflame.server.checkpoint import read_checkpoint
from fedflame.strategies.base import ServerState


def print_scores(
    source: str, active_experts: str | None, overrides: list[str], as_json: bool, console: Console
) -> None:
    """Print scores per k as a table, or per k and category as JSON.

    Args:
        source: a run folder, an adapter folder, or a base model by folder or name.
        active_experts: the k to evaluate at, such as "8,4"; None for the tiers of the configuration.
        overrides: configuration over the run's own, or over the defaults.
        as_json: print one JSON object.
        console: where tables go.

    Raises:
        UserError: a source that is none of these, or a k that the model does not have.
    """
    wanted = _wanted(active_experts)
    config = _source_config(source, wanted, overrides)
    bench = assemble(config, Console(quiet=True), saved_dtype(Path(source)) if _is_run(source) else None)
    state = _source_state(source, bench)
    scores: dict[int, dict[str, Any]] = {}
    for k in wanted or config.evaluated_experts(bench.adapted.num_experts_per_tok):
        rescaler = state.rescalers.get(k, torch.ones(len(bench.adapted.layers)))
        by_category = evaluate(
            bench.adapted,
            bench.held_out,
            state.adapter_at(k),
            k,
            rescaler,
            generate=True,
            merged=state.merged,
        )
        scores[k] = {"all": _plain(total(by_category))}
        scores[k] |= {category: _plain(value) for category, value in by_category.items()}
    if as_json:
        print(json.dumps(scores, indent=2))
    else:
        console.print(score_table(scores))


def _wanted(active_experts: str | None) -> list[int]:
    try:
        return parse_tiers(active_experts) if active_experts else []
    except ValueError as error:
        raise UserError(f"--active-experts {active_experts!r}: {error}") from error


def _is_adapter(source: str) -> bool:
    return (Path(source) / "adapter_config.json").is_file()


def _is_run(source: str) -> bool:
    return (Path(source) / "metrics.jsonl").is_file()


def _source_config(source: str, wanted: list[int], overrides: list[str]) -> RunConfig:
    """The run's configuration, or the defaults with the source's model, adapter and tiers."""
    if _is_run(source):
        return with_overrides(saved_config(Path(source)), overrides)
    name, adapter, tiers = source, RunConfig().adapter, wanted
    if _is_adapter(source):
        settings = read_settings(Path(source))
        name, adapter = _base_of(source, settings.base_model), settings.adapter
        tiers = wanted or rescaler_tiers(Path(source))
    shape = read_model_shape(model_config_path(name))
    tiers = tiers or [shape.num_experts_per_tok]
    given = [f"model.model_name_or_path={name}", f"clients.num_clients={len(tiers)}"]
    given.append(f"clients.active_experts={','.join(map(str, tiers))}")
    return with_overrides(RunConfig(adapter=adapter), [*given, *overrides])


def _base_of(source: str, base_model: str | None) -> str:
    if not base_model:
        raise UserError(f"{source}: adapter_config.json names no base model")
    return base_model


def _source_state(source: str, bench: Workbench) -> ServerState:
    if _is_run(source):
        return read_checkpoint(Path(source)).state
    if _is_adapter(source):
        return ServerState(
            load_adapter(Path(source), bench.adapted, bench.config.seed),
            load_rescalers(Path(source), bench.adapted),
            tier_adapters=load_tier_adapters(Path(source), bench.adapted, bench.config.seed),
        )
    return ServerState(bench.adapted.initial_adapter(bench.config.seed), {})


def _plain(scores: Scores) -> dict[str, Any]:
    return {
        "loss": scores.loss,
        "exact_match": scores.exact_match,
        "rouge_l": scores.rouge_l,
        "rows": scores.rows,
        "response_tokens": scores.response_tokens,
    }
