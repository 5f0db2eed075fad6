"""`fedflame export`: a run's adapter for PEFT, or merged into a stock checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM

from fedflame.base_model import model_config_path
from fedflame.commands.adapter_folder import write_adapter
from fedflame.commands.run import saved_config
from fedflame.export import Layout, merge
from fedflame.model_shape import read_model_shape
from fedflame.server.checkpoint import read_checkpoint


def export_run(
    run: Path,
    to: Path,
    merged: bool,
    active_experts: int | None,
    layout: Layout | None,
    overwrite: bool,
    console: Console,
) -> None:
    """Write what the run's last checkpoint holds into a folder.

    Args:
        run: the run folder.
        to: the folder to make.
        merged: a stock checkpoint instead of an adapter.
        active_experts: with `merged`, the k whose rescaler is folded in; None for the model's own K.
        layout: of the adapter; None for the one that PEFT reads for the model family.
        overwrite: replace an earlier export.
        console: where it says that the family needs the fused layout.

    Raises:
        UserError: `run` is no run folder or has no checkpoint, or see `export_adapter` and `merge`.
    """
    config = saved_config(run)
    checkpoint = read_checkpoint(run)
    path = model_config_path(config.model.model_name_or_path)
    if merged:
        k = read_model_shape(path).num_experts_per_tok if active_experts is None else active_experts
        merge(checkpoint.state, config, k, to, checkpoint.round, overwrite)
        return
    with torch.device("meta"):
        structure: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    write_adapter(checkpoint, config, structure, to, layout, overwrite, console)
