"""What a run's last checkpoint holds, as an adapter folder or a stock checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedflame.base.device import choose_device
from fedflame.base.files import load_error, model_config_path
from fedflame.cost.model_shape import read_model_shape
from fedflame.errors import UserError
from fedflame.experiment.run_folder import saved_config, saved_prompt_form

if TYPE_CHECKING:
    from fedflame.exports import Layout


@dataclass(frozen=True)
class ExportOptions:
    """What is written of a run, and how."""

    merge: bool = False
    """A stock checkpoint instead of an adapter."""
    active_experts: int | None = None
    """With `merge`, the k whose rescaler is folded in; None for the model's own K."""
    layout: Layout | None = None
    """Of the adapter; None for the one that PEFT reads for the model family."""
    overwrite: bool = False
    """Replace an earlier export."""
    check: bool = False
    """Load what was written as a user does, and hold its outputs to the run's."""

    def require_sound(self) -> None:
        """Raises UserError where options exclude each other."""
        if self.active_experts is not None and not self.merge:
            raise UserError("--active-experts needs --merge; an adapter serves every k")
        if self.layout is not None and self.merge:
            raise UserError("--layout is of an adapter; with --merge there is none")


def export_run(run: Path, to: Path, options: ExportOptions) -> list[str]:
    """Write what the run's last checkpoint holds into a folder.

    Args:
        run: the run folder.
        to: the folder to make.
        options: what is written, and how.

    Returns:
        What the user should know of the export, in lines.

    Raises:
        UserError: `run` is no run folder or has no checkpoint; see `export_adapter`, `merge_checkpoint` and
            `check_export`.
    """
    options.require_sound()
    config, prompt = saved_config(run), saved_prompt_form(run)
    from fedflame.experiment.adapter_folder import trained_run, write_adapter  # from here on with torch
    from fedflame.exports import check_export, merge_checkpoint
    from fedflame.server.checkpoint import read_checkpoint

    checkpoint = read_checkpoint(run)
    path = model_config_path(config.model.model_name_or_path)
    trained = trained_run(config, checkpoint.round, prompt)
    notes = []
    if options.merge:
        k = options.active_experts or read_model_shape(path).num_experts_per_tok
        merge_checkpoint(checkpoint.state, trained, k, to, options.overwrite)
    else:
        structure = _structure(config.model.model_name_or_path, path)
        notes.append(
            write_adapter(checkpoint, config, prompt, structure, to, options.layout, options.overwrite)
        )
    if options.check:
        device = choose_device(config.model.device).name
        found = check_export(to, checkpoint.state, trained, device)
        notes += [one.in_words() for one in found]
    return [note for note in notes if note]


def _structure(name: str, path: Path) -> Any:
    """The model without weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(path, trust_remote_code=False)
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # of transformers, whatever is in the config.json
        raise UserError(load_error(name, error)) from error
