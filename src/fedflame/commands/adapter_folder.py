"""Adapter folders at both ends of a run: the one it goes on from, and the one it leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from transformers import PreTrainedModel

from fedflame.config import RunConfig
from fedflame.errors import UserError
from fedflame.export import (
    Layout,
    NoPeftLayoutError,
    export_adapter,
    load_adapter,
    load_rescalers,
    load_tier_adapters,
    read_settings,
)
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.server.checkpoint import Checkpoint
from fedflame.strategies import Strategy
from fedflame.strategies.base import ClientProfile, ServerState


def check_start(config: RunConfig, console: Console) -> None:
    """Before a model is loaded: say which adapter the run goes on from, or refuse one of other settings.

    Raises:
        UserError: no adapter folder, or r, lora_alpha or attention modules that differ from the run's.
    """
    name, wanted = config.model.adapter_name_or_path, config.adapter
    if not name:
        return
    settings = read_settings(Path(name))
    got = settings.adapter
    if (got.r, got.lora_alpha) != (wanted.r, wanted.lora_alpha):
        raise UserError(
            f"adapter.r = {wanted.r}, adapter.lora_alpha = {wanted.lora_alpha:g}: the adapter in {name} has "
            f"r = {got.r}, lora_alpha = {got.lora_alpha:g}; a run that goes on from it must have the same"
        )
    if lacking := [module for module in got.attention_modules() if module not in wanted.attention_modules()]:
        raise UserError(
            f"adapter.target_modules = {wanted.target_modules!r} lacks {','.join(lacking)}, which the "
            f"adapter in {name} has"
        )
    console.print(f"goes on from {name}, trained on {settings.base_model}", markup=False, soft_wrap=True)


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
    checkpoint: Checkpoint,
    config: RunConfig,
    model: PreTrainedModel,
    to: Path,
    layout: Layout | None,
    overwrite: bool,
    console: Console,
) -> None:
    """`export_adapter`, saying so where PEFT needs the fused layout for this family."""
    written = export_adapter(checkpoint.state, config, model, to, checkpoint.round, overwrite, layout)
    if layout is None and written == "fused":
        kind = model.config.model_type
        console.print(f"adapter in the fused layout: PEFT reads none per expert for {kind} models")


def write_run_adapter(
    checkpoint: Checkpoint, config: RunConfig, model: PreTrainedModel, run: Path, console: Console
) -> None:
    """The adapter folder in a finished run's folder, or the reason why the run can only be merged."""
    try:
        write_adapter(checkpoint, config, model, run / "adapter", None, True, console)
    except NoPeftLayoutError as error:
        console.print(f"no adapter folder: {error}", markup=False, soft_wrap=True)
