"""Adapter folders at both ends of a run: the one it goes on from, and the one it leaves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedModel

from fedflame.config.run_config import RunConfig
from fedflame.data.encoder import PLAIN_FORM, PromptForm
from fedflame.data.sources import hub_id
from fedflame.errors import UserError
from fedflame.experiment.run_folder import saved_prompt_form
from fedflame.experiment.used_model import used_state
from fedflame.exports import (
    CardFacts,
    Layout,
    NoPeftLayoutError,
    TrainedRun,
    export_adapter,
    load_adapter,
    load_rescalers,
    load_tier_adapters,
    read_settings,
)
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.report.records import read_run
from fedflame.server.checkpoint import Checkpoint
from fedflame.strategies.base import ClientProfile, ServerState, Strategy

MEASURES = ("loss", "exact_match", "rouge_l")


@dataclass(frozen=True)
class Written:
    """What became of the adapter folder of a finished run."""

    run: Path
    """The run folder."""
    adapter: Path | None
    """None where PEFT has no layout for this model family, so that the run can only be merged."""
    note: str = ""
    """What the user should know of it, or empty."""


def starting_adapter(config: RunConfig) -> str:
    """Before a model is loaded: the adapter that the run goes on from, in words; empty for none.

    Raises:
        UserError: no adapter folder, or r, lora_alpha or attention modules that differ from the run's.
    """
    name, wanted = config.model.adapter_name_or_path, config.adapter
    if not name:
        return ""
    settings = read_settings(Path(name))
    got = settings.adapter
    if got.r != wanted.r or not math.isclose(got.scale, wanted.scale, rel_tol=1e-12):
        raise UserError(
            f"adapter.{wanted.in_words.replace(', ', ', adapter.')}: the adapter in {name} has "
            f"{got.in_words}; a run that goes on from it must have the same"
        )
    if lacking := [module for module in got.target_modules if module not in wanted.target_modules]:
        raise UserError(
            f"adapter.target_modules = {','.join(wanted.target_modules)!r} lacks {','.join(lacking)}, which "
            f"the adapter in {name} has"
        )
    return f"{name}, trained on {settings.base_model}"


def initial_state(
    config: RunConfig, adapted: AdaptedModel, strategy: Strategy, profiles: Sequence[ClientProfile]
) -> ServerState:
    """The state before round 1: new, or from the adapter folder that the configuration names.

    The folder's rescalers start the tiers whose s the method learns; a method that fixes s keeps its own.
    Adapters of one k start those of a method that keeps some; another goes on from that of its largest k.

    Raises:
        UserError: see `load_adapter` and `load_rescalers`.
    """
    folder = Path(config.model.adapter_name_or_path)
    tiers = config.evaluated_experts(adapted.num_experts_per_tok)
    if not config.model.adapter_name_or_path:
        return strategy.initialize(adapted.initial_adapter(config.seed), tiers, len(adapted.layers))
    adapter, saved = load_adapter(folder, adapted, config.seed), load_rescalers(folder, adapted)
    of_tier = load_tier_adapters(folder, adapted, config.seed)
    state = strategy.initialize(of_tier.get(max(tiers), adapter), tiers, len(adapted.layers))
    plans = [strategy.configure_train(state, profile) for profile in profiles]
    learned = {plan.active_experts for plan in plans if plan.rescaler != "fixed"}
    rescalers = {k: saved.get(k, s) if k in learned else s for k, s in state.rescalers.items()}
    tier_adapters = {k: of_tier.get(k, its) for k, its in state.tier_adapters.items()}
    return replace(state, rescalers=rescalers, tier_adapters=tier_adapters)


def write_adapter(
    state: ServerState,
    trained: TrainedRun,
    model: PreTrainedModel,
    to: Path,
    layout: Layout | None,
    overwrite: bool,
) -> str:
    """`export_adapter`; a note where PEFT needs the fused layout for this family, or empty."""
    written = export_adapter(state, trained, model, to, overwrite, layout)
    if layout is None and written == "fused":
        return f"adapter in the fused layout: PEFT reads none per expert for {model.config.model_type} models"
    return ""


def write_run_adapter(
    checkpoint: Checkpoint, config: RunConfig, model: PreTrainedModel, run: Path
) -> Written:
    """The adapter folder in a finished run's folder, or the reason why the run can only be merged."""
    state = used_state(run) if config.server.load_best_model_at_end else checkpoint.state
    try:
        card = card_facts(run, config, checkpoint.round)
        trained = trained_run(config, checkpoint.round, saved_prompt_form(run), card)
        note = write_adapter(state, trained, model, run / "adapter", None, True)
    except NoPeftLayoutError as error:
        return Written(run, None, f"no adapter folder: {error}")
    return Written(run, run / "adapter", note)


def card_facts(run: Path, config: RunConfig, round_number: int) -> CardFacts:
    """What a model card says of a run's data, and of its scores after this round, the last.

    Where each k has its best round, its scores are of that.
    """
    recorded = read_run(run)
    used = recorded.used_rounds
    held_out = {
        one.active_experts: {name: value for name in MEASURES if (value := one.value(name)) is not None}
        for one in recorded.evaluations
        if (one.round, one.category) == (used.get(one.active_experts, round_number), None)
    }
    tasks = recorded.tasks if recorded.tasks and recorded.tasks.round == round_number else None
    return CardFacts(
        hub_id(config.data.dataset_name),
        held_out,
        tasks,
        best_rounds=used,
        epsilon=recorded.epsilon,
        delta=config.privacy.delta,
    )


def trained_run(
    config: RunConfig, rounds: int, prompt: PromptForm = PLAIN_FORM, card: CardFacts | None = None
) -> TrainedRun:
    """What an export says of a run with this configuration and prompts after so many rounds."""
    epochs = config.training.num_train_epochs
    return TrainedRun(
        base_model=config.model.model_name_or_path,
        adapter=config.adapter,
        method=config.method.title,
        strategy=config.strategy.model_dump(),
        num_clients=config.clients.num_clients,
        active_experts=config.clients.active_experts,
        local_work=f"{epochs:g} epochs" if epochs else f"at most {config.training.max_steps} steps",
        learning_rate=config.training.learning_rate,
        rounds=rounds,
        prompt=prompt,
        card=card or CardFacts(),
    )
