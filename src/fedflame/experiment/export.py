"""What a run leaves to be used, as a folder for PEFT, llama.cpp or transformers, and on the hub."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedflame.base.device import choose_device
from fedflame.base.files import load_error, model_config_path
from fedflame.cost.model_shape import read_model_shape
from fedflame.errors import UserError
from fedflame.experiment.publish import push, require_hub_id, require_login
from fedflame.experiment.run_folder import saved_config, saved_prompt_form

if TYPE_CHECKING:
    from fedflame.exports import Layout, TrainedRun
    from fedflame.strategies.base import ServerState


@dataclass(frozen=True)
class ExportOptions:
    """What is written of a run, and how."""

    merge: bool = False
    """A stock checkpoint instead of an adapter."""
    active_experts: int | None = None
    """With `merge` or `gguf`, the k that it is for; None for the model's own K."""
    layout: Layout | None = None
    """Of the adapter; None for the one that PEFT reads for the model family."""
    overwrite: bool = False
    """Replace an earlier export."""
    check: bool = False
    """Load what was written as a user does, and hold its outputs to the run's."""
    gguf: bool = False
    """A GGUF LoRA for llama.cpp instead of an adapter for PEFT."""
    push_to_hub: bool = False
    hub_model_id: str = ""
    """USER/NAME, for the card and for `push_to_hub`."""
    hub_private_repo: bool = False
    license: str = ""
    """For the card, as the hub names it; so are the next two."""
    license_name: str = ""
    license_link: str = ""

    def require_sound(self) -> None:
        """Raises UserError where options exclude each other, or before anything is written that must fail."""
        if self.merge and self.gguf:
            raise UserError("--merge and --gguf exclude each other; give one")
        if self.active_experts is not None and not (self.merge or self.gguf):
            raise UserError("--active-experts needs --merge or --gguf; an adapter for PEFT serves every k")
        if self.layout is not None and (self.merge or self.gguf):
            raise UserError("--layout is of an adapter for PEFT; with --merge or --gguf there is none")
        if self.check and self.gguf:
            raise UserError("--check loads with transformers, which does not read a GGUF LoRA")
        if self.license == "other" and not self.license_name:
            raise UserError("--license other needs --license-name, and --license-link if there is one")
        if self.hub_model_id:
            require_hub_id(self.hub_model_id)
        if self.push_to_hub:
            if not self.hub_model_id:
                raise UserError("--push-to-hub needs --hub-model-id USER/NAME")
            require_login()


def export_run(run: Path, to: Path, options: ExportOptions) -> list[str]:
    """Write what the run leaves to be used into a folder, and push it if that is asked for.

    Args:
        run: the run folder.
        to: the folder to make.
        options: what is written, and how.

    Returns:
        What the user should know of the export, in lines.

    Raises:
        UserError: `run` is no run folder or has no checkpoint; see `export_adapter`, `export_gguf`,
            `merge_checkpoint`, `check_export` and `push`.
    """
    options.require_sound()
    config = saved_config(run)
    from fedflame.experiment.adapter_folder import card_facts, trained_run  # from here on with torch
    from fedflame.experiment.used_model import used_state
    from fedflame.exports import check_export
    from fedflame.run_files.checkpoints import kept_round

    state, last = used_state(run), kept_round(run)
    card = replace(
        card_facts(run, config, last),
        hub_model_id=options.hub_model_id,
        license=options.license,
        license_name=options.license_name,
        license_link=options.license_link,
    )
    trained = trained_run(config, last, saved_prompt_form(run), card)
    notes = [_write(state, trained, to, options)]
    if options.check:
        found = check_export(to, state, trained, choose_device(config.model.device).name)
        notes += [one.in_words() for one in found]
    if options.push_to_hub:
        notes.append(f"pushed: {push(to, options.hub_model_id, options.hub_private_repo)}")
    return [note for note in notes if note]


def _write(state: ServerState, trained: TrainedRun, to: Path, options: ExportOptions) -> str:
    """Write the folder; return what the user should know of it, or nothing."""
    from fedflame.experiment.adapter_folder import write_adapter
    from fedflame.exports import export_gguf, merge_checkpoint

    path = model_config_path(trained.base_model)
    k = options.active_experts or read_model_shape(path).num_experts_per_tok
    if options.merge:
        merge_checkpoint(state, trained, k, to, options.overwrite)
        return ""
    structure = _structure(trained.base_model, path)
    if options.gguf:
        return export_gguf(state, trained, structure, k, to, options.overwrite)
    return write_adapter(state, trained, structure, to, options.layout, options.overwrite)


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
