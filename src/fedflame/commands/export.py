"""`fedflame export`: a run's adapter for PEFT, or merged into a stock checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fedflame.base_model import model_config_path
from fedflame.commands.run import saved_config
from fedflame.export import export_adapter, merge
from fedflame.model_shape import read_model_shape
from fedflame.server.checkpoint import read_checkpoint


def export_run(run: Path, to: Path, merged: bool, active_experts: int | None, overwrite: bool) -> Path:
    """Write what the run's last checkpoint holds and return the folder.

    Args:
        run: the run folder.
        to: the folder to make.
        merged: a stock checkpoint instead of an adapter.
        active_experts: with `merged`, the k whose rescaler is folded in; None for the model's own K.
        overwrite: replace an earlier export.

    Raises:
        UserError: `run` is no run folder or has no checkpoint, or see `export_adapter` and `merge`.
    """
    config = saved_config(run)
    checkpoint = read_checkpoint(run)
    path = model_config_path(config.model.model_name_or_path)
    if merged:
        k = read_model_shape(path).num_experts_per_tok if active_experts is None else active_experts
        merge(checkpoint.state, config, k, to, checkpoint.round, overwrite)
        return to
    with torch.device("meta"):
        structure: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    export_adapter(checkpoint.state, config, structure, to, checkpoint.round, overwrite)
    return to
