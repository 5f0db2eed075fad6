"""What can be refused before weights or torch are loaded: settings, run folder, sites, model files, data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedflame.base.files import model_config_path, require_folder_complete, resolve_model
from fedflame.config.run_config import RunConfig
from fedflame.config.sum_options import require_groups
from fedflame.cost.model_shape import ModelShape, attention_targets, read_model_shape
from fedflame.cost.refused_families import require_trainable
from fedflame.cost.row_length import prompt_length, row_length
from fedflame.cost.tiers import require_possible, require_rank
from fedflame.data.federation import Federation, load_federation
from fedflame.data.given import GivenRows
from fedflame.errors import UserError
from fedflame.experiment.run_folder import Existing, check_run_folder, refuse_used
from fedflame.experiment.sites import Sites, check_sites
from fedflame.privacy.accounting import require_accounting
from fedflame.trackers.process import require_installed


@dataclass(frozen=True)
class Prepared:
    """A run that nothing known beforehand speaks against."""

    config: RunConfig
    existing: Existing
    """What to do with a run folder that is there."""
    shape: ModelShape
    federation: Federation
    sites: Sites | None = None
    """The clients, where they are sites behind an engine; None for clients of this machine."""
    resume_from: int | None = None
    """The kept round that a resumption goes on after; None for the last."""


def prepare(
    config: RunConfig,
    existing: Existing = "refuse",
    sites: Sites | None = None,
    given: GivenRows | None = None,
    resume_from: int | None = None,
) -> Prepared:
    """Check what a run is to be, and read its rows.

    Args:
        config: the checked configuration.
        existing: what to do with a run folder that is there.
        sites: the clients, where they are sites behind an engine.
        given: rows that a program hands over, instead of `data.dataset_name`.
        resume_from: the kept round that a resumption goes on after; None for the last.

    Raises:
        UserError: the run cannot start as it is configured; nothing was changed.
    """
    config = with_target_modules(config)
    run = Path(config.output_dir)
    require_installed(config.report_to)
    if config.privacy.unit != "none":
        require_accounting()
    refuse_used(run)
    check_run_folder(run, config, existing)
    if sites is not None:
        if config.data.trained_by != "each":
            raise UserError(
                f"data.trained_by = {config.data.trained_by!r}: sites train on the rows that they have; "
                "leave it at 'each'"
            )
        check_sites(config.clients.num_clients, sites)
    shape = require_runnable(config)
    return Prepared(config, existing, shape, load_federation(config, given), sites, resume_from)


def with_target_modules(config: RunConfig) -> RunConfig:
    """The configuration with the names of the attention projections that carry LoRA, instead of `auto`.

    Raises:
        UserError: the model's config.json is missing or damaged, or it has no such projection.
    """
    shape = read_model_shape(model_config_path(config.model.model_name_or_path))
    names = attention_targets(shape, config.adapter.target_modules)
    adapter = config.adapter.model_copy(update={"target_modules": names})
    return config.model_copy(update={"adapter": adapter})


def require_runnable(config: RunConfig, adapter_rank: int = 0) -> ModelShape:
    """The shape of the configured model.

    Args:
        config: what is to run.
        adapter_rank: see `require_fitting`.

    Raises:
        UserError: the model's files are not complete, or see `require_fitting`.
    """
    name = config.model.model_name_or_path
    shape = read_model_shape(model_config_path(name))
    require_folder_complete(resolve_model(name))
    require_fitting(config, shape, adapter_rank)
    return shape


def require_fitting(config: RunConfig, shape: ModelShape, adapter_rank: int = 0) -> None:
    """Check what a configuration asks of a model.

    Args:
        config: what is to run.
        shape: of its model.
        adapter_rank: the rank of an adapter that is there; a larger one than the model's matrices is then no
            mistake, since merged factors add ranks.

    Raises:
        UserError: the model cannot run a k or a rank of the configuration or pack rows, a row or an answer
            does not fit into its context, or too few clients train with some k to be summed.
    """
    if config.adapter.r > adapter_rank:
        require_rank(config.adapter.r, shape)
    full = shape.num_experts_per_tok
    chosen = config.strategy.active_experts
    if config.method.experts == "chosen" and chosen.isdecimal() and int(chosen) > full:
        raise UserError(
            f"strategy.active_experts {chosen}: must be 'min', 'full' or between 1 and {full} "
            "(the model's num_experts_per_tok)"
        )
    require_possible(config.evaluated_experts(full), shape)
    require_groups(config, full)
    require_trainable(shape.model_type, config.training.packs, config.training.router_aux_loss_coef)
    row_length(config.data.max_length, shape)
    prompt_length(config.evaluation.max_new_tokens, shape)
