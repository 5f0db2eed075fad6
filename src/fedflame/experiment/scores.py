"""Score a run, an adapter or a base model on held-out rows at any k."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedflame.cost.tiers import require_possible
from fedflame.data.federation import held_out_only, load_federation
from fedflame.data.given import GivenRows
from fedflame.experiment.prepare import require_runnable
from fedflame.experiment.run_folder import is_run, saved_dtype
from fedflame.experiment.source import source_config, source_states
from fedflame.training.scores import Scores


def score_source(
    source: str,
    active_experts: Sequence[int] = (),
    overrides: Sequence[str] = (),
    given: GivenRows | None = None,
) -> dict[int, dict[str, Scores]]:
    """Scores by k and category, on all rows of `evaluation.dataset_name` or on those held out of the data.

    Args:
        source: a run folder, an adapter folder, or a base model by folder or name.
        active_experts: the k to evaluate at; empty for those of the source.
        overrides: `section.key=value` over the run's own configuration, or over the defaults.
        given: rows that a program hands over, instead of `data.dataset_name`.

    Raises:
        UserError: a source that is none of these, a k that the model does not have, or a memory that is full.
    """
    place = Path(source)
    config, rank = source_config(source, list(active_experts), list(overrides))
    shape = require_runnable(config, rank)
    require_possible(active_experts, shape)
    federation = held_out_only(config) if config.evaluation.dataset_name else load_federation(config, given)
    from fedflame.base.out_of_memory import memory_in_words  # from here on with torch
    from fedflame.experiment.assemble import assemble
    from fedflame.training.evaluation import evaluate

    experiment = assemble(config, federation, saved_dtype(place) if is_run(place) else None)
    adapted = experiment.adapted
    state_at = source_states(place, adapted, config.seed)
    scores = {}
    for k in active_experts or config.evaluated_experts(shape.num_experts_per_tok):
        state = state_at(k)
        adapter, rescaler = state.adapter_at(k), state.rescaler_at(k, len(adapted.layers))
        with memory_in_words(adapted.model.device, f"evaluating at k = {k}", ""):
            scores[k] = evaluate(
                adapted, experiment.held_out, adapter, k, rescaler, generate=True, merged=state.merged
            )
    return scores
