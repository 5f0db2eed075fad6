"""What a run's last checkpoint holds, as an adapter folder or a stock checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedflame.base.files import load_error, model_config_path
from fedflame.cost.model_shape import read_model_shape
from fedflame.errors import UserError
from fedflame.experiment.run_folder import saved_config, saved_prompt_form

if TYPE_CHECKING:
    from fedflame.exports import Layout


def export_run(
    run: Path,
    to: Path,
    merge: bool = False,
    active_experts: int | None = None,
    layout: Layout | None = None,
    overwrite: bool = False,
) -> str:
    """Write what the run's last checkpoint holds into a folder.

    Args:
        run: the run folder.
        to: the folder to make.
        merge: a stock checkpoint instead of an adapter.
        active_experts: with `merge`, the k whose rescaler is folded in; None for the model's own K.
        layout: of the adapter; None for the one that PEFT reads for the model family.
        overwrite: replace an earlier export.

    Returns:
        What the user should know of the export, or nothing.

    Raises:
        UserError: `run` is no run folder or has no checkpoint; see `export_adapter`, `merge_checkpoint`.
    """
    if active_experts is not None and not merge:
        raise UserError("--active-experts needs --merge; an adapter serves every k")
    if layout is not None and merge:
        raise UserError("--layout is of an adapter; with --merge there is none")
    config, prompt = saved_config(run), saved_prompt_form(run)
    import torch  # from here on with torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from fedflame.experiment.adapter_folder import trained_run, write_adapter
    from fedflame.exports import merge_checkpoint
    from fedflame.server.checkpoint import read_checkpoint

    checkpoint = read_checkpoint(run)
    path = model_config_path(config.model.model_name_or_path)
    if merge:
        k = read_model_shape(path).num_experts_per_tok if active_experts is None else active_experts
        merge_checkpoint(checkpoint.state, trained_run(config, checkpoint.round, prompt), k, to, overwrite)
        return ""
    try:
        with torch.device("meta"):
            structure: Any = AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(path, trust_remote_code=False), trust_remote_code=False
            )
    except Exception as error:  # of transformers, whatever is in the config.json
        raise UserError(load_error(config.model.model_name_or_path, error)) from error
    return write_adapter(checkpoint, config, prompt, structure, to, layout, overwrite)
