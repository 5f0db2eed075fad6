"""Score a run, an adapter or a base model on held-out rows at any k."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedflame.base.files import model_config_path
from fedflame.config.load import load_config
from fedflame.config.run_config import RunConfig
from fedflame.cost.model_shape import read_model_shape
from fedflame.cost.tiers import require_possible
from fedflame.data.federation import load_federation
from fedflame.data.given import GivenRows
from fedflame.errors import UserError
from fedflame.experiment.prepare import require_runnable
from fedflame.experiment.run_folder import is_run, saved_config, saved_dtype
from fedflame.training.scores import Scores

if TYPE_CHECKING:
    from fedflame.experiment.assemble import Experiment
    from fedflame.strategies.base import ServerState


def score_source(
    source: str,
    active_experts: Sequence[int] = (),
    overrides: Sequence[str] = (),
    given: GivenRows | None = None,
) -> dict[int, dict[str, Scores]]:
    """Scores by k and category.

    Args:
        source: a run folder, an adapter folder, or a base model by folder or name.
        active_experts: the k to evaluate at; empty for those of the source.
        overrides: `section.key=value` over the run's own configuration, or over the defaults.
        given: rows that a program hands over, instead of `data.dataset_name`.

    Raises:
        UserError: a source that is none of these, a k that the model does not have, or a memory that is full.
    """
    place = Path(source)
    config, rank = _source_config(source, list(active_experts), list(overrides))
    shape = require_runnable(config, rank)
    require_possible(active_experts, shape)
    federation = load_federation(config, given)
    from fedflame.base.out_of_memory import memory_in_words  # from here on with torch
    from fedflame.experiment.assemble import assemble
    from fedflame.training.evaluation import evaluate

    experiment = assemble(config, federation, saved_dtype(place) if is_run(place) else None)
    state, adapted = _source_state(place, experiment), experiment.adapted
    scores = {}
    for k in active_experts or config.evaluated_experts(shape.num_experts_per_tok):
        adapter, rescaler = state.adapter_at(k), state.rescaler_at(k, len(adapted.layers))
        with memory_in_words(adapted.model.device, f"evaluating at k = {k}", ""):
            scores[k] = evaluate(
                adapted, experiment.held_out, adapter, k, rescaler, generate=True, merged=state.merged
            )
    return scores


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, of ours or of PEFT."""
    return (folder / "adapter_config.json").is_file()


def _source_config(source: str, wanted: list[int], overrides: list[str]) -> tuple[RunConfig, int]:
    """The run's configuration, or the defaults with the source's model, adapter and tiers; its rank."""
    place = Path(source)
    if is_run(place):
        return load_config(saved_config(place), overrides), 0
    name, adapter, tiers, rank = source, RunConfig().adapter, wanted, 0
    if is_adapter(place):
        from fedflame.exports import read_settings, rescaler_tiers

        settings = read_settings(place)
        name, adapter = _base_of(source, settings.base_model), settings.adapter
        tiers, rank = wanted or rescaler_tiers(place), settings.adapter.r
    shape = read_model_shape(model_config_path(name))
    tiers = tiers or [shape.num_experts_per_tok]
    given = [f"model.model_name_or_path={name}", f"clients.num_clients={len(tiers)}"]
    given.append(f"clients.active_experts={','.join(map(str, tiers))}")
    return load_config(RunConfig(adapter=adapter), [*given, *overrides]), rank


def _base_of(source: str, base_model: str | None) -> str:
    if not base_model:
        raise UserError(f"{source}: adapter_config.json names no base model")
    return base_model


def _source_state(source: Path, experiment: Experiment) -> ServerState:
    from fedflame.exports import load_adapter, load_rescalers, load_tier_adapters
    from fedflame.server.checkpoint import read_checkpoint
    from fedflame.strategies.base import ServerState

    adapted, seed = experiment.adapted, experiment.config.seed
    if is_run(source):
        return read_checkpoint(source).state
    if is_adapter(source):
        return ServerState(
            load_adapter(source, adapted, seed),
            load_rescalers(source, adapted),
            tier_adapters=load_tier_adapters(source, adapted, seed),
        )
    return ServerState(adapted.initial_adapter(seed), {})
